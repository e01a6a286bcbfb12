"""`trellis`: tiles of 256 weights as rings of bits, every weight read off a window of the ring.

The codec of QTIP (Tseng et al., arXiv:2406.11235), for matrices whose weights look Gaussian: inside `rotated`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register
from reallm.kernels import pack_bits, packed_nbytes, quantile_of_state, ring_states, unpack_bits

TILE = 256  # weights of a ring
MAX_STATE_BITS = 16


@dataclass(frozen=True)
class UnpackedTrellis:
    """weight = value of its state · scale. `table` is None where values are computed."""

    codes: Int[Tensor, "row_tiles steps"]  # the rings of a row of tiles, one after the other
    scales: Float[Tensor, " one"]
    table: Float[Tensor, " entries"] | None


@register
@dataclass(frozen=True)
class Trellis(WeightFormat):
    """`bits` bits per weight (1 to 4), window of `state_bits` bits, one scale per matrix.

    Values are computed, the quantiles of a normal; with `table_bits` they are that many bits of the quantile
    looked up in a learned table, which is stored. A tile has `tile_columns` columns (4, 8 or 16) and
    256 / tile_columns rows; the last tiles are filled with zeros, which are counted.
    """

    bits: int
    state_bits: int = 16
    tile_columns: int = 16
    table_bits: int = 0

    name: ClassVar[str] = "trellis"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "scales": "scales", "table": "codebooks"}
    examples: ClassVar[tuple[dict, ...]] = ({"bits": 2, "state_bits": 12}, {"bits": 3, "state_bits": 12})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise FormatError(f"trellis: bits={self.bits} is not in 1 … 4")
        if not self.bits + 2 <= self.state_bits <= MAX_STATE_BITS:
            raise FormatError(f"trellis: state_bits={self.state_bits} is not in bits + 2 … {MAX_STATE_BITS}")
        if self.tile_columns not in (4, 8, 16):
            raise FormatError(f"trellis: tile_columns={self.tile_columns} is not one of 4, 8, 16")
        if not 0 <= self.table_bits <= self.state_bits:
            raise FormatError(f"trellis: table_bits={self.table_bits} is not in 0 … state_bits={self.state_bits}")

    def block_width(self) -> int:
        """Return the columns of a tile."""
        return self.tile_columns

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last tiles are filled."""

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return TILE // self.tile_columns

    def tiles(self, shape: Shape) -> Shape:
        """Rows and columns of tiles."""
        return -(-shape[0] // self.tile_rows), -(-shape[1] // self.tile_columns)

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed, tile after tile along a row of tiles; `scales` (1,) float32; perhaps `table` float16."""
        down, across = self.tiles(shape)
        tensors = {
            "codes": empty((packed_nbytes(down * across * TILE, self.bits),), torch.uint8),
            "scales": empty((1,), torch.float32),
        }
        return tensors | ({"table": empty((1 << self.table_bits,), torch.float16)} if self.table_bits else {})

    def pack(self, unpacked: UnpackedTrellis, shape: Shape) -> Tensors:
        """Pack codes, scale and table."""
        tensors = {"codes": pack_bits(unpacked.codes, self.bits), "scales": unpacked.scales.detach().to(torch.float32)}
        return tensors if unpacked.table is None else tensors | {"table": unpacked.table.detach().to(torch.float16)}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedTrellis:
        """The inverse of `pack`."""
        down, across = self.tiles(shape)
        codes = unpack_bits(tensors["codes"], self.bits, down * across * TILE).view(down, -1)
        table = tensors["table"].to(torch.float32) if self.table_bits else None
        return UnpackedTrellis(codes, tensors["scales"], table)

    def decode(self, unpacked: UnpackedTrellis, shape: Shape) -> Float[Tensor, "out in"]:
        """table[states] · scale, tiles put in their places."""
        states = ring_states(unpacked.codes.reshape(-1, TILE), self.bits, self.state_bits)
        values = self.values(unpacked.table, states.device)[states]
        return self.join_tiles(values, shape) * unpacked.scales

    def values(self, table: Float[Tensor, " entries"] | None, device: torch.device) -> Float[Tensor, " states"]:
        """The value of every state, in units of the scale."""
        quantiles = quantile_of_state(self.bits, self.state_bits).to(device)
        if table is None:
            table, drop = normal_quantiles(self.state_bits).to(device), 0
        else:
            drop = self.state_bits - self.table_bits
        return table[quantiles >> drop]

    def split_tiles(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "tiles steps"]:
        """Tiles row by row, each row-major; filled with zeros."""
        down, across = self.tiles((weight.shape[0], weight.shape[1]))
        missing = (0, across * self.tile_columns - weight.shape[1], 0, down * self.tile_rows - weight.shape[0])
        filled = torch.nn.functional.pad(weight, missing) if any(missing) else weight
        tiles = filled.reshape(down, self.tile_rows, across, self.tile_columns).transpose(1, 2)
        return tiles.reshape(down * across, TILE)

    def join_tiles(self, tiles: Float[Tensor, "tiles steps"], shape: Shape) -> Float[Tensor, "out in"]:
        """The inverse of `split_tiles`."""
        down, across = self.tiles(shape)
        rows = tiles.view(down, across, self.tile_rows, self.tile_columns).transpose(1, 2)
        return rows.reshape(down * self.tile_rows, -1)[: shape[0], : shape[1]]


def normal_quantiles(bits: int) -> Float[Tensor, " levels"]:
    """Quantiles (i + ½) / 2^bits of a normal of unit variance."""
    places = (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits)
    return torch.special.ndtri(places).to(torch.float32)
