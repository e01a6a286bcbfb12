"""Lossless entropy coding of bytes: interleaved range asymmetric numeral systems (rANS) in numpy.

The coder of Duda (arXiv:1311.2540) with one frequency table. Interleaved lanes share one stream of words (Giesen,
arXiv:1402.3392), so that numpy decodes one symbol per lane at a time. docs/artifact.md specifies the bytes.
"""

from __future__ import annotations

import math

import numpy as np

from reallm.errors import FormatError

# Frequencies sum to 2^14; states are in 2^16 … 2^32 - 1 and are renormalised by 16 bits.
_PRECISION = 14
_LOWEST = 1 << 16
_WORD_BITS = 16
_HEAD = 5  # bytes of the header: width, number of lanes as uint32
_WIDTHS = range(1, 9)
# More steps decode more slowly, more lanes cost two bytes each: 576 x 576 codes take 1,152 steps, 50 ms and 0.5 %.
_MIN_STEPS, _MAX_STEPS = 64, 2048
_MANTISSA = 16
# The width is chosen on a sample of this many bytes from the middle: a multiple of all widths (105 bytes are 840 bits).
_SAMPLE = 105 << 11


def encode_bytes(raw: np.ndarray, most: float) -> np.ndarray | None:
    """Encode uint8 bytes at the best symbol width; return None if the result takes more than `most` bytes."""
    if not len(raw):
        return None
    start = max(0, len(raw) - _SAMPLE) // 210 * 105
    sample = raw[start : start + _SAMPLE]
    width, estimate = min(((width, _estimate(sample, width)) for width in _WIDTHS), key=lambda pair: pair[1])
    # Usually noise. The estimate charges the whole table to the sample, so that nothing compressible is rejected.
    if estimate > len(sample):
        return None
    coded = _encode(raw, width)
    return coded if len(coded) <= most else None


