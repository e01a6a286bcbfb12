"""Bit packing: integer codes of 1 to 16 bits as a byte stream without gaps.

Eight codes of b <= 8 bits make one little-endian word of b bytes, with the first code in the lowest bits.
Codes of more than 8 bits are split into a plane of low bytes and a packed plane of the high bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

_CODES_PER_WORD = 8


def packed_nbytes(count: int, bits: int) -> int:
    """Return the bytes of `count` packed codes of `bits` bits: rounded up to whole bytes, no other padding."""
    if bits > 8:
        return count + packed_nbytes(count, bits - 8)
    return (count * bits + 7) // 8


def pack_bits(codes: Int[Tensor, "..."], bits: int) -> UInt8[Tensor, " nbytes"]:
    """Pack codes in 0 … 2^bits - 1, flattened in row-major order; `bits` in 1 … 16."""
    flat = codes.reshape(-1)
    if bits > 8:
        return torch.cat([(flat & 0xFF).to(torch.uint8), pack_bits(flat >> 8, bits - 8)])
    octets = flat.to(torch.uint8)
    if bits == 8:
        return octets
    return _pack_words(octets, bits)[: packed_nbytes(flat.numel(), bits)]


def unpack_bits(packed: UInt8[Tensor, " nbytes"], bits: int, count: int) -> Int[Tensor, " count"]:
    """Unpack `count` codes as int32: the inverse of `pack_bits`."""
    if bits > 8:
        low, high = packed[:count], packed[count:]
        return low.to(torch.int32) | (unpack_bits(high, bits - 8, count) << 8)
    octets = packed if bits == 8 else _unpack_words(packed, bits)
    return octets[:count].to(torch.int32)


# All arithmetic below is on bytes: on a CPU that is eight times faster than shifting 64-bit words.


def _columns(flat: Tensor, width: int) -> Tensor:
    """Return (width, words): row i has byte i, or code i, of every word; the last word is padded with zeros."""
    missing = -flat.numel() % width
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, width).T.contiguous()


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    columns = _columns(codes, _CODES_PER_WORD)
    words = torch.zeros(bits, columns.shape[1], dtype=torch.uint8, device=codes.device)
    for i, code in enumerate(columns):
        byte, shift = divmod(i * bits, 8)
        words[byte] |= code << shift
        if shift + bits > 8:  # the code continues in the next byte
            words[byte + 1] |= code >> (8 - shift)
    return words.T.reshape(-1)


def _unpack_words(packed: Tensor, bits: int) -> Tensor:
    words = _columns(packed, bits)
    codes = torch.empty(_CODES_PER_WORD, words.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(_CODES_PER_WORD):
        byte, shift = divmod(i * bits, 8)
        code = words[byte] >> shift
        if shift + bits > 8:
            code = code | (words[byte + 1] << (8 - shift))
        codes[i] = code & ((1 << bits) - 1)
    return codes.T.reshape(-1)


def unpack_code_rows(
    packed: UInt8[Tensor, " bytes"], bits: int, shape: tuple[int, int], rows: Int[Tensor, " n"]
) -> Int[Tensor, "n columns"]:
    """Return the codes of the named rows of a matrix of `shape` packed row-major; a row must fill whole bytes."""
    chosen = packed.view(shape[0], -1)[rows].reshape(-1)
    return unpack_bits(chosen, bits, len(rows) * shape[1]).view(len(rows), shape[1])
