"""Latents and their decoders: what a decoder knows of neighbours pays where neighbours are alike, and nowhere else."""

import math

import pytest
import torch

from reallm.decoders import ConvNet
from reallm.errors import FormatError
from reallm.fit import Objective, fit, relative_error
from reallm.formats import from_spec

SHAPE = (64, 96)
VECTORS = {"format": "codebook", "index_bits": 6, "vector_dim": 2}


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def waves():
    y, x = torch.meshgrid(torch.arange(SHAPE[0]) / 9, torch.arange(SHAPE[1]) / 11, indexing="ij")
    return torch.sin(x + y) + torch.cos(2 * x - y / 2) + 0.05 * noise()


def shuffled(weight):
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in weight.shape)
    return weight[rows][:, columns]


def error_of(spec, weight, objective=None):
    fmt, shape = from_spec(spec), tuple(weight.shape)
    return relative_error(weight, fmt.decode(fit(fmt, weight, objective), shape))


@pytest.mark.parametrize("transform", ["dct", "hadamard", "learned"])
def test_few_coefficients_say_most_of_smooth_patches_and_their_share_of_noise(transform):
    spec = {"format": "linear_latents", "transform": transform, "kept": 4, "base": {"format": "uniform", "bits": 8}}
    smooth, shuffled_noise = error_of(spec, waves()), error_of(spec, shuffled(waves()))
    assert smooth < 0.02 and shuffled_noise > 0.2
    assert 0.35 < error_of(spec, noise()) < 0.55


def test_all_coefficients_of_an_orthonormal_transform_lose_nothing():
    spec = {"format": "linear_latents", "patch_rows": 4, "patch_columns": 8, "kept": 32}
    base = {"format": "dense", "dtype": "float32"}
    for transform in ("dct", "hadamard"):
        assert error_of({**spec, "transform": transform, "base": base}, noise()) < 1e-12


def test_latents_of_one_row_are_fitted_by_the_error_of_outputs():
    weight, inputs = noise(), noise(1, (500, SHAPE[1])) @ noise(2, (SHAPE[1], SHAPE[1])) / 10
    objective = Objective.output_error(inputs.T @ inputs / 500)
    fmt = from_spec({"format": "linear_latents", "kept": 4, "base": {"format": "uniform", "bits": 8}})
    decoded = fmt.decode(fit(fmt, weight, objective), SHAPE)
    # The best four coefficients of every patch, by least squares in the metric of the inputs.
    basis = fmt.basis(None, weight)
    spread = torch.block_diag(*[basis] * (SHAPE[1] // 8)).double()
    root = torch.linalg.cholesky(objective.hessian.double() + 1e-9 * torch.eye(SHAPE[1]))
    best = torch.linalg.lstsq((spread @ root).T, (weight.double() @ root).T).solution.T @ spread
    least, zero = objective.error(weight, best.float()), objective.error(weight, torch.zeros(SHAPE))
    assert least < 0.5 * zero
    assert objective.error(weight, decoded) == pytest.approx(least, rel=1e-3)


def test_tiles_have_no_seams():
    net = ConvNet(channels=3, width=4, stages=2)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(net.parameters, generator=generator) * 0.3
    latents = torch.randn(3, 140, 75, generator=generator)
    whole, tiled = net.decode(flat, latents), net.decode_tiled(flat, latents)
    assert whole.shape == tiled.shape == (560, 300)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


def test_multiply_adds_are_those_that_convolutions_do():
    net = ConvNet(channels=5, width=6, stages=2)
    products = 0
    for name, shape in net.shapes.items():
        if name in ("skip", "stem"):
            products += math.prod(shape)  # once a latent
        elif name.startswith("up") and not name.endswith("bias"):
            products += math.prod(shape) * 4 ** int(name.removeprefix("up"))
        elif name == "head":
            products += math.prod(shape) * 16
    assert net.multiply_adds_per_weight == products / 16


@pytest.mark.parametrize("method", ["auto_decoder", "encoder"])
def test_convolutions_pay_where_neighbours_are_alike_and_not_once_they_are_shuffled(method):
    spec = {"format": "conv_latents", "channels": 1, "width": 8, "decoder_bits": 8, "method": method, "steps": 100}
    spec["base"] = {"format": "uniform", "bits": 4, "group_size": 0}
    linear = {"format": "linear_latents", "patch_rows": 2, "patch_columns": 2, "kept": 1, "base": spec["base"]}
    assert error_of(spec, waves()) < 0.7 * error_of(linear, waves())
    assert error_of(spec, shuffled(waves())) > 0.3


def test_training_never_ends_worse_than_the_linear_decoder_it_began_as():
    weight = noise()
    spec = {"format": "conv_latents", "width": 4, "base": VECTORS}
    start, end = (error_of({**spec, "steps": steps}, weight) for steps in (0, 40))
    assert end <= start * (1 + 1e-6)


@pytest.mark.parametrize("bits", [3, 8])
def test_convolutions_are_trained_as_they_are_stored(bits):
    spec = {"format": "conv_latents", "width": 6, "channels": 1, "decoder_bits": bits, "steps": 60, "base": VECTORS}
    assert error_of(spec, waves()) < 0.2


def test_a_full_hessian_guides_convolutions():
    weight, inputs = waves(), noise(1, (500, SHAPE[1])) @ noise(2, (SHAPE[1], SHAPE[1])) / 10
    objective = Objective.output_error(inputs.T @ inputs / 500)
    fmt = from_spec({"format": "conv_latents", "width": 6, "steps": 80, "base": {"format": "uniform", "bits": 2}})
    plain, guided = (fmt.decode(fit(fmt, weight, o), SHAPE) for o in (None, objective))
    assert objective.error(weight, guided) < 0.9 * objective.error(weight, plain)


def test_latents_can_be_entropy_coded():
    pytest.importorskip("constriction")
    base = {"format": "entropy_coded", "bits": 4, "largest": 15}
    for spec in (
        {"format": "conv_latents", "width": 2, "steps": 2, "base": base},
        {"format": "linear_latents", "transform": "learned", "base": base},
    ):
        assert error_of(spec, noise()) < 0.02


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"format": "conv_latents", "channels": 0}, "channels=0"),
        ({"format": "conv_latents", "stages": 9}, "stages=9"),
        ({"format": "conv_latents", "width": 256, "stages": 4}, "multiply-adds per weight"),
        ({"format": "conv_latents", "method": "magic"}, "method='magic'"),
        ({"format": "conv_latents", "steps": -1}, "steps=-1"),
        ({"format": "linear_latents", "kept": 9}, "kept=9"),
        ({"format": "linear_latents", "patch_rows": 64, "patch_columns": 64}, "patch of 4096"),
        ({"format": "linear_latents", "transform": "hadamard", "patch_columns": 6, "kept": 2}, "patch_columns=6"),
        ({"format": "linear_latents", "shared": "x"}, "needs transform=learned"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(spec, said):
    with pytest.raises(FormatError, match=said):
        from_spec({**spec, "base": VECTORS})


@pytest.mark.parametrize(
    "spec",
    [
        {"format": "conv_latents", "channels": 1, "stages": 4, "width": 1, "base": {"format": "uniform", "bits": 1}},
        {"format": "linear_latents", "patch_columns": 64, "kept": 1, "base": {"format": "uniform", "bits": 1}},
        {"format": "codeword", "index_bits": 1, "vector_dim": 32},
    ],
)
def test_a_small_file_cannot_ask_for_any_memory(spec):
    with pytest.raises(FormatError, match="below 1/8 bit per weight"):
        from_spec(spec).check((4096, 4096))
