"""Sets of positions in a size that is known beforehand: the code of Elias and Fano.

The low bits of every position are stored as they are. The rest of it, which rises from one position to the next, is
told by a stream of ones, one a position, and zeros, one before each step up by one. Keeping 1 % of all places takes
8.6 bits a position, 3 % 7.1; the least that any code needs on average are 8.1 and 6.5. Numbers of a place as they are
would take 20 bits in a matrix of a million weights, and 10 with a fixed count for each of its rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from reallm.errors import FormatError
from reallm.kernels.bit_packing import pack_bits, packed_nbytes, unpack_bits

_MOST_LOW_BITS = 16  # what `pack_bits` packs


def positions_nbytes(count: int, places: int) -> int:
    """Bytes that `count` >= 1 different positions below `places` take."""
    low = _low_bits(count, places)
    return packed_nbytes(count, low) + packed_nbytes(_stream_length(count, places), 1)


def pack_positions(positions: Int[Tensor, " count"], places: int) -> UInt8[Tensor, " nbytes"]:
    """Pack rising positions below `places`: their low bits, then the stream."""
    count = len(positions)
    low = _low_bits(count, places)
    positions = positions.to(torch.int64)
    stream = torch.zeros(_stream_length(count, places), dtype=torch.int32, device=positions.device)
    stream[(positions >> low) + torch.arange(count, device=positions.device)] = 1
    lows = [pack_bits(positions & ((1 << low) - 1), low)] if low else []
    return torch.cat([*lows, pack_bits(stream, 1)])


def unpack_positions(packed: UInt8[Tensor, " nbytes"], count: int, places: int) -> Int[Tensor, " count"]:
    """The inverse of `pack_positions`, int64.

    Errors: FormatError unless they are `count` rising positions below `places`.
    """
    low = _low_bits(count, places)
    cut = packed_nbytes(count, low)
    ones = unpack_bits(packed[cut:], 1, _stream_length(count, places)).nonzero()[:, 0]
    if len(ones) != count:
        raise FormatError(f"stored positions are damaged: {len(ones)} in place of {count}")
    high = (ones - torch.arange(count, device=packed.device)) << low
    found = high | unpack_bits(packed[:cut], low, count).to(torch.int64) if low else high
    if (found.diff() <= 0).any() or not found[-1] < places:
        raise FormatError(f"stored positions are damaged: they do not rise, or exceed {places}")
    return found


def _low_bits(count: int, places: int) -> int:
    return min((places // count).bit_length() - 1, _MOST_LOW_BITS)


def _stream_length(count: int, places: int) -> int:
    return count + ((places - 1) >> _low_bits(count, places))
