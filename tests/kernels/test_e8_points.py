"""The cheapest points of E8: on the lattice, none cheaper nearby, and the Triton kernel against the plain code.

TRITON_INTERPRET=1 pytest tests/kernels/test_e8_points.py
"""

import importlib.util
import itertools
import os

import pytest
import torch

from reallm.kernels.e8_points import _cheapest, cheapest_points
from reallm.kernels.e8_stream import are_lattice_points

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or not (INTERPRETED or torch.cuda.is_available()),
    reason="no GPU and no interpreter",
)
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def case(rows, columns, one_row=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = 3 * torch.randn(rows, columns, generator=generator)
    importance = torch.rand(1 if one_row else rows, columns, generator=generator) + 0.5
    costs, parities = torch.rand(2, 7, generator=generator), torch.rand(2, 2, generator=generator)
    return targets, importance, costs, parities, torch.arange(columns) % 2


def total(codes, targets, importance, costs, parities, classes):
    place = codes.clamp(-3, 3).long() + 3
    own = torch.stack([costs[c][place[:, i]] for i, c in enumerate(classes)], 1)
    by_code = own + importance * (codes - targets).square()
    by_point = parities[codes.view(-1, 8, codes.shape[1])[:, 0].long() % 2, classes]
    return by_code.view(-1, 8, codes.shape[1]).sum(1) + by_point


def test_points_lie_on_the_lattice_rows_left_over_too():
    assert are_lattice_points(cheapest_points(*case(27, 5)).int().numpy())


def test_no_neighbouring_point_is_cheaper():
    problem = case(8, 4)
    codes = cheapest_points(*problem)
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((-2, 2), repeat=2):
            other = codes.clone()
            other[i] += a
            other[j] += b
            assert (total(other, *problem) >= total(codes, *problem) - 1e-5).all()


@needs_triton
@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("shape", [(8, 1), (27, 5), (264, 3)])
def test_the_kernel_finds_the_same_points(shape, one_row):
    from reallm.kernels.e8_points_triton import cheapest

    problem = [t.to(DEVICE) for t in case(*shape, one_row)]
    assert torch.equal(cheapest(*problem), _cheapest(*problem))


@needs_triton
def test_the_kernel_reads_columns_of_a_wider_matrix():
    from reallm.kernels.e8_points_triton import cheapest

    targets, importance, costs, parities, classes = (t.to(DEVICE) for t in case(16, 6))
    found = cheapest(targets[:, 2:4], importance[:, 2:4], costs, parities, classes[2:4])
    assert torch.equal(found, _cheapest(targets, importance, costs, parities, classes)[:, 2:4])


@needs_triton
@pytest.mark.parametrize("shape", [(16, 8), (27, 5), (40, 12)])
def test_a_panel_with_feedback_is_that_of_its_columns_one_after_another(shape):
    from reallm.kernels.e8_points_triton import points_with_feedback

    targets, importance, costs, parities, classes = (t.to(DEVICE) for t in case(*shape))
    generator = torch.Generator().manual_seed(1)
    factor = torch.triu(0.3 * torch.randn(shape[1], shape[1], generator=generator), 1).to(DEVICE)
    factor += torch.diag(0.5 + torch.rand(shape[1], generator=generator).to(DEVICE))
    codes, compensation = points_with_feedback(targets, factor, importance[0], costs, parities, classes, 0.75, 6)
    moving = targets.clone()
    for j in range(shape[1]):
        now = slice(j, j + 1)
        expected = _cheapest((moving[:, now] / 0.75).clamp(-6, 6), importance[:, now], costs, parities, classes[now])
        assert torch.equal(codes[:, now], expected.int())
        scaled_error = (moving[:, now] - 0.75 * expected) / factor[j, j]
        torch.testing.assert_close(compensation[:, now], scaled_error)
        moving[:, j + 1 :] -= scaled_error @ factor[now, j + 1 :]
