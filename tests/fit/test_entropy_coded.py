import math

import pytest
import torch

from reallm.fit import Objective, fit, relative_error
from reallm.formats.entropy_coded import EntropyCoded
from reallm.kernels.e8_points import cheapest_points
from reallm.kernels.e8_stream import on_lattice


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_a_gaussian_source_is_within_0_16_bits_of_shannon_at_stored_bytes(bits):
    weight = drawn(512, 512)
    fmt = EntropyCoded(bits)
    error = relative_error(weight, fmt.decode(fit(fmt, weight), (512, 512)))
    assert fmt.bits_per_weight((512, 512)) <= min(bits, 0.5 * math.log2(1 / error) + 0.16)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("shape", [(64, 200), (20, 300)])
def test_the_stream_fills_99_percent_of_the_budget(shape, classes):
    fmt = EntropyCoded(4.0, classes=classes)
    parts = fit(fmt, drawn(*shape))
    words = len(fmt.coded(parts.codes.numpy())[0])
    assert 0.99 * fmt.words(shape) - 1 <= words <= fmt.words(shape)


def test_error_feedback_lowers_the_error_of_the_outputs_at_the_same_bytes():
    inputs = drawn(1000, 64) @ drawn(64, 64, seed=1)
    weight, fmt = drawn(64, 64, seed=2), EntropyCoded(3.0, largest=31)
    objective = Objective.of_outputs(inputs.T @ inputs / 1000)
    errors = [objective.error(weight, fmt.decode(fit(fmt, weight, goal), (64, 64))) for goal in (None, objective)]
    assert errors[1] < 0.7 * errors[0]


def test_no_weight_is_clipped():
    weight = drawn(64, 64)
    weight[5, 7], weight[40, 1] = 1000, -3000
    fmt = EntropyCoded(3.0, largest=15)
    parts = fit(fmt, weight)
    assert ((weight - fmt.decode(parts, (64, 64))).abs() <= 4 * parts.step).all()


def test_columns_of_other_sizes_gain_from_classes():
    weight = drawn(256, 256) * torch.logspace(-1.5, 0, 256)
    shape, fmts = (256, 256), [EntropyCoded(3.0, classes=classes) for classes in (1, 8)]
    one, eight = (relative_error(weight, fmt.decode(fit(fmt, weight), shape)) for fmt in fmts)
    assert eight < 0.8 * one


def test_points_are_the_cheapest_of_their_lattice():
    target = 3 * drawn(50, 8, 1)
    free, one_class = (torch.zeros(1, 9), torch.zeros(2, 1)), torch.zeros(1, dtype=torch.int64)
    found = cheapest_points(target.view(400, 1), torch.ones(1, 1), *free, one_class).view(50, 8, 1)
    assert on_lattice(found.reshape(-1, 1).long().numpy())
    # The covering radius of E8, here of spacing 2, is 2: no target is farther from its nearest point.
    distances = (found - target).square().sum(1)
    assert (distances <= 4 + 1e-4).all()
    # No neighbour is nearer: 240 points at squared distance 8.
    pairs = torch.tensor([[a, b] for a in range(8) for b in range(a)])
    for signs in ((2, 2), (2, -2), (-2, -2)):
        steps = torch.zeros(len(pairs), 8).scatter(1, pairs, torch.tensor(signs).float().expand(len(pairs), 2))
        near = (found[:, None, :, 0] + steps - target[:, None, :, 0]).square().sum(2)
        assert (near >= distances - 1e-4).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_extreme_sizes_stay_finite(size):
    weight = drawn(16, 64) * size
    fmt = EntropyCoded(4.0, largest=31)
    decoded = fmt.decode(fit(fmt, weight), (16, 64))
    assert torch.isfinite(decoded).all() and relative_error(weight.double(), decoded.double()) <= 1


def test_a_matrix_of_few_weights_keeps_them_and_fills_up_with_zeros():
    weight = torch.zeros(800, 512)
    weight[3, 5], weight[799, 511], weight[400, 7] = 1.0, -0.5, 1e-3
    fmt = EntropyCoded(2.0)
    parts = fit(fmt, weight)
    assert relative_error(weight, fmt.decode(parts, (800, 512))) < 1e-6
    fmt.pack(parts, (800, 512))
