"""Decoding a few rows only: what an embedding look-up needs when the table stays compressed."""

from __future__ import annotations

from functools import singledispatch

from jaxtyping import Float, Int
from torch import Tensor

from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, WeightFormat, strip_prefix
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.normal_float import NormalFloat, UnpackedNormalFloat
from reallm.formats.uniform import Uniform, UnpackedUniform
from reallm.kernels import unpack_bits


@singledispatch
def decode_rows(fmt: WeightFormat, tensors: Tensors, shape: Shape, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
    """The named rows of the decoded matrix, float32; formats without a shorter way decode everything."""
    return fmt.decode(fmt.unpack(tensors, shape), shape)[rows]


@decode_rows.register
def _(fmt: Uniform, tensors: Tensors, shape: Shape, rows: Tensor) -> Tensor:
    if shape[1] * fmt.bits % 8:
        return decode_rows.dispatch(WeightFormat)(fmt, tensors, shape, rows)
    grid = scale_store.grid(shape, fmt.group_size)
    zeros = None if fmt.symmetric else unpack_bits(tensors["zeros"], fmt.bits, grid[0] * grid[1]).view(grid)[rows]
    codes = _codes(tensors["codes"], fmt.bits, shape, rows)
    unpacked = UnpackedUniform(codes, scale_store.unpack(fmt.scales, tensors, grid)[rows], zeros)
    return fmt.decode(unpacked, (len(rows), shape[1]))


@decode_rows.register
def _(fmt: NormalFloat, tensors: Tensors, shape: Shape, rows: Tensor) -> Tensor:
    if shape[1] * fmt.bits % 8:
        return decode_rows.dispatch(WeightFormat)(fmt, tensors, shape, rows)
    scales = scale_store.unpack(fmt.scales, tensors, scale_store.grid(shape, fmt.group_size))[rows]
    unpacked = UnpackedNormalFloat(_codes(tensors["codes"], fmt.bits, shape, rows), scales)
    return fmt.decode(unpacked, (len(rows), shape[1]))


@decode_rows.register
def _(fmt: LowRankPlus, tensors: Tensors, shape: Shape, rows: Tensor) -> Tensor:
    found = decode_rows(fmt.base, strip_prefix("base", tensors), shape, rows)
    return found + fmt.unpack_factor("left", tensors)[rows] @ fmt.unpack_factor("right", tensors).T


def _codes(packed: Tensor, bits: int, shape: Shape, rows: Tensor) -> Tensor:
    """Codes of the named rows; a row must fill whole bytes."""
    chosen = packed.view(shape[0], -1)[rows].reshape(-1)
    return unpack_bits(chosen, bits, len(rows) * shape[1]).view(len(rows), shape[1])
