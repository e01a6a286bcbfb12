"""`low_rank_plus`: any format plus a low-rank residual, W ≈ base + left · rightᵀ.

The residual of ReALLM (Leconte et al., arXiv:2405.13155), LQ-LoRA (Guo et al., arXiv:2311.12023) and LoftQ
(Li et al., arXiv:2310.08659): the high-precision part, and later the part that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, empty, register, strip_prefix

BFLOAT16 = "bfloat16"
INT8 = "int8"
_INT8_LARGEST = 127


@dataclass(frozen=True)
class UnpackedLowRankPlus:
    """weight = base + left · rightᵀ."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]
    base: Unpacked


@register
@dataclass(frozen=True)
class LowRankPlus(WeightFormat):
    """`base` plus `rank` terms; factors in bfloat16, or in int8 with one float16 scale per column."""

    base: WeightFormat
    rank: int
    factors: str = BFLOAT16

    name: ClassVar[str] = "low_rank_plus"
    roles: ClassVar[dict[str, str]] = dict.fromkeys(("left", "right", "left_scales", "right_scales"), "residual")
    examples: ClassVar[tuple[dict, ...]] = (
        {"rank": 16, "base": {"format": "codebook", "index_bits": 6}},
        {"rank": 16, "factors": "int8", "base": {"format": "normal_float", "bits": 3}},
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FormatError(f"low_rank_plus: rank={self.rank} is not positive; use the base format alone for rank 0")
        if self.factors not in (BFLOAT16, INT8):
            raise FormatError(f"low_rank_plus: factors={self.factors!r} is not one of {BFLOAT16}, {INT8}")

    def check(self, shape: Shape) -> None:
        """The rank may not exceed the matrix's smaller side."""
        if self.rank > min(shape):
            raise FormatError(f"low_rank_plus: rank={self.rank} exceeds the smaller side of a {shape} matrix")
        self.base.check(shape)

    def layout(self, shape: Shape) -> Tensors:
        """`left` (out, rank), `right` (in, rank), for int8 also their scales (rank,); the base under `base.`"""
        tensors = {}
        for side, rows in (("left", shape[0]), ("right", shape[1])):
            dtype = torch.int8 if self.factors == INT8 else torch.bfloat16
            tensors[side] = empty((rows, self.rank), dtype)
            if self.factors == INT8:
                tensors[f"{side}_scales"] = empty((self.rank,), torch.float16)
        return tensors | add_prefix("base", self.base.layout(shape))

    def pack(self, unpacked: UnpackedLowRankPlus, shape: Shape) -> Tensors:
        """Pack both factors and the base."""
        factors = self.pack_factor("left", unpacked.left) | self.pack_factor("right", unpacked.right)
        return factors | add_prefix("base", self.base.pack(unpacked.base, shape))

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedLowRankPlus:
        """The inverse of `pack`."""
        base = self.base.unpack(strip_prefix("base", tensors), shape)
        return UnpackedLowRankPlus(self.unpack_factor("left", tensors), self.unpack_factor("right", tensors), base)

    def decode(self, unpacked: UnpackedLowRankPlus, shape: Shape) -> Float[Tensor, "out in"]:
        """base + left · rightᵀ."""
        return self.base.decode(unpacked.base, shape) + unpacked.left @ unpacked.right.T

    def pack_factor(self, side: str, factor: Float[Tensor, "rows rank"]) -> Tensors:
        """One factor as stored."""
        factor = factor.detach()
        if self.factors == BFLOAT16:
            return {side: factor.to(torch.bfloat16).contiguous()}
        # A scale of infinity would make NaN of a column; it is the largest of float16 instead, and the codes saturate.
        largest = torch.finfo(torch.float16).max
        scales = (factor.abs().amax(0) / _INT8_LARGEST).clamp(max=largest).to(torch.float16)
        # A zero column (rank above that of the matrix) would divide by 0.
        steps = torch.where(scales > 0, scales, 1).to(torch.float32)
        codes = (factor / steps).round().clamp(-_INT8_LARGEST, _INT8_LARGEST)
        return {side: codes.to(torch.int8).contiguous(), f"{side}_scales": scales}

    def unpack_factor(self, side: str, tensors: Tensors) -> Float[Tensor, "rows rank"]:
        """One factor in float32."""
        factor = tensors[side].to(torch.float32)
        return factor if self.factors == BFLOAT16 else factor * tensors[f"{side}_scales"].to(torch.float32)

    def fake_quantize_factor(self, factor: Float[Tensor, "rows rank"]) -> Float[Tensor, "rows rank"]:
        """A factor as it comes back from the file."""
        return self.unpack_factor("left", self.pack_factor("left", factor))

    def decode_rows(self, tensors: Tensors, shape: Shape, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return the named rows in float32: those of the base, and of the residual."""
        found = self.base.decode_rows(strip_prefix("base", tensors), shape, rows)
        return found + self.unpack_factor("left", tensors)[rows] @ self.unpack_factor("right", tensors).T

    def residual_rank(self) -> int:
        """Return the rank."""
        return self.rank

    def residual_dtype(self) -> str:
        """Return how the factors are stored."""
        return self.factors

    def without_residual(self) -> WeightFormat:
        """Return the format inside."""
        return self.base

    def timing_format(self) -> WeightFormat:
        """Return the format inside as it is timed, without a residual of rank 1: that fits the base in rounds."""
        return self.base.timing_format() if self.rank == 1 else self

    @staticmethod
    def replace_residual(fmt: WeightFormat, rank: int | None) -> WeightFormat:
        """Return `fmt` with its residual, if any, replaced by one of `rank`; None leaves it alone, 0 removes it."""
        if rank is None:
            return fmt
        base, factors = (fmt.base, fmt.factors) if isinstance(fmt, LowRankPlus) else (fmt, INT8)
        return LowRankPlus(base=base, rank=rank, factors=factors) if rank else base
