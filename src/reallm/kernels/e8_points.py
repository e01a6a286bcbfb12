"""Rate-distortion search for points of E8: squared distance plus the cost of storing each code."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.backend import has_triton
from reallm.kernels.e8_stream import DIM


def cheapest_points(
    targets: Float[Tensor, "rows columns"],
    importance: Float[Tensor, "weighted columns"],
    costs: Float[Tensor, "classes codes"],
    parities: Float[Tensor, "2 classes"],
    classes: Int[Tensor, " columns"],
) -> Float[Tensor, "rows columns"]:
    """Return codes of low Σ importance · (code - target)² + cost; eight consecutive rows of a column form a point.

    `costs` covers the codes -largest … largest; larger ones cost as much as the outermost. Each point also costs
    `parities[its parity, class]`. `classes` gives the class of each column. `importance` has one row for all rows, or
    one per row. Remaining rows (fewer than 8) take even codes.
    """
    return _cheapest_implementation(targets.device.type)(targets, importance, costs, parities, classes)


def points_with_feedback(
    moving: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    importance: Float[Tensor, " columns"],
    costs: Float[Tensor, "classes codes"],
    parities: Float[Tensor, "2 classes"],
    classes: Int[Tensor, " columns"],
    step: float,
    limit: int,
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Round column by column with error feedback; return (codes, errors / diagonal of `factor`).

    After column j is rounded, the later columns change by -(error / factor[j, j]) · factor[j]. Targets are
    moving / step, clamped to ±limit; other arguments as in `cheapest_points`. Requires Triton (`has_triton`).
    """
    kernels = importlib.import_module("reallm.kernels.e8_points_triton")
    return kernels.points_with_feedback(moving, factor, importance, costs, parities, classes, step, limit)


@functools.cache
def _cheapest_implementation(device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the Triton kernel on a GPU with Triton, otherwise `_cheapest`."""
    if has_triton(device):
        return importlib.import_module("reallm.kernels.e8_points_triton").cheapest
    return _cheapest


def _cheapest(targets: Tensor, importance: Tensor, costs: Tensor, parities: Tensor, classes: Tensor) -> Tensor:
    whole = len(targets) // DIM * DIM
    # The best code of each residue modulo 4: whether codes form a lattice point depends on their residues alone.
    residues = torch.arange(4, device=targets.device, dtype=targets.dtype)[:, None, None]
    below = ((targets - residues) / 4).floor() * 4 + residues
    lower, higher = (_cost(codes, targets, importance, costs, classes) for codes in (below, below + 4))
    codes, least = torch.where(higher < lower, below + 4, below), torch.minimum(lower, higher)
    remaining = torch.where(least[2, whole:] < least[0, whole:], codes[2, whole:], codes[0, whole:])
    if not whole:
        return remaining
    blocks = (4, whole // DIM, DIM, targets.shape[1])
    points = _points(codes[:, :whole].view(blocks), least[:, :whole].view(blocks), parities[:, classes])
    return torch.cat([points.reshape(whole, -1), remaining])


def _cost(codes: Tensor, targets: Tensor, importance: Tensor, costs: Tensor, classes: Tensor) -> Tensor:
    largest = costs.shape[1] // 2
    place = codes.clamp(-largest, largest).long() + largest + classes * costs.shape[1]
    return torch.addcmul(costs.view(-1)[place], importance, (codes - targets).square())


def _points(
    codes: Float[Tensor, "4 blocks 8 columns"],
    costs: Float[Tensor, "4 blocks 8 columns"],
    parities: Float[Tensor, "2 columns"],
) -> Float[Tensor, "blocks 8 columns"]:
    """Return the cheapest point of E8 for each block, given the cheapest code of each residue modulo 4.

    Codes of a point are all even or all odd, and an even number of them has the upper of the two residues. If that
    number is odd, the code with the smallest loss takes its other residue (Conway and Sloane's decoding of D8).
    """
    found, totals = [], []
    for parity in range(2):
        gap = costs[parity + 2] - costs[parity]
        upper = gap < 0
        least, place = gap.abs().min(1, keepdim=True)
        odd = upper.sum(1, keepdim=True) % 2 == 1
        upper = upper.scatter(1, place, upper.gather(1, place) ^ odd)
        found.append(torch.where(upper, codes[parity + 2], codes[parity]))
        best = torch.minimum(costs[parity], costs[parity + 2]).sum(1, keepdim=True)
        totals.append(best + least * odd + parities[parity])
    return torch.where(totals[1] < totals[0], found[1], found[0])
