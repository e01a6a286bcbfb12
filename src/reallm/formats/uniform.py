"""`uniform`: evenly spaced levels in groups (round to nearest, RTN; also the code grid of GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register
from reallm.kernels import pack_bits, packed_nbytes, unpack_bits, unpack_code_rows


@dataclass(frozen=True)
class UnpackedUniform:
    """weight = (code - zero) · scale; `zeros` is None when symmetric, where `Uniform.zero_code` serves.

    Codes are whole numbers, of a float type while they train.
    """

    codes: Real[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Int[Tensor, "out groups"] | None


@register
@dataclass(frozen=True)
class Uniform(WeightFormat):
    """2^bits levels per group, 1 to 8 bits.

    Symmetric: a fixed zero code and a *signed* scale, so that the group's largest weight, whichever its
    sign, takes the one level that has no opposite. Asymmetric: an integer zero point of `bits` bits a
    group. Either way 0 is exact, which groups with one huge weight need: without it all their small weights
    become noise of its size. 1 bit symmetric is a sign. `group_size` and `scales` as in `scales.py`.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False
    scales: str = scale_store.FLOAT16

    name: ClassVar[str] = "uniform"
    cheap_to_fit: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "zeros": "scales", **scale_store.ROLES}
    examples: ClassVar[tuple[dict, ...]] = ({"bits": 2}, {"bits": 3}, {"bits": 4})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"uniform: bits={self.bits} is not in 1 … 8")
        scale_store.check_groups(self.name, self.group_size, self.scales)

    @property
    def zero_code(self) -> float:
        """The code that means 0 when symmetric; with 1 bit, between the two codes."""
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last group of a row may be short."""

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed row-major, scales as in `scales.py`, `zeros` packed at `bits` bits."""
        rows, groups = scale_store.grid(shape, self.group_size)
        tensors = {"codes": empty((packed_nbytes(shape[0] * shape[1], self.bits),), torch.uint8)}
        tensors |= scale_store.layout(self.scales, rows * groups, self.symmetric)
        if not self.symmetric:
            tensors["zeros"] = empty((packed_nbytes(rows * groups, self.bits),), torch.uint8)
        return tensors

    def pack(self, unpacked: UnpackedUniform, shape: Shape) -> Tensors:
        """Pack codes, scales and zero points."""
        scales = scale_store.pack(self.scales, unpacked.scales, self.symmetric)
        tensors = {"codes": pack_bits(unpacked.codes, self.bits), **scales}
        if unpacked.zeros is not None:
            tensors["zeros"] = pack_bits(unpacked.zeros, self.bits)
        return tensors

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedUniform:
        """The inverse of `pack`."""
        grid = scale_store.grid(shape, self.group_size)
        zeros = None
        if not self.symmetric:
            zeros = unpack_bits(tensors["zeros"], self.bits, grid[0] * grid[1]).view(grid)
        codes = unpack_bits(tensors["codes"], self.bits, shape[0] * shape[1]).view(shape)
        return UnpackedUniform(codes, scale_store.unpack(self.scales, tensors, grid), zeros)

    def decode(self, unpacked: UnpackedUniform, shape: Shape) -> Float[Tensor, "out in"]:
        """(code - zero) · scale."""
        if unpacked.zeros is None:
            steps = unpacked.codes - self.zero_code
        else:
            steps = (unpacked.codes - scale_store.expand_groups(unpacked.zeros, shape[1], self.group_size)).to(
                torch.float32
            )
        return scale_store.apply_scales(steps, unpacked.scales, self.group_size)

    def decode_rows(self, tensors: Tensors, shape: Shape, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return the named rows in float32; only rows that fill whole bytes can be read alone."""
        if shape[1] * self.bits % 8:
            return super().decode_rows(tensors, shape, rows)
        grid = scale_store.grid(shape, self.group_size)
        zeros = None if self.symmetric else unpack_bits(tensors["zeros"], self.bits, grid[0] * grid[1]).view(grid)[rows]
        codes = unpack_code_rows(tensors["codes"], self.bits, shape, rows)
        unpacked = UnpackedUniform(codes, scale_store.unpack(self.scales, tensors, grid)[rows], zeros)
        return self.decode(unpacked, (len(rows), shape[1]))
