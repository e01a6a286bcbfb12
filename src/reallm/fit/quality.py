"""How good a format is, apart from any model."""

from __future__ import annotations

import functools

import torch

from reallm.fit.dispatch import fit, relative_error
from reallm.formats import WeightFormat


@functools.cache
def gaussian_error(fmt: WeightFormat) -> float:
    """Relative squared error on a seeded Gaussian matrix."""
    # 8,192 vectors of two: 32 for each entry of the largest candidate codebook, and 60 fits in two seconds.
    shape = (32, 512)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return relative_error(sample, fmt.decode(fit(fmt, sample), shape))
