"""Everything that is looked at in one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reallm.analyze.control import CodecErrors, codec_errors
from reallm.analyze.orders import View, views
from reallm.analyze.scale_statistics import ScaleBits, kurtosis, noise_like, remove_scales, scale_bits
from reallm.analyze.shifts import Shifts, shifts
from reallm.analyze.spectrum import Spectrum, spectrum
from reallm.formats import Shape, WeightFormat

# Noise and shuffled copies are drawn apart.
_NOISE = 1 << 32


@dataclass(frozen=True)
class Structure:
    """A matrix beside noise of the same scales: singular values, scales, shifts, tails, orders, codecs and control."""

    shape: Shape
    spectrum: Spectrum
    scales: ScaleBits
    noise_scales: ScaleBits
    shifts: Shifts
    kurtosis: float
    unscaled_kurtosis: float  # rows and columns brought to one size first
    orders: list[View]
    noise_orders: list[View]
    codecs: list[CodecErrors]


def analyze_matrix(weight: Float[Tensor, "out in"], codecs: Sequence[WeightFormat] = (), seed: int = 0) -> Structure:
    """Look at a float32 matrix that is finite and not all zero; what is drawn comes from `seed`."""
    noise = noise_like(weight, seed + _NOISE)
    return Structure(
        shape=(weight.shape[0], weight.shape[1]),
        spectrum=spectrum(weight, noise),
        scales=scale_bits(weight),
        noise_scales=scale_bits(noise),
        shifts=shifts(weight),
        kurtosis=kurtosis(weight),
        unscaled_kurtosis=kurtosis(remove_scales(weight)),
        orders=list(views(weight)),
        noise_orders=list(views(noise)),
        codecs=codec_errors(codecs, weight, noise, seed),
    )
