"""Whether neighbours are alike: autocorrelation, and what it would save."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.kernels import average, total

_LAGS = 16


@dataclass(frozen=True)
class Autocorrelation:
    """Correlation of neighbours and its standard error if they were independent."""

    value: float
    error: float


def autocorrelation(weight: Float[Tensor, "out in"]) -> Autocorrelation:
    """Lag 1 along the rows: Σ w_ij w_i,j+1 / Σ w², the mean of all weights taken off. Transpose for columns.

    The error is √Σ (w_ij w_i,j+1)² / Σ w²: it holds for heavy tails and unequal scales too, where 1/√weights is too
    small.
    """
    moved = _center(weight)
    products = moved[:, 1:] * moved[:, :-1]
    energy = total(moved.square()).item()
    if energy == 0:
        return Autocorrelation(0.0, 0.0)
    return Autocorrelation(total(products).item() / energy, total(products.square()).sqrt().item() / energy)


def magnitudes(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|w| with every row divided by its mean: what of sizes differs along a row, whatever the row's own size is."""
    sizes = weight.abs()
    mean = sizes.mean(1, keepdim=True)
    return sizes / torch.where(mean > 0, mean, 1.0)


def predictable_bits(weight: Float[Tensor, "out in"]) -> float:
    """Bits per weight that the best linear prediction from the 16 weights before it in the row saves at most.

    ½ log2 of the variance over that of the prediction's error (Yule-Walker). Positive by chance too: about
    0.7 · 16 / weights for noise.
    """
    moved = _center(weight)
    lags = min(_LAGS, weight.shape[1] - 1)
    sums = [total(moved[:, lag:] * moved[:, : moved.shape[1] - lag]) for lag in range(lags + 1)]
    covariances = torch.stack(sums)
    if lags == 0 or covariances[0] == 0:
        return 0.0
    places = torch.arange(lags, device=weight.device)
    matrix = covariances[(places[:, None] - places).abs()]
    # Rows that are exact multiples of a curve would make it singular.
    matrix.diagonal().add_(1e-9 * covariances[0])
    explained = covariances[1:] @ torch.linalg.solve(matrix, covariances[1:])
    left = (1 - explained / covariances[0]).clamp(min=1e-9)
    return max(0.0, -left.log2().item() / 2)


def _center(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    values = weight.double()
    largest = values.abs().max()
    values = values / torch.where(largest > 0, largest, 1.0)
    return values - average(values)
