"""The rotated format: fit the base to the transformed matrix, by the transformed objective."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.formats import Unpacked
from reallm.formats.rotated import Rotated, UnpackedRotated


@fit.register
def fit_rotated(
    fmt: Rotated, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedRotated:
    """tr(D H Dᵀ) is the same for the turned error and the turned hessian: outputs may be turned freely."""
    if objective is not None and fmt.sides != "outputs":
        objective = objective.rotate(fmt.rotate_inputs)
    if objective is not None and fmt.sides != "inputs":
        objective = dataclasses.replace(objective, rows=None)  # every turned row is made of all
    base = start.base if isinstance(start, UnpackedRotated) else None
    return UnpackedRotated(fit(fmt.base, fmt.rotate_weight(weight).contiguous(), objective, seed, base))
