"""`permuted`: any format of the matrix with its columns in another order, so that neighbours are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.waist import Parts, Shape, Tensors, WeightFormat, empty, inner, register, under
from reallm.kernels import pack_bits, packed_nbytes, unpack_bits

METHODS = ("sort", "greedy")


@dataclass(frozen=True)
class PermutedParts:
    """Position j of row block b of the base holds column order[b, j] of the weight."""

    order: Int[Tensor, "blocks in"]
    base: Parts


@register
@dataclass(frozen=True)
class Permuted(WeightFormat):
    """`base` of the reordered matrix; one order for all rows, or one for every `block_rows` rows.

    Stored as ⌈log2 in_features⌉ bits a column and order. `method` is how `fit` looks for the order:
    `sort` by the columns' norms, or `greedy`, the chain of nearest columns of ReALLM (arXiv:2405.13155).
    """

    base: WeightFormat
    block_rows: int = 0
    method: str = "sort"

    name: ClassVar[str] = "permuted"
    roles: ClassVar[dict[str, str]] = {"order": "permutation"}
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "codebook", "index_bits": 6}},)

    def __post_init__(self) -> None:
        if self.block_rows < 0:
            raise FormatError(f"permuted: block_rows={self.block_rows} is negative; 0 means one order for all rows")
        if self.method not in METHODS:
            raise FormatError(f"permuted: method={self.method!r} is not one of {', '.join(METHODS)}")

    def check(self, shape: Shape) -> None:
        """Fits whatever the base fits."""
        self.base.check(shape)

    def blocks(self, shape: Shape) -> int:
        """How many orders the matrix has; the last row block may be short."""
        return -(-shape[0] // self.block_rows) if self.block_rows else 1

    def layout(self, shape: Shape) -> Tensors:
        """`order` packed; the base under `base.`"""
        nbytes = packed_nbytes(self.blocks(shape) * shape[1], _index_bits(shape))
        return {"order": empty((nbytes,), torch.uint8), **under("base", self.base.layout(shape))}

    def pack(self, parts: PermutedParts, shape: Shape) -> Tensors:
        """Pack order and base."""
        order = pack_bits(parts.order, _index_bits(shape))
        return {"order": order, **under("base", self.base.pack(parts.base, shape))}

    def unpack(self, tensors: Tensors, shape: Shape) -> PermutedParts:
        """The inverse of `pack`.

        Errors: FormatError if an order does not name every column once: it is damaged.
        """
        grid = (self.blocks(shape), shape[1])
        order = unpack_bits(tensors["order"], _index_bits(shape), grid[0] * grid[1]).view(grid)
        if not (order.sort(1).values == torch.arange(shape[1], device=order.device)).all():
            raise FormatError("permuted: the stored order is no permutation of the columns; it is damaged")
        return PermutedParts(order, self.base.unpack(inner("base", tensors), shape))

    def decode(self, parts: PermutedParts, shape: Shape) -> Float[Tensor, "out in"]:
        """The base with its columns put back."""
        return self.gather(self.base.decode(parts.base, shape), parts.order.long().argsort(1))

    def gather(self, matrix: Float[Tensor, "out in"], order: Int[Tensor, "blocks in"]) -> Float[Tensor, "out in"]:
        """Reorder columns: result[i, j] = matrix[i, order[block of i, j]]."""
        block_rows = min(self.block_rows or matrix.shape[0], matrix.shape[0])
        rows = torch.arange(matrix.shape[0], device=matrix.device) // block_rows
        return matrix.gather(1, order.long()[rows])


def _index_bits(shape: Shape) -> int:
    return max(1, (shape[1] - 1).bit_length())
