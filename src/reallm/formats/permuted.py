"""`permuted`: any format of the matrix with columns, or rows too, in another order, so that neighbours are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, empty, register, strip_prefix
from reallm.kernels import pack_bits, packed_nbytes, unpack_bits

METHODS = ("sort", "greedy", "spectral")


@dataclass(frozen=True)
class UnpackedPermuted:
    """Row i of the base holds row row_order[i] of the weight, all in their own places if that is None.

    Position j of row block b of the base holds column order[b, j] of the weight.
    """

    order: Int[Tensor, "blocks in"]
    base: Unpacked
    row_order: Int[Tensor, " out"] | None = None


@register
@dataclass(frozen=True)
class Permuted(WeightFormat):
    """`base` of the reordered matrix; one order of columns for all rows, or one for every `block_rows` rows.

    Stored as ⌈log2 in_features⌉ bits per column and order. With `rows` the rows have an order too, at
    ⌈log2 out_features⌉ bits per row; blocks are then of rows in that order. `method` is how `fit` looks for orders:
    `sort` by norms; `greedy`, the chain of nearest columns of ReALLM (arXiv:2405.13155); `spectral`, by the Fiedler
    vector of their likeness.
    """

    base: WeightFormat
    block_rows: int = 0
    method: str = "sort"
    rows: bool = False

    name: ClassVar[str] = "permuted"
    roles: ClassVar[dict[str, str]] = {"order": "permutation", "row_order": "permutation"}
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
        """`order` packed, with `rows` also `row_order`; the base under `base.`"""
        tensors = {"order": _empty_orders(self.blocks(shape), shape[1])}
        if self.rows:
            tensors["row_order"] = _empty_orders(1, shape[0])
        return tensors | add_prefix("base", self.base.layout(shape))

    def pack(self, unpacked: UnpackedPermuted, shape: Shape) -> Tensors:
        """Pack orders and base."""
        tensors = {"order": pack_bits(unpacked.order, _index_bits(shape[1]))}
        if unpacked.row_order is not None:
            tensors["row_order"] = pack_bits(unpacked.row_order, _index_bits(shape[0]))
        return tensors | add_prefix("base", self.base.pack(unpacked.base, shape))

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedPermuted:
        """The inverse of `pack`.

        Errors: FormatError if an order does not name every column, or row, once: it is damaged.
        """
        order = _unpack_order(tensors["order"], self.blocks(shape), shape[1], "columns")
        row_order = _unpack_order(tensors["row_order"], 1, shape[0], "rows")[0] if self.rows else None
        return UnpackedPermuted(order, self.base.unpack(strip_prefix("base", tensors), shape), row_order)

    def decode(self, unpacked: UnpackedPermuted, shape: Shape) -> Float[Tensor, "out in"]:
        """The base with its columns, and its rows, put back."""
        weight = self.gather(self.base.decode(unpacked.base, shape), unpacked.order.long().argsort(1))
        return weight if unpacked.row_order is None else weight[unpacked.row_order.long().argsort()]

    def gather(self, matrix: Float[Tensor, "out in"], order: Int[Tensor, "blocks in"]) -> Float[Tensor, "out in"]:
        """Reorder columns: result[i, j] = matrix[i, order[block of i, j]]."""
        block_rows = min(self.block_rows or matrix.shape[0], matrix.shape[0])
        rows = torch.arange(matrix.shape[0], device=matrix.device) // block_rows
        return matrix.gather(1, order.long()[rows])


def order_nbytes(size: int, count: int = 1) -> int:
    """Bytes of `count` orders of `size` rows or columns as they are stored."""
    return packed_nbytes(count * size, _index_bits(size))


def _index_bits(size: int) -> int:
    return max(1, (size - 1).bit_length())


def _empty_orders(count: int, size: int) -> Tensor:
    return empty((order_nbytes(size, count),), torch.uint8)


def _unpack_order(packed: Tensor, count: int, size: int, what: str) -> Int[Tensor, "count size"]:
    order = unpack_bits(packed, _index_bits(size), count * size).view(count, size)
    if not (order.sort(1).values == torch.arange(size, device=order.device)).all():
        raise FormatError(f"permuted: the stored order is no permutation of the {what}; it is damaged")
    return order
