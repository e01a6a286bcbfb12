"""Triton kernels of `e8_points.py`: one launch where plain torch takes sixty per column of error feedback.

Importable only with Triton, which torch's CUDA builds for Linux install.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.jit import device_guard, jit_kernel

_POINTS = 32  # per program
_PANEL_POINTS = 2  # per program: with 128 columns 2,048 values in registers, and 36 programs for 576 rows


def cheapest(
    targets: Float[Tensor, "rows columns"],
    importance: Float[Tensor, "weighted columns"],
    costs: Float[Tensor, "classes codes"],
    parities: Float[Tensor, "2 classes"],
    classes: Int[Tensor, " columns"],
) -> Float[Tensor, "rows columns"]:
    """Run `e8_points.cheapest_points` on a GPU."""
    rows, columns = targets.shape
    codes = torch.empty_like(targets)
    points = triton.cdiv(rows, 8)
    with device_guard(targets):
        _cheapest_kernel[(triton.cdiv(points, _POINTS), columns)](
            targets,
            importance,
            costs.contiguous(),
            parities.contiguous(),
            classes,
            codes,
            rows,
            *targets.stride(),
            importance.stride(0) if len(importance) > 1 else 0,
            importance.stride(1),
            *codes.stride(),
            parities.shape[1],
            size=costs.shape[1],
            count=_POINTS,
        )
    return codes


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
    """Run `e8_points.points_with_feedback` on a GPU; rows are independent except for the eight of a point."""
    rows, columns = moving.shape
    codes = torch.empty(rows, columns, dtype=torch.int32, device=moving.device)
    compensation = torch.empty_like(moving)
    with device_guard(moving):
        _feedback_kernel[(triton.cdiv(rows, 8 * _PANEL_POINTS),)](
            moving.contiguous(),
            factor.contiguous(),
            importance.contiguous(),
            costs.contiguous(),
            parities.contiguous(),
            classes.contiguous(),
            codes,
            compensation,
            rows,
            parities.shape[1],
            step,
            limit,
            columns=columns,
            size=costs.shape[1],
            count=_PANEL_POINTS,
            width=triton.next_power_of_2(columns),
        )
    return codes, compensation


@jit_kernel
def _feedback_kernel(
    moving,
    factor,
    importance,
    costs,
    parities,
    classes,
    codes,
    compensation,
    rows,
    class_count,
    step,
    limit,
    columns: tl.constexpr,
    size: tl.constexpr,
    count: tl.constexpr,
    width: tl.constexpr,
):
    largest: tl.constexpr = size // 2
    row = tl.program_id(0) * count * 8 + tl.arange(0, count * 8)
    point = tl.program_id(0) * count + tl.arange(0, count)[:, None]
    in_bounds = row < rows
    column = tl.arange(0, width)
    # The panel stays in registers; a masked sum extracts a column.
    places = row[:, None] * columns + column[None, :]
    panel = tl.load(moving + places, in_bounds[:, None] & (column < columns)[None, :], 0.0)
    for now in range(columns):
        value = tl.sum(tl.where((column == now)[None, :], panel, 0.0), 1)
        target = tl.minimum(tl.maximum(value / step, -limit), limit)
        code = _point(
            tl.reshape(target, [count, 8]),
            tl.load(importance + now),
            costs,
            parities,
            tl.load(classes + now),
            (point + 1) * 8 <= rows,
            class_count,
            size,
            largest,
        )
        code = tl.reshape(code, [count * 8])
        scaled_error = (value - code * step) / tl.load(factor + now * columns + now)
        later = tl.load(factor + now * columns + column, (column > now) & (column < columns), 0.0)
        panel -= scaled_error[:, None] * later[None, :]
        tl.store(codes + row * columns + now, code.to(tl.int32), in_bounds)
        tl.store(compensation + row * columns + now, scaled_error, in_bounds)


@jit_kernel
def _cheapest_kernel(
    targets,
    importance,
    costs,
    parities,
    classes,
    codes,
    rows,
    target_row,
    target_column,
    weight_row,
    weight_column,
    code_row,
    code_column,
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
    in_bounds = row < rows
    target = tl.load(targets + row * target_row + column * target_column, in_bounds, 0.0)
    weight = tl.load(importance + row * weight_row + column * weight_column, in_bounds, 0.0)

    whole = (point + 1) * 8 <= rows
    code = _point(target, weight, costs, parities, own_class, whole, class_count, size, largest)
    tl.store(codes + row * code_row + column * code_column, code, in_bounds)


@jit_kernel
def _point(target, weight, costs, parities, own_class, whole, class_count, size: tl.constexpr, largest: tl.constexpr):
    """Return codes of (points, 8) targets. Remaining rows form no point: each takes its cheaper even code."""
    own_costs = costs + own_class * size
    place = tl.arange(0, 8)[None, :]
    even, even_total, even_rest = _cheapest_parity(target, weight, own_costs, place, 0, largest)
    odd, odd_total, _ = _cheapest_parity(target, weight, own_costs, place, 1, largest)
    even_total += tl.load(parities + own_class)
    odd_total += tl.load(parities + class_count + own_class)
    code = tl.where((odd_total < even_total)[:, None], odd, even)
    return tl.where(whole, code, even_rest)


@jit_kernel
def _cheapest_parity(target, weight, costs, place, parity: tl.constexpr, largest: tl.constexpr):
    """Return (codes, costs of the points, codes that ignore the sum) of the cheapest points of a parity."""
    low, low_cost = _cheapest_residue(target, weight, costs, parity, largest)
    high, high_cost = _cheapest_residue(target, weight, costs, parity + 2, largest)
    gap = high_cost - low_cost
    upper = gap < 0
    loss = tl.abs(gap)
    odd = tl.sum(upper.to(tl.int32), 1) % 2 == 1
    flipped = (place == tl.argmin(loss, 1)[:, None]) & odd[:, None]
    codes = tl.where(upper ^ flipped, high, low)
    total = tl.sum(tl.minimum(low_cost, high_cost), 1) + tl.where(odd, tl.min(loss, 1), 0.0)
    return codes, total, tl.where(upper, high, low)


@jit_kernel
def _cheapest_residue(target, weight, costs, residue: tl.constexpr, largest: tl.constexpr):
    """Return the cheaper of the two codes of a residue modulo 4 around the target, and its cost."""
    below = tl.floor((target - residue) / 4) * 4 + residue
    lower = _cost(below, target, weight, costs, largest)
    higher = _cost(below + 4, target, weight, costs, largest)
    return tl.where(higher < lower, below + 4, below), tl.minimum(lower, higher)


@jit_kernel
def _cost(code, target, weight, costs, largest: tl.constexpr):
    place = tl.minimum(tl.maximum(code, -largest), largest).to(tl.int32) + largest
    return tl.load(costs + place) + weight * (code - target) * (code - target)
