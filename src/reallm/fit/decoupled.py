"""Which columns, rows or entries are worth keeping apart, and their values once the rest is fitted.

Values in 8 or 16 bits are nearly free of rounding errors, so that they can answer for those of the rest: least
squares in closed form for columns, by conjugate gradients for entries, whose places differ from row to row.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reallm.fit.dispatch import decode_unpacked, fit, matrix_shape
from reallm.fit.feedback import importance_in_feedback
from reallm.fit.objective import COMPENSATION_DAMPING, Objective
from reallm.formats import Unpacked
from reallm.formats.decoupled import COLUMNS, ENTRIES, Decoupled, UnpackedDecoupled, remaining_positions

_STEPS = 20


@fit.register
def fit_decoupled(
    fmt: Decoupled, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedDecoupled:
    """Choose what costs most, fit the base to the rest, then the values to what the base left; a `start` keeps places.

    A base without its outliers has finer steps, and where there is a hessian the kept values make up for its errors.
    """
    objective = objective or Objective.plain(weight)
    if isinstance(start, UnpackedDecoupled):
        positions, base_start = start.positions, start.base
    else:
        costs = _costs(fmt, weight, objective, seed)
        positions, base_start = costs.topk(fmt.num_outliers(matrix_shape(weight))).indices.sort().values, None
    if fmt.kind == ENTRIES:
        return _fit_entries(fmt, weight, positions, objective, seed, base_start)
    if fmt.kind == COLUMNS:
        return _fit_columns(fmt, weight, positions, objective, seed, base_start)
    rest = remaining_positions(positions, len(weight))
    base = fit(fmt.base, weight[rest], objective.select_rows(rest), seed, base_start)
    return UnpackedDecoupled(positions, fmt.fake_quantize_values(weight[positions]), base)


def _costs(fmt: Decoupled, weight: Tensor, objective: Objective, seed: int) -> Float[Tensor, " places"]:
    """What every column, row or entry costs while nothing is kept.

    With a hessian, an error costs what is left of it once later columns have answered. For columns the
    errors are taken as alike: a fit that measures them changes the result by 1 %, the plain diagonal in place of
    what is left by 1 to 2 %
    (docs/experiments/outliers-and-scales.md). Entries go by their own size, not by their error: it is the
    large ones that stretch scales.
    """
    left = objective.importance
    if objective.hessian is not None:
        left = left * (importance_in_feedback(objective.hessian, 1) / objective.hessian.diagonal())
    if fmt.kind == ENTRIES:
        largest = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        return ((weight / largest).square() * left).flatten()  # squares of tiny weights would be 0
    if fmt.kind == COLUMNS and objective.hessian is not None:
        return left.mean(0)
    error = weight - decode_unpacked(fmt.base, fit(fmt.base, weight, objective, seed), weight)
    if objective.hessian is not None:
        return ((error @ objective.hessian) * error).sum(1)
    return (error.square() * left).sum(0 if fmt.kind == COLUMNS else 1)


def _fit_columns(
    fmt: Decoupled,
    weight: Tensor,
    positions: Int[Tensor, " kept"],
    objective: Objective,
    seed: int,
    start: Unpacked | None,
) -> UnpackedDecoupled:
    """The base is fitted by what errors cost once the kept columns answer; then these do, as well as they can."""
    rest = remaining_positions(positions, weight.shape[1])
    base = fit(fmt.base, weight[:, rest], objective.schur_complement(positions, rest), seed, start)
    values = weight[:, positions]
    if objective.hessian is not None:
        error = weight[:, rest] - decode_unpacked(fmt.base, base, weight[:, rest])
        values = values + (error.double() @ objective.compensation(positions, rest)).float()
    return UnpackedDecoupled(positions, fmt.fake_quantize_values(values.T), base)


def _fit_entries(
    fmt: Decoupled,
    weight: Tensor,
    positions: Int[Tensor, " kept"],
    objective: Objective,
    seed: int,
    start: Unpacked | None,
) -> UnpackedDecoupled:
    """The base sees zeros in the places of kept entries; methods that tell rows apart know that they cost nothing."""
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[positions] = True
    kept = kept.view_as(weight)
    rest = weight.masked_fill(kept, 0)
    importance = objective.importance.expand_as(weight).masked_fill(kept, 0)
    base = fit(fmt.base, rest, Objective(importance, objective.hessian), seed, start)
    values = weight
    if objective.hessian is not None:
        error = (rest - decode_unpacked(fmt.base, base, weight)).masked_fill(kept, 0)
        values = weight + optimal_compensation(error, kept, objective.hessian)
    return UnpackedDecoupled(positions, fmt.fake_quantize_values(values[kept][:, None]), base)


def optimal_compensation(
    error: Float[Tensor, "out in"], free: Bool[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """What weights that are `free` best add when the others err by `error`, which is 0 where they are free.

    Minimises tr(D H Dᵀ) for D = error - answer, H damped, by conjugate gradients on all rows at once.
    """
    scale = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian = hessian / scale
    hessian = hessian + COMPENSATION_DAMPING * torch.eye(len(hessian), device=hessian.device)
    answer, residual = torch.zeros_like(error), (error @ hessian).masked_fill(~free, 0)
    towards = residual / hessian.diagonal()
    direction, strength = towards, _dot(residual, towards)
    for _ in range(_STEPS):
        image = (direction @ hessian).masked_fill(~free, 0)
        step = _ratio(strength, _dot(direction, image))
        answer, residual = answer + step * direction, residual - step * image
        towards = residual / hessian.diagonal()
        before, strength = strength, _dot(residual, towards)
        direction = towards + _ratio(strength, before) * direction
    return answer


def _dot(first: Tensor, second: Tensor) -> Float[Tensor, "out 1"]:
    return (first * second).sum(1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Float[Tensor, "out 1"]:
    """Rows without free weights, or that have arrived, stay where they are."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
