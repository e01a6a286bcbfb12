"""One contract for every registered format: a new format joins by adding its examples to EXAMPLES."""

import pytest
import torch
from safetensors.torch import save

from reallm.errors import FormatError
from reallm.fit import fit, relative_error
from reallm.formats import WeightFormat, from_spec, known_formats, map_tensors, to_spec

CODEBOOK = {"format": "codebook", "index_bits": 4, "vector_dim": 2, "group_size": 16}
NORMAL = {"format": "normal_float", "bits": 3, "group_size": 32}
EXAMPLES = [
    {"format": "dense"},
    {"format": "dense", "dtype": "float16"},
    *({"format": "uniform", "bits": bits, "group_size": 16} for bits in range(1, 9)),
    *({"format": "uniform", "bits": bits, "symmetric": True, "scales": "two_level"} for bits in (1, 2, 3, 8)),
    *({"format": "normal_float", "bits": bits, "group_size": 16} for bits in range(1, 9)),
    {**NORMAL, "scales": "float16", "group_size": 0},
    *({"format": "codebook", "index_bits": 5, "vector_dim": dim, "group_size": 8} for dim in (1, 2, 4, 8)),
    {"format": "codebook", "index_bits": 1, "vector_dim": 1, "scales": "float16"},
    {"format": "codebook", "index_bits": 11, "vector_dim": 8, "group_size": 20},
    *({"format": "additive", "books": 2, "index_bits": 4, "vector_dim": dim} for dim in (4, 8, 16)),
    {"format": "additive", "books": 3, "index_bits": 5, "group_size": 20, "scales": "two_level"},
    {"format": "additive", "books": 1, "index_bits": 9},
    *({"format": "codeword", "index_bits": 6, "vector_dim": dim, "decoder_bits": 8} for dim in (4, 8, 16)),
    {"format": "codeword", "index_bits": 5, "hidden": 0, "digit_bits": 1, "decoder_bits": 16, "scales": "two_level"},
    {"format": "permuted", "base": {"format": "codeword", "index_bits": 4, "decoder_bits": 4, "group_size": 12}},
    {"format": "linear_latents", "kept": 7, "base": NORMAL},
    {"format": "linear_latents", "transform": "learned", "patch_columns": 6, "kept": 5, "base": CODEBOOK},
    {
        "format": "linear_latents",
        "transform": "hadamard",
        "patch_rows": 4,
        "patch_columns": 4,
        "kept": 15,
        "base": NORMAL,
    },
    {"format": "conv_latents", "channels": 3, "width": 3, "steps": 11, "base": CODEBOOK},
    {"format": "conv_latents", "stages": 2, "channels": 17, "width": 2, "decoder_bits": 16, "steps": 2, "base": NORMAL},
    {"format": "conv_latents", "width": 2, "method": "encoder", "decoder_bits": 6, "steps": 4, "base": NORMAL},
    {"format": "conv_latents", "width": 2, "steps": 2, "rate": 1, "base": {"format": "entropy_coded", "bits": 4}},
    {"format": "entropy_coded", "bits": 3},
    {"format": "entropy_coded", "bits": 12.5, "largest": 5},
    {"format": "entropy_coded", "bits": 4.5, "largest": 15, "classes": 3},
    *({"format": "e8", "bits": bits} for bits in (2, 3, 4)),
    {"format": "gain", "base": {"format": "e8", "bits": 2}},
    {"format": "low_rank_plus", "rank": 3, "base": CODEBOOK},
    {"format": "low_rank_plus", "rank": 3, "factors": "int8", "base": NORMAL},
    {"format": "permuted", "base": CODEBOOK},
    {"format": "permuted", "base": NORMAL, "method": "greedy", "block_rows": 7},
    {"format": "permuted", "base": CODEBOOK, "method": "spectral", "rows": True},
    {"format": "permuted", "base": NORMAL, "method": "greedy", "block_rows": 7, "rows": True},
    {"format": "gain", "base": CODEBOOK},
    {"format": "gain", "base": {"format": "entropy_coded", "bits": 4, "largest": 15}},
    {"format": "rotated", "base": CODEBOOK},
    {"format": "rotated", "base": {"format": "additive", "books": 5, "index_bits": 3}},
    {"format": "scaled", "base": CODEBOOK},
    {"format": "scaled", "sides": "inputs", "scales": "float16", "base": NORMAL},
    {"format": "scaled", "sides": "outputs", "base": {"format": "rotated", "base": {"format": "e8", "bits": 2}}},
    {"format": "scaled", "base": {"format": "rotated", "base": {"format": "e8", "bits": 2}}},
    *({"format": "decoupled", "kind": kind, "share": 0.1, "base": NORMAL} for kind in ("columns", "rows", "entries")),
    {"format": "decoupled", "precision": "bfloat16", "base": {"format": "rotated", "base": CODEBOOK}},
    {"format": "decoupled", "kind": "entries", "precision": "bfloat16", "share": 0.5, "base": CODEBOOK},
    {"format": "decoupled", "kind": "rows", "share": 0.03, "base": {"format": "scaled", "base": CODEBOOK}},
    {"format": "trellis", "bits": 2, "state_bits": 8},
    {"format": "trellis", "bits": 3, "state_bits": 8, "tile_columns": 4},
    {"format": "rotated", "base": {"format": "trellis", "bits": 1, "state_bits": 6, "table_bits": 4}},
    {"format": "rotated", "sides": "inputs", "seed": 7, "base": NORMAL},
    {"format": "rotated", "sides": "outputs", "base": {"format": "low_rank_plus", "rank": 2, "base": NORMAL}},
    {"format": "gain", "base": {"format": "low_rank_plus", "rank": 2, "base": {"format": "permuted", "base": NORMAL}}},
]
SHAPES = [(24, 64), (13, 37), (1, 5), (40, 3)]


