"""The cheapest points of E8, each code charged by its squared distance and by what it costs to store."""

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
    """Codes of small Σ importance · (code - target)² + cost: eight neighbouring rows of a column are a point.

    `costs` has the codes from -largest to largest; what is beyond pays as they do. A point also pays `parities` by
    its own parity. `classes` says whose costs a column has. `importance` has one row for all rows, or one for each.
    Rows left over take even codes.
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
    """(codes, errors / diagonal of `factor`), column by column: later ones move by -(error / diagonal) · their row.

    Targets are moving / step, at most `limit` in size; the rest as in `cheapest_points`. Only where `has_triton`.
    """
    kernels = importlib.import_module("reallm.kernels.e8_points_triton")
    return kernels.points_with_feedback(moving, factor, importance, costs, parities, classes, step, limit)


@functools.cache
def _cheapest_implementation(device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The Triton kernel on a GPU where there is Triton, else `_cheapest`."""
    if has_triton(device):
        return importlib.import_module("reallm.kernels.e8_points_triton").cheapest
    return _cheapest


def _cheapest(targets: Tensor, importance: Tensor, costs: Tensor, parities: Tensor, classes: Tensor) -> Tensor:
    whole = len(targets) // DIM * DIM
    # The best code of every residue modulo 4: the lattice asks for residues alone.
    residues = torch.arange(4, device=targets.device, dtype=targets.dtype)[:, None, None]
    below = ((targets - residues) / 4).floor() * 4 + residues
    lower, higher = (_cost(codes, targets, importance, costs, classes) for codes in (below, below + 4))
    codes, least = torch.where(higher < lower, below + 4, below), torch.minimum(lower, higher)
    rest = torch.where(least[2, whole:] < least[0, whole:], codes[2, whole:], codes[0, whole:])
    if not whole:
        return rest
    blocks = (4, whole // DIM, DIM, targets.shape[1])
    points = _points(codes[:, :whole].view(blocks), least[:, :whole].view(blocks), parities[:, classes])
    return torch.cat([points.reshape(whole, -1), rest])


def _cost(codes: Tensor, targets: Tensor, importance: Tensor, costs: Tensor, classes: Tensor) -> Tensor:
    largest = costs.shape[1] // 2
    place = codes.clamp(-largest, largest).long() + largest + classes * costs.shape[1]
    return torch.addcmul(costs.view(-1)[place], importance, (codes - targets).square())


def _points(
    codes: Float[Tensor, "4 blocks 8 columns"],
    costs: Float[Tensor, "4 blocks 8 columns"],
    parities: Float[Tensor, "2 columns"],
) -> Float[Tensor, "blocks 8 columns"]:
    """The cheapest point of E8 for each block, from the cheapest code of each residue modulo 4.

    Codes are all even or all odd, and then the number of those with the upper of the two residues is even: if it
    comes out odd, the code that loses least takes its other residue (Conway and Sloane's decoding of D8).
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
