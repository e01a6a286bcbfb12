"""`normal_float`: levels at the quantiles of a normal distribution, scaled by each group's largest weight.

The data type of QLoRA (Dettmers et al., arXiv:2305.14314), for 1 to 8 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register
from reallm.kernels import pack_bits, packed_nbytes, unpack_bits, unpack_code_rows


@functools.cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels in rising order, from -1 to 1.

    With n = 2^bits: n/2 quantiles below 0 and n/2 + 1 from 0 up, both halves sharing the exact 0, the tails
    cut at half of (1/2n + 1/(2n - 2)). One bit has no room for a 0 and is a sign.
    """
    if bits == 1:
        return (-1.0, 1.0)
    count = 2**bits
    tail = 0.5 * (1 / (2 * count) + 1 / (2 * (count - 1)))
    below = _quantiles(tail, count // 2)
    above = [-q for q in _quantiles(tail, count // 2 + 1)]
    levels = sorted({*below, *above})  # a set: 0 comes from both halves
    return tuple(level / levels[-1] for level in levels)


def _quantiles(tail: float, count: int) -> list[float]:
    """`count` quantiles of the normal at even steps from probability `tail` to 1/2, where it is exactly 0."""
    step = (0.5 - tail) / (count - 1)
    return [NormalDist().inv_cdf(tail + step * i) for i in range(count - 1)] + [0.0]


@dataclass(frozen=True)
class UnpackedNormalFloat:
    """weight = levels[code] · scale."""

    codes: Int[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]


@register
@dataclass(frozen=True)
class NormalFloat(WeightFormat):
    """Normal quantiles of 1 to 8 bits; `group_size` and `scales` as in `scales.py`."""

    bits: int
    group_size: int = 64
    scales: str = scale_store.TWO_LEVEL

    name: ClassVar[str] = "normal_float"
    cheap_to_fit: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {"codes": "codes", **scale_store.ROLES}
    examples: ClassVar[tuple[dict, ...]] = ({"bits": 2}, {"bits": 3}, {"bits": 4})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"normal_float: bits={self.bits} is not in 1 … 8")
        scale_store.check_groups(self.name, self.group_size, self.scales)

    def levels(self, device: torch.device) -> Float[Tensor, " levels"]:
        """The levels in rising order."""
        return torch.tensor(normal_levels(self.bits), device=device)

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last group of a row may be short."""

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed row-major, scales as in `scales.py`; the levels are never stored."""
        rows, groups = scale_store.grid(shape, self.group_size)
        codes = empty((packed_nbytes(shape[0] * shape[1], self.bits),), torch.uint8)
        return {"codes": codes, **scale_store.layout(self.scales, rows * groups)}

    def pack(self, unpacked: UnpackedNormalFloat, shape: Shape) -> Tensors:
        """Pack codes and scales."""
        return {"codes": pack_bits(unpacked.codes, self.bits), **scale_store.pack(self.scales, unpacked.scales)}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedNormalFloat:
        """The inverse of `pack`."""
        codes = unpack_bits(tensors["codes"], self.bits, shape[0] * shape[1]).view(shape)
        return UnpackedNormalFloat(
            codes, scale_store.unpack(self.scales, tensors, scale_store.grid(shape, self.group_size))
        )

    def decode(self, unpacked: UnpackedNormalFloat, shape: Shape) -> Float[Tensor, "out in"]:
        """levels[code] · scale."""
        levels = self.levels(unpacked.scales.device)
        return scale_store.apply_scales(levels[unpacked.codes], unpacked.scales, self.group_size)

    def decode_rows(self, tensors: Tensors, shape: Shape, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return the named rows in float32; only rows that fill whole bytes can be read alone."""
        if shape[1] * self.bits % 8:
            return super().decode_rows(tensors, shape, rows)
        scales = scale_store.unpack(self.scales, tensors, scale_store.grid(shape, self.group_size))[rows]
        unpacked = UnpackedNormalFloat(unpack_code_rows(tensors["codes"], self.bits, shape, rows), scales)
        return self.decode(unpacked, (len(rows), shape[1]))