def name_of(spec: dict) -> str:
    return "-".join(str(value if not isinstance(value, dict) else name_of(value)) for value in spec.values())


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (0.1 + torch.rand(shape[0], 1, generator=generator))


def fits(fmt: WeightFormat, shape: tuple[int, int]) -> bool:
    try:
        fmt.check(shape)
    except FormatError:
        return False
    return True


CASES = [
    pytest.param(from_spec(spec), shape, id=f"{name_of(spec)}-{shape[0]}x{shape[1]}")
    for spec in EXAMPLES
    for shape in SHAPES
    if fits(from_spec(spec), shape)
]
# With the scope of a module all tests of one case run after each other, in one process: they share its fit.
each_case = pytest.mark.parametrize(("fmt", "shape"), CASES, scope="module")
each_format = pytest.mark.parametrize("fmt", [pytest.param(from_spec(spec), id=name_of(spec)) for spec in EXAMPLES])


def test_every_registered_format_has_an_example():
    assert {spec["format"] for spec in EXAMPLES} == set(known_formats())


@each_case
def test_pack_writes_exactly_the_layout(fitted, fmt, shape):
    tensors, layout = fmt.pack(fitted(fmt, weight_of(shape)), shape), fmt.layout(shape)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in layout.items()
    }


@each_case
def test_nbytes_is_the_data_section_of_the_safetensors_file(fitted, fmt, shape):
    file = save(fmt.pack(fitted(fmt, weight_of(shape)), shape))
    header = int.from_bytes(file[:8], "little")
    assert len(file) - 8 - header == fmt.nbytes(shape)


@each_case
def test_packing_what_was_unpacked_changes_nothing(fitted, fmt, shape):
    tensors = fmt.pack(fitted(fmt, weight_of(shape)), shape)
    again = fmt.pack(fmt.unpack(tensors, shape), shape)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@each_case
def test_the_file_decodes_to_what_the_fit_decoded_to(fitted, fmt, shape):
    unpacked = fitted(fmt, weight_of(shape))
    assert torch.equal(fmt.decode(fmt.unpack(fmt.pack(unpacked, shape), shape), shape), fmt.decode(unpacked, shape))


@each_case
def test_decoding_has_the_shape_and_beats_zero(fitted, fmt, shape):
    weight = weight_of(shape)
    decoded = fmt.decode(fitted(fmt, weight), shape)
    assert decoded.shape == weight.shape and decoded.dtype == torch.float32
    assert relative_error(weight, decoded) < 0.95


@each_format
def test_gradients_reach_every_float_part(fitted, fmt):
    shape, floats = SHAPES[0], []

    def trainable(tensor):
        if not tensor.is_floating_point():
            return tensor
        floats.append(tensor.clone().requires_grad_())
        return floats[-1]

    unpacked = map_tensors(trainable, fitted(fmt, weight_of(shape)))
    fmt.decode(unpacked, shape).square().sum().backward()
    assert floats and all(part.grad is not None and part.grad.abs().sum() > 0 for part in floats)


@each_format
def test_the_same_seed_gives_the_same_bytes(fmt):
    shape = SHAPES[1] if fits(fmt, SHAPES[1]) else SHAPES[0]
    first, second = (fmt.pack(fit(fmt, weight_of(shape), seed=3), shape) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_format
def test_a_spec_is_the_format(fmt):
    assert from_spec(to_spec(fmt)) == fmt


@each_format
def test_every_stored_tensor_has_a_ledger_role(fmt):
    assert all(fmt.role(name) for name in fmt.layout(SHAPES[0]))


@each_format
def test_a_zero_matrix_stays_zero(fitted, fmt):
    decoded = fmt.decode(fitted(fmt, torch.zeros(SHAPES[0])), SHAPES[0])
    assert torch.equal(decoded, torch.zeros(SHAPES[0]))


@each_case
def test_single_rows_decode_as_in_the_whole(fitted, fmt, shape):
    tensors = fmt.pack(fitted(fmt, weight_of(shape)), shape)
    rows = torch.tensor([shape[0] - 1, 0, shape[0] // 2])
    whole = fmt.decode(fmt.unpack(tensors, shape), shape)
    torch.testing.assert_close(fmt.decode_rows(tensors, shape, rows), whole[rows], rtol=1e-6, atol=1e-7)


@each_format
def test_huge_and_tiny_weights_stay_finite(fitted, fmt):
    for size in (1e-12, 1e4):
        decoded = fmt.decode(fitted(fmt, weight_of(SHAPES[0]) * size), SHAPES[0])
        assert torch.isfinite(decoded).all()
