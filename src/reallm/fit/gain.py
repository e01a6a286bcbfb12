"""Row gains over any base format."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.fit.dispatch import decoded, fit
from reallm.fit.objective import Objective
from reallm.formats import Parts
from reallm.formats.gain import Gain, GainParts


@fit.register
def fit_gain(
    fmt: Gain, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> GainParts:
    """Fit the base to the weight, and to the weight with rows of unit size; keep the better of the two.

    Unit rows suit a base with few scales, the plain weight suits one that weighs rows by their size (a
    low-rank residual). Either way the gain is then the least-squares one.
    """
    objective = objective or Objective.plain(weight)
    sizes = weight.square().mean(1).sqrt()
    unit = torch.where(sizes > 0, sizes, 1.0)
    inner = start.base if isinstance(start, GainParts) else None
    candidates = [_with_row_size(fmt, weight, size, objective, seed, inner) for size in (torch.ones_like(unit), unit)]
    return min(candidates, key=lambda parts: objective.error(weight, decoded(fmt, parts, weight)))


def _with_row_size(
    fmt: Gain, weight: Tensor, size: Tensor, objective: Objective, seed: int, start: Parts | None
) -> GainParts:
    base = fit(fmt.base, weight / size[:, None], objective.with_rows_scaled(size), seed, start)
    approximation = decoded(fmt.base, base, weight)
    # With a hessian errors of a row belong together: feedback has made them cancel in the outputs. Gains that look at
    # every weight apart undo that (3-bit uniform codes lost twice their output error by it;
    # docs/experiments/outliers-and-scales.md).
    costly = approximation * objective.importance
    if objective.hessian is not None:
        costly = approximation @ objective.hessian
    energy = (costly * approximation).sum(1)
    best = (costly * weight).sum(1) / torch.where(energy > 0, energy, 1.0)
    gain = torch.where(energy > 0, best, size)
    return GainParts(gain.to(torch.bfloat16).to(torch.float32), base)
