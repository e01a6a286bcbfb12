"""Decoders as docs/artifact.md describes them, written again in plain numpy and math."""

import math

import numpy as np
import pytest
import torch

from reallm.fit import fit
from reallm.formats import from_spec, parameters

erf = np.vectorize(math.erf)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def weight_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def stored_vector(fmt, tensors, count):
    """The parameters from the tensors under `decoder.`"""
    stream = np.unpackbits(tensors["decoder.codes"].numpy(), bitorder="little")
    bits = fmt.decoder_bits
    codes = stream[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))
    ratio = tensors["decoder.scales"].numpy().astype(np.float32) / 127
    scales = ratio * abs(ratio) * np.repeat(tensors["decoder.scales_max"].numpy(), 256)[: len(ratio)]
    return (codes - 2 ** (bits - 1)) * np.repeat(scales, 32)[:count]


def cut(vector, *shapes):
    """The vector as tensors, one after the other."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    assert ends[-1] == len(vector)
    return [part.reshape(shape) for part, shape in zip(np.split(vector, ends[:-1]), shapes, strict=True)]


def test_words_of_codeword():
    fmt, shape = (
        from_spec({"format": "codeword", "index_bits": 7, "vector_dim": 4, "digit_bits": 3, "hidden": 5}),
        (8, 30),
    )
    unpacked = fit(fmt, weight_of(shape))
    tensors = fmt.pack(unpacked, shape)
    sizes = [(7, 9), (7, 9), (1, 9), (9,), (5, 4)]
    vector = stored_vector(fmt, tensors, sum(math.prod(size) for size in sizes)).astype(np.float64)
    first, second, third, bias, out = cut(vector, *sizes)
    words = []
    for index in range(128):
        total = bias.copy()
        for table, digit in ((first, index >> 4), (second, index >> 1 & 7), (third, index & 1)):
            total += table[digit - 1] if digit else 0
        words.append(total[:4] + gelu(total[4:]) @ out)
    decoded = np.array(words)[unpacked.codes.numpy()].reshape(8, -1)[:, :30] * unpacked.scales.numpy()
    np.testing.assert_allclose(fmt.decode(unpacked, shape).numpy(), decoded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["dct", "hadamard", "learned"])
def test_bases_of_linear_latents(transform):
    spec = {"format": "linear_latents", "transform": transform, "patch_rows": 2, "patch_columns": 4, "kept": 5}
    fmt, shape = from_spec({**spec, "base": {"format": "dense", "dtype": "float32"}}), (5, 11)
    unpacked = fit(fmt, weight_of(shape))

    def pattern(n, a):
        at = np.arange(n)
        if transform == "dct":
            return math.sqrt((1 if a == 0 else 2) / n) * np.cos(math.pi * a * (2 * at + 1) / (2 * n))
        rows = [[(-1) ** bin(i & j).count("1") for j in at] for i in at]
        return (
            np.array(next(row for row in rows if sum(x != y for x, y in zip(row, row[1:], strict=False)) == a)) / n**0.5
        )

    if transform == "learned":
        basis = stored_vector(fmt, fmt.pack(unpacked, shape), 40).reshape(5, 8)
    else:
        order = sorted(((a, b) for a in range(2) for b in range(4)), key=lambda ab: (sum(ab), ab[0]))[:5]
        basis = np.array([np.outer(pattern(2, a), pattern(4, b)).reshape(-1) for a, b in order])
    base, decoded = unpacked.base.values.numpy(), np.zeros(shape)
    for i, j in np.ndindex(*shape):
        latents = base[i // 2, j // 4 * 5 : j // 4 * 5 + 5]
        decoded[i, j] = latents @ basis[:, i % 2 * 4 + j % 4]
    np.testing.assert_allclose(fmt.decode(unpacked, shape).numpy(), decoded, rtol=1e-4, atol=1e-5)


def correlate(values, kernels, bias):
    """3×3, zeros around."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    down, across = values.shape[1:]
    windows = [padded[:, y : y + down, x : x + across] for y in range(3) for x in range(3)]
    return (
        sum(np.einsum("oi,ihw->ohw", kernels[:, :, k // 3, k % 3], w) for k, w in enumerate(windows))
        + bias[:, None, None]
    )


def test_net_of_conv_latents():
    spec = {"format": "conv_latents", "channels": 3, "width": 2, "stages": 2, "steps": 3}
    fmt, shape = from_spec({**spec, "base": {"format": "dense", "dtype": "float32"}}), (9, 14)
    unpacked = fit(fmt, weight_of(shape))
    sizes = [(16, 3), (2, 3), (2,), (8, 2, 3, 3), (8,), (8, 2, 3, 3), (8,), (1, 2, 3, 3), (1,)]
    vector = stored_vector(fmt, fmt.pack(unpacked, shape), fmt.net.parameters)
    skip, stem, stem_bias, up0, bias0, up1, bias1, head, bias = cut(vector, *sizes)
    latents = unpacked.base.values.numpy().reshape(3, 4, 3).transpose(2, 0, 1)
    values = np.einsum("oc,chw->ohw", stem, latents) + stem_bias[:, None, None]
    for kernels, shift in ((up0, bias0), (up1, bias1)):
        found = correlate(values, kernels, shift)
        values = np.zeros((2, 2 * found.shape[1], 2 * found.shape[2]))
        for c, y, x in np.ndindex(2, 2, 2):
            values[c, y::2, x::2] = found[4 * c + 2 * y + x]
        values = gelu(values)
    net = correlate(values, head, bias)[0]
    for y, x in np.ndindex(4, 4):
        net[y::4, x::4] += np.einsum("c,chw->hw", skip[4 * y + x], latents)
    decoded = net[:9, :14] * unpacked.scales.numpy()
    np.testing.assert_allclose(fmt.decode(unpacked, shape).numpy(), decoded, rtol=1e-4, atol=1e-5)


def test_parameters_of_16_bits_are_floats():
    fmt = from_spec({"format": "codeword", "index_bits": 4, "decoder_bits": 16})
    assert fmt.layout((4, 16))["decoder.values"].shape == (1, fmt.net.parameters)
    assert parameters.storage(16).name == "dense"
