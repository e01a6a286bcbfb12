"""Row gains over any base format."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.fit.dispatch import decode_unpacked, fit
from reallm.fit.objective import Objective
from reallm.formats import Unpacked
from reallm.formats.gain import Gain, UnpackedGain


@fit.register
def fit_gain(
    fmt: Gain, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedGain:
    """Fit the base to the weight, and to the weight with rows of unit size; keep the better of the two.

    Unit rows suit a base with few scales, the plain weight suits one that weighs rows by their size (a
    low-rank residual). Either way the gain is then the least-squares one.
    """
    objective = objective or Objective.plain(weight)
    sizes = weight.square().mean(1).sqrt()
    unit = torch.where(sizes > 0, sizes, 1.0)
    inner = start.base if isinstance(start, UnpackedGain) else None
    candidates = [_fit_scaled_rows(fmt, weight, size, objective, seed, inner) for size in (torch.ones_like(unit), unit)]
    return min(candidates, key=lambda unpacked: objective.error(weight, decode_unpacked(fmt, unpacked, weight)))


def _fit_scaled_rows(
    fmt: Gain, weight: Tensor, size: Tensor, objective: Objective, seed: int, start: Unpacked | None
) -> UnpackedGain:
    base = fit(fmt.base, weight / size[:, None], objective.divide_rows(size), seed, start)
    approximation = decode_unpacked(fmt.base, base, weight)
    # With a hessian errors of a row belong together: feedback has made them cancel in the outputs. Gains that look at
    # every weight apart undo that (3-bit uniform codes lost twice their output error by it;
    # docs/experiments/outliers-and-scales.md).
    costly = approximation * objective.importance
    if objective.hessian is not None:
        costly = approximation @ objective.hessian
    energy = (costly * approximation).sum(1)
    best = (costly * weight).sum(1) / torch.where(energy > 0, energy, 1.0)
    gain = torch.where(energy > 0, best, size)
    return UnpackedGain(gain.to(torch.bfloat16).to(torch.float32), base)
