"""Singular values beside those of noise, and what a low-rank residual would be worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reallm.formats import Shape
from reallm.formats.dense import Dense
from reallm.formats.low_rank_plus import INT8, LowRankPlus
from reallm.kernels import one_thread

TOP = 16  # the leading 1/16 of the singular values is what is called the top
CURVE_POINTS = 65
_SAMPLES = 4096
# What int8 leaves of a product of two factors of normal numbers: 2 · (3.5/127)² / 12 of its energy.
_FACTOR_ERROR = 1.3e-4


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of a matrix, of Gaussian noise with the same scales, and of plain noise in theory.

    Shares are of the whole energy. `above_noise`: how many singular values exceed the largest one of the noise.
    `rank_bits`: what the best low-rank residual with int8 factors saves a weight, its own bytes taken off: the same
    error needs -½ log2(1 - share) bits less for the rest. Curves are squared singular values relative to their
    mean, from the largest to the smallest, at `CURVE_POINTS` evenly spread ranks.
    """

    top_share: float
    noise_top_share: float
    marchenko_pastur_top_share: float
    above_noise: int
    share_above_noise: float
    best_rank: int
    rank_bits: float
    curve: list[float]
    noise_curve: list[float]
    marchenko_pastur_curve: list[float]


def spectrum(weight: Float[Tensor, "out in"], noise: Float[Tensor, "out in"]) -> Spectrum:
    """Compare a matrix with noise of the same shape (`noise_like`)."""
    own, other, theory = energies(weight), energies(noise), marchenko_pastur((weight.shape[0], weight.shape[1]))
    # Both have the same energy but for chance: shares are compared.
    above = int((own > other[0]).sum())
    rank, bits = best_rank(own, (weight.shape[0], weight.shape[1]))
    return Spectrum(
        top_share=top_share(own),
        noise_top_share=top_share(other),
        marchenko_pastur_top_share=top_share(theory),
        above_noise=above,
        share_above_noise=own[:above].sum().item(),
        best_rank=rank,
        rank_bits=bits,
        curve=_curve(own),
        noise_curve=_curve(other),
        marchenko_pastur_curve=_curve(theory),
    )


def energies(weight: Float[Tensor, "out in"]) -> Float[Tensor, " rank"]:
    """Squared singular values, falling, divided by their sum; float64.

    As eigenvalues of the smaller Gram matrix in float64: the smallest ones are right to 1e-15 of the largest.
    """
    tall = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().T
    with one_thread():
        values = torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).flip(0)
    return values / values.sum()


def top_share(falling: Float[Tensor, " rank"]) -> float:
    """Share of the energy in the leading 1/16 of the values, at least one."""
    return (falling[: max(1, round(len(falling) / TOP))].sum() / falling.sum()).item()


def marchenko_pastur(shape: Shape) -> Float[Tensor, " rank"]:
    """Squared singular values, falling and summing to 1, of a large matrix of this shape of independent numbers.

    Quantiles of the law of Marchenko and Pastur (Math. USSR Sbornik 1, 1967): density √((b - x)(x - a)) / (2 π q x)
    between (1 ∓ √q)², q the smaller over the larger side.
    """
    rank, ratio = min(shape), min(shape) / max(shape)
    # x = 1 + q - 2 √q cos t takes the roots of the density at its ends away.
    angles = (np.arange(_SAMPLES) + 0.5) * math.pi / _SAMPLES
    x = 1 + ratio - 2 * math.sqrt(ratio) * np.cos(angles)
    weights = np.sin(angles) ** 2 / x
    cumulated = (np.cumsum(weights) - weights / 2) / weights.sum()
    values = np.interp((np.arange(rank) + 0.5) / rank, cumulated, x)[::-1].copy()
    return torch.from_numpy(values / values.sum())


def best_rank(falling: Float[Tensor, " rank"], shape: Shape) -> tuple[int, float]:
    """(rank, bits per weight saved) of the low-rank residual in int8 that saves most; (0, 0.0) where none pays."""
    base = Dense()
    each = LowRankPlus(base=base, rank=1, factors=INT8).nbytes(shape) - base.nbytes(shape)
    left = (1 - falling.cumsum(0)).clamp(min=0) + _FACTOR_ERROR
    ranks = torch.arange(1, len(falling) + 1).to(falling)
    saved = -left.log2() / 2 - 8 * each * ranks / math.prod(shape)
    best = int(saved.argmax())
    return (best + 1, saved[best].item()) if saved[best] > 0 else (0, 0.0)


def _curve(falling: Float[Tensor, " rank"]) -> list[float]:
    places = np.linspace(0, len(falling) - 1, CURVE_POINTS)
    values = np.interp(places, np.arange(len(falling)), (falling * len(falling)).cpu().numpy())
    return [float(f"{value:.5g}") for value in values]
