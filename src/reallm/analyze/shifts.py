"""What a shift would take away: one number added to a matrix, to each of its rows, or to each of its columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

_BITS = 16  # a stored shift is a float16


@dataclass(frozen=True)
class Shift:
    """The best shift of one kind.

    `share` of the energy is what it takes away; independent numbers lose shifts / weights of theirs by chance. `bits`:
    what it saves a weight, its own bytes taken off: the same error needs -½ log2(1 - share) bits less for the rest.
    """

    share: float
    bits: float


@dataclass(frozen=True)
class Shifts:
    """Of the whole matrix, of every row, of every column. All three are terms of rank one."""

    matrix: Shift
    rows: Shift
    columns: Shift


def shifts(weight: Float[Tensor, "out in"]) -> Shifts:
    """What shifts are worth to a matrix that is not all zero; the best of a group of weights is their mean."""
    values = (weight / weight.abs().max()).double()  # squares of tiny weights would be 0
    energy = values.square().sum()

    def shift(means: Tensor, weights_each: int) -> Shift:
        # A matrix that is all shift, up to rounding, would save endlessly many bits: float16 keeps 2^-11 of each.
        share = min((means.square().sum() * weights_each / energy).item(), 1 - 2.0**-22)
        return Shift(share, -math.log2(1 - share) / 2 - _BITS * means.numel() / values.numel())

    return Shifts(
        matrix=shift(values.mean(), values.numel()),
        rows=shift(values.mean(1), values.shape[1]),
        columns=shift(values.mean(0), values.shape[0]),
    )
