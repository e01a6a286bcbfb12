"""Scales of rows and columns that bring all of them to one size, and the scaled format fitted behind them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.fit.rounding import divisors
from reallm.formats import Unpacked
from reallm.formats import scales as scale_store
from reallm.formats.scaled import BOTH, INPUTS, Scaled, UnpackedScaled
from reallm.kernels import average

_ROUNDS = 10
# A row or column that is (nearly) zero counts as one of a thousandth of the mean energy.
_LEAST_ENERGY = 1e-3
# The smallest of 255 companded steps: nothing that is not zero may become zero by its scale.
_LEAST_SCALE = 1.5 / 255**2


@fit.register
def fit_scaled(
    fmt: Scaled, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedScaled:
    """Balance, then fit the base to the balanced matrix by the objective seen from there.

    A code of one rate loses a share of the mean square of what it codes, and error feedback the mean of what the
    columns cost once the others have answered. Scaling columns leaves the product of all these as it is, so
    that the best scales make the columns equal. Rows answer for nobody: their best scales are another matter
    (`moving_scales`), and need to know what errors of rows cost.
    """
    objective = objective or Objective.plain(weight)
    rows, columns = axis_scales(weight, objective.rows, fmt.sides)
    rows, columns = (None if s is None else scale_store.fake_quantize(fmt.scales, s) for s in (rows, columns))
    inner, balanced = objective, weight
    if columns is not None:
        inner, balanced = inner.divide_columns(columns[0]), balanced / divisors(columns)
    if rows is not None:
        # Only ratios matter; squares of tiny ones would be 0.
        inner = inner.divide_rows(rows[:, 0] / divisors(rows.amax(0, keepdim=True))[0])
        balanced = balanced / divisors(rows)
    base = fit(fmt.base, balanced, inner, seed, start.base if isinstance(start, UnpackedScaled) else None)
    return UnpackedScaled(rows, columns, base)


def axis_scales(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, " out"] | None, sides: str
) -> tuple[Float[Tensor, "out 1"] | None, Float[Tensor, "1 in"] | None]:
    """(rows, columns) that a matrix is divided by; None for a side that is not asked for.

    `importance`: what an error of each row costs. Without it both sides are brought to one size.
    """
    if sides == INPUTS:
        return None, balancing_scales(weight, both=False)[1]
    if importance is None and sides == BOTH:
        return balancing_scales(weight)
    importance = torch.ones_like(weight[:, 0]) if importance is None else importance
    columns = balancing_scales(weight, both=False)[1]
    rows = moving_scales(weight / (columns if sides == BOTH else 1), importance)
    return rows, columns if sides == BOTH else None


def moving_scales(weight: Float[Tensor, "out in"], importance: Float[Tensor, " out"]) -> Float[Tensor, "out 1"]:
    """Scales of rows that leave the least Σ importance_i · error of row i, for a code with one error for all rows.

    Of rows divided by r that error is in proportion to Σ r_i² importance_i · Σ energy_i / r_i², which is least for
    r⁴ = energy / importance (Cauchy-Schwarz): a row that matters is written large. As large as the weights.
    """
    largest = divisors(weight.abs().amax((0, 1), keepdim=True))
    unit = weight / largest
    sizes = _sizes(unit, 1)[:, 0]
    floor = average(importance) * _LEAST_ENERGY + torch.finfo(torch.float32).tiny
    scales = (sizes.square() / (importance + floor)).pow(0.25)
    # The row of which an error costs most must not become nothing, nor drown all others.
    scales = scales / scales.max()
    return scales.clamp(min=_LEAST_SCALE)[:, None] * largest


def moving_gain(weight: Float[Tensor, "out in"], known: Float[Tensor, " out"], cost: Float[Tensor, " out"]) -> float:
    """Loss with `moving_scales` by `known` / loss without them, where errors of rows cost `cost`."""
    scales = moving_scales(weight, known)[:, 0]
    scales = scales / average(scales)
    energy = weight.square().mean(1)
    before = cost.sum() * energy.sum()
    after = (cost * scales.square()).sum() * (energy / scales.square()).sum()
    return (after / before.clamp(min=torch.finfo(torch.float32).tiny)).item()


def balancing_scales(
    weight: Float[Tensor, "out in"], both: bool = True
) -> tuple[Float[Tensor, "out 1"], Float[Tensor, "1 in"]]:
    """(rows, columns) such that weight / rows / columns has columns, and with `both` rows, of equal mean square.

    The scales of columns have a mean square of 1. Rows are 1 unless `both`.
    """
    largest = divisors(weight.abs().amax((0, 1), keepdim=True))
    unit = weight / largest  # squares of tiny weights would be 0
    rows, columns = torch.ones_like(unit[:, :1]), torch.ones_like(unit[:1])
    for _ in range(_ROUNDS if both else 1):
        if both:
            rows = _sizes(unit / columns, 1)
        columns = _sizes(unit / rows, 0)
    mean = average(columns.square()).sqrt()
    return (rows * mean * largest if both else rows), columns / mean


def _sizes(matrix: Float[Tensor, "out in"], dim: int) -> Float[Tensor, "rows columns"]:
    """Root mean squares along `dim`, none of them 0."""
    energy = matrix.square().mean(dim, keepdim=True)
    if not energy.any():
        return torch.ones_like(energy)
    sizes = (energy + average(energy) * _LEAST_ENERGY).sqrt()
    return sizes.clamp(min=sizes.max() * _LEAST_SCALE)
