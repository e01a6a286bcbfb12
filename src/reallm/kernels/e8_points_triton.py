"""`cheapest_points` in one launch, for GPUs: error feedback rounds column by column, and each took sixty launches.

Importable only where Triton is: torch brings it with its CUDA builds for Linux.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.jit import compiled

_POINTS = 32  # of a program


def cheapest(
    targets: Float[Tensor, "rows columns"],
    importance: Float[Tensor, "weighted columns"],
    costs: Float[Tensor, "classes codes"],
    parities: Float[Tensor, "2 classes"],
    classes: Int[Tensor, " columns"],
) -> Float[Tensor, "rows columns"]:
    """As `e8_points.cheapest_points`."""
    rows, columns = targets.shape
    found = torch.empty_like(targets)
    points = triton.cdiv(rows, 8)
    with torch.cuda.device(targets.device) if targets.is_cuda else contextlib.nullcontext():
        _cheapest[(triton.cdiv(points, _POINTS), columns)](
            targets,
            importance,
            costs.contiguous(),
            parities.contiguous(),
            classes,
            found,
            rows,
            *targets.stride(),
            importance.stride(0) if len(importance) > 1 else 0,
            importance.stride(1),
            *found.stride(),
            parities.shape[1],
            size=costs.shape[1],
            count=_POINTS,
        )
    return found


@compiled
def _cheapest(
    targets,
    importance,
    costs,
    parities,
    classes,
    found,
    rows,
    target_row,
    target_column,
    weight_row,
    weight_column,
    found_row,
    found_column,
    class_count,
    size: tl.constexpr,
    count: tl.constexpr,
):
    largest: tl.constexpr = size // 2
    column = tl.program_id(1)
    own_class = tl.load(classes + column)
    point = tl.program_id(0) * count + tl.arange(0, count)[:, None]
    place = tl.arange(0, 8)[None, :]
    row = point * 8 + place
    there = row < rows
    target = tl.load(targets + row * target_row + column * target_column, there, 0.0)
    weight = tl.load(importance + row * weight_row + column * weight_column, there, 0.0)

    own_costs = costs + own_class * size
    even, even_total, even_rest = _of_parity(target, weight, own_costs, place, 0, largest)
    odd, odd_total, _ = _of_parity(target, weight, own_costs, place, 1, largest)
    even_total += tl.load(parities + own_class)
    odd_total += tl.load(parities + class_count + own_class)
    code = tl.where((odd_total < even_total)[:, None], odd, even)
    # Rows left over are no point: each takes its cheaper even code.
    code = tl.where((point + 1) * 8 <= rows, code, even_rest)
    tl.store(found + row * found_row + column * found_column, code, there)


@compiled
def _of_parity(target, weight, costs, place, parity: tl.constexpr, largest: tl.constexpr):
    """(codes, costs of the points, codes that ignore the sum) of the cheapest points of a parity."""
    low, low_cost = _of_residue(target, weight, costs, parity, largest)
    high, high_cost = _of_residue(target, weight, costs, parity + 2, largest)
    gap = high_cost - low_cost
    upper = gap < 0
    loss = tl.abs(gap)
    odd = tl.sum(upper.to(tl.int32), 1) % 2 == 1
    turned = (place == tl.argmin(loss, 1)[:, None]) & odd[:, None]
    codes = tl.where(upper ^ turned, high, low)
    total = tl.sum(tl.minimum(low_cost, high_cost), 1) + tl.where(odd, tl.min(loss, 1), 0.0)
    return codes, total, tl.where(upper, high, low)


@compiled
def _of_residue(target, weight, costs, residue: tl.constexpr, largest: tl.constexpr):
    """The cheaper of the two codes of a residue modulo 4 around the target, and its cost."""
    below = tl.floor((target - residue) / 4) * 4 + residue
    lower = _cost(below, target, weight, costs, largest)
    higher = _cost(below + 4, target, weight, costs, largest)
    return tl.where(higher < lower, below + 4, below), tl.minimum(lower, higher)


@compiled
def _cost(code, target, weight, costs, largest: tl.constexpr):
    place = tl.minimum(tl.maximum(code, -largest), largest).to(tl.int32) + largest
    return tl.load(costs + place) + weight * (code - target) * (code - target)
