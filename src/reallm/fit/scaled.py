"""Scales of rows and columns that bring all of them to one size, and the scaled format fitted behind them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.fit.rounding import divisors
from reallm.formats import Parts
from reallm.formats import scales as scale_store
from reallm.formats.scaled import BOTH, Scaled, ScaledParts
from reallm.kernels import average

_ROUNDS = 10
# A row or column that is (nearly) zero counts as one of a thousandth of the mean energy.
_LEAST_ENERGY = 1e-3
# The smallest of 255 companded steps: nothing that is not zero may become zero by its scale.
_LEAST_SCALE = 1.5 / 255**2


@fit.register
def fit_scaled(
    fmt: Scaled, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> ScaledParts:
    """Balance, then fit the base to the balanced matrix by the objective seen from there.

    A code of one rate loses a share of the mean square of what it codes, and error feedback the mean of what the
    columns cost once the others have answered. Scaling columns leaves the product of all these as it is, so
    that the best scales make the columns equal.
    """
    objective = objective or Objective.plain(weight)
    rows, columns = balancing_scales(weight, both=fmt.sides == BOTH)
    rows, columns = (scale_store.stored(fmt.scales, scales) for scales in (rows, columns))
    inner = objective.with_columns_scaled(columns[0])
    balanced = weight / divisors(columns)
    if fmt.sides == BOTH:
        # Only ratios matter; squares of tiny ones would be 0.
        inner = inner.with_rows_scaled(rows[:, 0] / divisors(rows.amax(0, keepdim=True))[0])
        balanced = balanced / divisors(rows)
    base = fit(fmt.base, balanced, inner, seed, start.base if isinstance(start, ScaledParts) else None)
    return ScaledParts(rows if fmt.sides == BOTH else None, columns, base)


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
