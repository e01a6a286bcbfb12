"""The control: a codec on a matrix, on a copy with rows and columns shuffled, and on noise of the same scales.

Shuffling keeps singular values, the scales of rows and columns, and every weight; it takes away who is whose neighbour.
A codec that does as well on the shuffled copy uses no order of rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit import fit, relative_error
from reallm.formats import WeightFormat, from_spec, to_spec

# One of each family, at settings that take a CPU seconds a million weights.
DEFAULT_CODECS: tuple[WeightFormat, ...] = tuple(
    from_spec(spec)
    for spec in (
        {"format": "uniform", "bits": 3},
        {"format": "codebook", "index_bits": 8, "vector_dim": 4},
        {"format": "rotated", "base": {"format": "trellis", "bits": 2, "state_bits": 8}},
    )
)


@dataclass(frozen=True)
class CodecErrors:
    """Relative squared errors of a codec on the matrix, its shuffled copy and noise, at the bytes it stores."""

    codec: dict[str, Any]
    nbytes: int
    bits_per_weight: float
    real: float
    shuffled: float
    noise: float

    @property
    def order_bits(self) -> float:
        """Bits per weight that the order of rows and columns is worth to the codec: ½ log2(shuffled / real)."""
        return 0.5 * math.log2(self.shuffled / self.real) if self.real and self.shuffled else 0.0


def shuffle(weight: Float[Tensor, "out in"], seed: int = 0) -> Float[Tensor, "out in"]:
    """The matrix with its rows and its columns in random orders."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator).to(weight.device) for size in weight.shape)
    return weight[rows][:, columns].contiguous()


def codec_errors(
    codecs: Sequence[WeightFormat],
    weight: Float[Tensor, "out in"],
    noise: Float[Tensor, "out in"],
    seed: int = 0,
) -> list[CodecErrors]:
    """Every codec, fitted by its plain squared error; `noise` as from `noise_like`.

    Errors: FormatError if a codec cannot store the shape.
    """
    copies = (weight, shuffle(weight, seed), noise)
    shape = (weight.shape[0], weight.shape[1])
    found = []
    for fmt in codecs:
        fmt.check(shape)
        errors = [relative_error(copy, fmt.decode(fit(fmt, copy, seed=seed), shape)) for copy in copies]
        found.append(CodecErrors(to_spec(fmt), fmt.nbytes(shape), fmt.bits_per_weight(shape), *errors))
    return found