def decode_bytes(coded: np.ndarray, nbytes: int) -> np.ndarray:
    """Decode `nbytes` uint8 bytes: the inverse of `encode_bytes`.

    Errors: FormatError if the stream is damaged, that is, does not end where the bytes do.
    """
    damaged = FormatError("entropy-coded tensor is damaged; copy the artifact again")
    width = int(coded[0]) if len(coded) else 0
    if width not in _WIDTHS or len(coded) < _HEAD + (1 << width):
        raise damaged
    lanes = int(coded[1:_HEAD].view("<u4")[0])
    table, stream = coded[_HEAD : _HEAD + (1 << width)], coded[_HEAD + (1 << width) :]
    count = -(-8 * nbytes // width)
    # Each lane takes four bytes of the file: with a limit on steps, time and memory are bounded by the file size.
    if not 0 < lanes <= count or -(-count // lanes) > _MAX_STEPS:
        raise damaged
    if len(stream) < 4 * lanes or len(stream) % 2 or not table.any():
        raise damaged
    states = stream[: 4 * lanes].view("<u4").astype(np.int64)
    symbols = _read(states, stream[4 * lanes :].view("<u2"), frequencies(table), count)
    if symbols is None:
        raise damaged
    bits = (symbols[:, None] >> np.arange(width, dtype=np.uint8) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(-1)[: 8 * nbytes], bitorder="little")


def frequencies(table: np.ndarray) -> np.ndarray:
    """Convert the bytes of a table to int64 frequencies that sum to 2^14; only byte 0 becomes 0.

    Byte b > 0 has weight (16 + b mod 16) · 2^(b div 16). Each symbol gets 1; the remainder is divided by weight,
    rounded down, and the final remainder goes to the first of the largest.
    """
    wide = table.astype(np.int64)
    weights = np.where(wide > 0, (_MANTISSA + wide % _MANTISSA) << (wide // _MANTISSA), 0)
    used = wide > 0
    result = used + weights * ((1 << _PRECISION) - used.sum()) // max(weights.sum(), 1)
    result[result.argmax()] += (1 << _PRECISION) - result.sum()
    return result


def _symbols(raw: np.ndarray, width: int) -> np.ndarray:
    """Split the bit stream of the bytes, lowest bit first, into symbols of `width` bits; padded with zeros."""
    if width == 8:
        return raw
    if width in (1, 2, 4):
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        return (raw[:, None] >> shifts & ((1 << width) - 1)).reshape(-1)
    bits = np.unpackbits(raw, bitorder="little")
    bits = np.concatenate([bits, np.zeros(-len(bits) % width, np.uint8)]).reshape(-1, width)
    return (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)


def _estimate(raw: np.ndarray, width: int) -> float:
    """Estimate the coded size in bytes: entropy, table and lanes."""
    counts = np.bincount(_symbols(raw, width), minlength=1 << width)
    share = counts[counts > 0] / counts.sum()
    bits = -(share * np.log2(share)).sum() * counts.sum()
    return bits / 8 + _HEAD + (1 << width) + 2 * _lanes(int(counts.sum()))


def _lanes(count: int) -> int:
    steps = min(max(2 * math.isqrt(count), _MIN_STEPS), _MAX_STEPS)
    return -(-count // steps)


def _table(counts: np.ndarray) -> np.ndarray:
    """Convert counts to bytes with a relative error of at most 1/32; counts below 2^-15 of the largest are raised."""
    steps = np.arange(256, dtype=np.int64)
    steps = np.where(steps > 0, (_MANTISSA + steps % _MANTISSA) << (steps // _MANTISSA), 0)
    places = np.searchsorted((steps[1:] + steps[:-1]) / 2, counts / counts.max() * steps[-1])
    return np.where(counts > 0, np.clip(places, 1, 255), 0).astype(np.uint8)


def _encode(raw: np.ndarray, width: int) -> np.ndarray:
    symbols = _symbols(raw, width)
    table = _table(np.bincount(symbols, minlength=1 << width))
    lanes = _lanes(len(symbols))
    states, words = _write(symbols, frequencies(table), lanes)
    head = np.concatenate([np.array([width], np.uint8), np.array([lanes], "<u4").view(np.uint8), table])
    return np.concatenate([head, states.astype("<u4").view(np.uint8), words.astype("<u2").view(np.uint8)])


def _write(symbols: np.ndarray, freqs: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (state of each lane, words in reading order); symbols are written from the last to the first."""
    starts = np.cumsum(freqs) - freqs
    states = np.full(lanes, _LOWEST, np.int64)
    written: list[np.ndarray] = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        step = symbols[first : first + lanes]
        freq, state = freqs[step], states[: len(step)]
        full = state >= freq << (32 - _PRECISION)
        written.append(state[full] & 0xFFFF)
        state = np.where(full, state >> _WORD_BITS, state)
        states[: len(step)] = (state // freq << _PRECISION) + state % freq + starts[step]
    return states, np.concatenate(written[::-1])


def _read(states: np.ndarray, words: np.ndarray, freqs: np.ndarray, count: int) -> np.ndarray | None:
    """Return the symbols, or None if words remain or a final state is not the encoder's initial state."""
    starts = np.cumsum(freqs) - freqs
    of_slot = np.repeat(np.arange(len(freqs), dtype=np.uint8), freqs)
    # Per slot instead of per symbol: one look-up instead of two.
    freq_of_slot, inside = freqs[of_slot], np.arange(1 << _PRECISION) - starts[of_slot]
    symbols, at, lanes = np.empty(count, np.uint8), 0, len(states)
    for first in range(0, count, lanes):
        state = states[: count - first]
        slots = state & ((1 << _PRECISION) - 1)
        symbols[first : first + lanes] = of_slot[slots]
        state = (state >> _PRECISION) * freq_of_slot[slots] + inside[slots]
        low = np.flatnonzero(state < _LOWEST)
        if at + len(low) > len(words):
            return None
        state[low] = state[low] << _WORD_BITS | words[at : at + len(low)]
        at += len(low)
        states[: count - first] = state
    return symbols if at == len(words) and (states == _LOWEST).all() else None
