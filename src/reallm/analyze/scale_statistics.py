"""How unequal rows and columns are, what is left beside that, and noise that is as unequal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.scaled import balancing_scales
from reallm.kernels import average


@dataclass(frozen=True)
class ScaleBits:
    """Bits per weight that a code gains at most when it knows the scale of every row and of every column.

    ½ log2 of the arithmetic over the geometric mean of the variances: at one error for all weights, small ones need so
    many bits fewer. Variances are products of a row's and a column's, so that the worth of both is the sum. The scales'
    own bytes are not taken off.
    """

    rows: float
    columns: float

    @property
    def both(self) -> float:
        """Bits per weight for rows and columns together."""
        return self.rows + self.columns


def scale_bits(weight: Float[Tensor, "out in"]) -> ScaleBits:
    """Worth of the scales. Of independent noise it is not quite 0: 0.7 / in for rows and 0.7 / out for columns."""
    rows, columns = balancing_scales(weight)
    return ScaleBits(_worth(rows), _worth(columns))


def remove_scales(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The matrix with all rows and all columns brought to one size."""
    rows, columns = balancing_scales(weight)
    return weight / rows / columns


def noise_like(weight: Float[Tensor, "out in"], seed: int = 0) -> Float[Tensor, "out in"]:
    """Independent normal numbers with the scales of the rows and columns of `weight`."""
    rows, columns = balancing_scales(weight)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(weight) * rows * columns


def kurtosis(weight: Float[Tensor, "out in"]) -> float:
    """Fourth moment over the square of the second, about 0: 3 for normal numbers, ± √(24 / weights)."""
    squares = (weight / weight.abs().max()).double().square()  # fourth powers of tiny weights would be 0
    return (average(squares.square()) / average(squares).square()).item()


def _worth(scales: Float[Tensor, "rows columns"]) -> float:
    variances = scales.double().square()
    return max(0.0, (average(variances).log2() - average(variances.log2())).item() / 2)
