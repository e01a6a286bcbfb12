"""`decoupled`: a few columns, rows or entries kept in 8 or 16 bits, beside any format of the rest.

Single weights that hurt most by their rounding, and are therefore stored apart, are SpQR's (Dettmers et al.,
arXiv:2306.03078): here `entries`, though of a number fixed by the shape and not by a threshold. A small branch of high
precision beside a branch of very few bits, with whole neurons in one or the other, is pQuant's (Zhang et al.,
arXiv:2602.22592), which trains both: here `columns` and `rows`, chosen in a trained model, which cost next to nothing
to name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, empty, register, strip_prefix
from reallm.kernels.elias_fano import pack_positions, positions_nbytes, unpack_positions

COLUMNS, ROWS, ENTRIES = "columns", "rows", "entries"
KINDS = (COLUMNS, ROWS, ENTRIES)
INT8, BFLOAT16 = "int8", "bfloat16"


@dataclass(frozen=True)
class UnpackedDecoupled:
    """`values[k]` is the column or row `positions[k]`; of entries, the one at that place in row-major order."""

    positions: Int[Tensor, " kept"]  # rising
    values: Float[Tensor, "kept length"]  # entries have length 1
    base: Unpacked  # of the matrix without the kept columns or rows; entries cover those of the whole matrix


@register
@dataclass(frozen=True)
class Decoupled(WeightFormat):
    """`share` of the columns, rows or entries in int8 or bfloat16, and `base` for the rest.

    How many there are follows from the shape, and so the bytes of naming them: positions are stored in the code of
    Elias and Fano. int8 is stored as scales in two levels are: 8 bits against the largest of 256.
    Errors: FormatError for a share that is not between 0 and 1, or another kind or precision.
    """

    base: WeightFormat
    kind: str = COLUMNS
    share: float = 0.01
    precision: str = INT8

    name: ClassVar[str] = "decoupled"
    roles: ClassVar[dict[str, str]] = dict.fromkeys(("positions", "values", "values_max"), "outliers")
    examples: ClassVar[tuple[dict, ...]] = (
        {"base": {"format": "uniform", "bits": 3}},
        {"kind": ENTRIES, "base": {"format": "uniform", "bits": 3}},
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"decoupled: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if not 0 < self.share < 1:
            raise FormatError(f"decoupled: share={self.share} is not between 0 and 1; for none use the base alone")
        if self.precision not in (INT8, BFLOAT16):
            raise FormatError(f"decoupled: precision={self.precision!r} is not one of {INT8}, {BFLOAT16}")

    def num_positions(self, shape: Shape) -> int:
        """How many columns, rows or entries there are."""
        return {COLUMNS: shape[1], ROWS: shape[0], ENTRIES: shape[0] * shape[1]}[self.kind]

    def num_outliers(self, shape: Shape) -> int:
        """How many of them are kept: the share, rounded, but at least one, and not all.

        Columns and rows are rounded to eights if that leaves any: 570 columns would fill the words of `e8` as 576 do.
        """
        num_positions = self.num_positions(shape)
        wanted = self.share * num_positions
        eights = 0 if self.kind == ENTRIES else 8 * int(wanted / 8 + 0.5)
        return min(eights or max(1, int(wanted + 0.5)), num_positions - 1)

    def rest_shape(self, shape: Shape) -> Shape:
        """Shape of the base."""
        num_outliers = self.num_outliers(shape)
        return {
            COLUMNS: (shape[0], shape[1] - num_outliers),
            ROWS: (shape[0] - num_outliers, shape[1]),
            ENTRIES: shape,
        }[self.kind]

    def inner_shape(self, shape: Shape) -> Shape:
        """That of what is left to the base."""
        return self.rest_shape(shape)

    def values_shape(self, shape: Shape) -> Shape:
        """(kept, numbers of each)."""
        return self.num_outliers(shape), {COLUMNS: shape[0], ROWS: shape[1], ENTRIES: 1}[self.kind]

    def check(self, shape: Shape) -> None:
        """Something must be left for the base, and fit it."""
        if self.num_positions(shape) < 2:
            raise FormatError(f"decoupled: kind={self.kind!r} leaves nothing of a {shape} matrix to the base")
        self.base.check(self.rest_shape(shape))

    def layout(self, shape: Shape) -> Tensors:
        """`positions`; `values` (kept · length,) bfloat16, or int8 with their largest; the base under `base.`"""
        positions = empty((positions_nbytes(self.num_outliers(shape), self.num_positions(shape)),), torch.uint8)
        num_outliers, length = self.values_shape(shape)
        if self.precision == INT8:
            values = _rename_scales(scale_store.layout(scale_store.TWO_LEVEL, num_outliers * length, signed=True))
        else:
            values = {"values": empty((num_outliers * length,), torch.bfloat16)}
        return {"positions": positions, **values, **add_prefix("base", self.base.layout(self.rest_shape(shape)))}

    def pack(self, unpacked: UnpackedDecoupled, shape: Shape) -> Tensors:
        """Pack positions, values and base."""
        positions = pack_positions(unpacked.positions, self.num_positions(shape))
        base = add_prefix("base", self.base.pack(unpacked.base, self.rest_shape(shape)))
        return {"positions": positions, **self.pack_values(unpacked.values), **base}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedDecoupled:
        """The inverse of `pack`."""
        positions = unpack_positions(tensors["positions"], self.num_outliers(shape), self.num_positions(shape))
        base = self.base.unpack(strip_prefix("base", tensors), self.rest_shape(shape))
        return UnpackedDecoupled(positions, self.unpack_values(tensors, self.values_shape(shape)), base)

    def decode(self, unpacked: UnpackedDecoupled, shape: Shape) -> Float[Tensor, "out in"]:
        """The base, with the kept columns, rows or entries in their places."""
        base = self.base.decode(unpacked.base, self.rest_shape(shape))
        if self.kind == ENTRIES:
            return base.flatten().index_copy(0, unpacked.positions, unpacked.values[:, 0]).view(shape)
        dim = 1 if self.kind == COLUMNS else 0
        values = unpacked.values.T if self.kind == COLUMNS else unpacked.values
        rest = remaining_positions(unpacked.positions, shape[dim])
        return base.new_zeros(shape).index_copy(dim, rest, base).index_copy(dim, unpacked.positions, values)

    def pack_values(self, values: Float[Tensor, "kept length"]) -> Tensors:
        """Values as stored."""
        if self.precision == INT8:
            return _rename_scales(scale_store.pack(scale_store.TWO_LEVEL, values, signed=True))
        return {"values": values.detach().to(torch.bfloat16).reshape(-1)}

    def unpack_values(self, tensors: Tensors, shape: Shape) -> Float[Tensor, "kept length"]:
        """The inverse of `pack_values`, float32."""
        if self.precision == INT8:
            stored = {"scales": tensors["values"], "scales_max": tensors["values_max"]}
            return scale_store.unpack(scale_store.TWO_LEVEL, stored, shape)
        return tensors["values"].to(torch.float32).view(shape)

    def fake_quantize_values(self, values: Float[Tensor, "kept length"]) -> Float[Tensor, "kept length"]:
        """Values as they come back from the file."""
        return self.unpack_values(self.pack_values(values), (values.shape[0], values.shape[1]))


def remaining_positions(positions: Int[Tensor, " kept"], num_positions: int) -> Int[Tensor, " rest"]:
    """The places that are not in `positions`, rising."""
    free = torch.ones(num_positions, dtype=torch.bool, device=positions.device)
    free[positions] = False
    return free.nonzero()[:, 0]


def _rename_scales(scales: Tensors) -> Tensors:
    return {name.replace("scales", "values"): tensor for name, tensor in scales.items()}
