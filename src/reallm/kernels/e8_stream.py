"""Points of the lattice E8 as an entropy-coded stream of words.

In units of 1/2 a point of E8 is eight integers, all even or all odd, whose sum is a multiple of 4 (Conway and Sloane,
Sphere Packings, chapter 4). A stream therefore codes the first integer with the whole histogram, the next six with the
half that has the same parity, and the last with a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reallm.kernels.ans import RAW_BITS, AnsReader, AnsWriter, normalize_frequencies

DIM = 8
_MANTISSA = 16


def largest_code(levels: int) -> int:
    """Return the largest magnitude that can be written with a frequency table up to magnitude `levels`."""
    return levels + (1 << RAW_BITS) - 1


def are_lattice_points(codes: np.ndarray) -> bool:
    """Return whether (rows, columns) codes are lattice points: eight consecutive rows of a column, other rows even."""
    blocks, remaining = _split(codes)
    parity_ok = ((blocks - blocks[:, :1]) % 2 == 0).all() and (remaining % 2 == 0).all()
    return bool(parity_ok and (blocks.sum(1) % 4 == 0).all())


def frequency_table(codes: np.ndarray, levels: int) -> np.ndarray:
    """Return the histogram of codes clamped to ±levels, one byte per code: 0 for none, else a float of 4 + 4 bits.

    The relative error of a count is at most 1/32; counts below 2^-15 of the largest are raised to that.
    """
    counts = np.bincount((np.clip(codes, -levels, levels) + levels).reshape(-1), minlength=2 * levels + 1)
    if not counts.any():
        return counts.astype(np.uint8)
    steps = _weights(np.arange(256))
    scaled = counts / counts.max() * steps[-1]
    between = (steps[1:] + steps[:-1]) / 2
    bytes_ = np.clip(np.searchsorted(between, scaled), 1, 255)
    return np.where(counts > 0, bytes_, 0).astype(np.uint8)


def write_codes(writer: AnsWriter, codes: np.ndarray, table: np.ndarray) -> None:
    """Write (rows, columns) lattice codes of magnitude up to `largest_code` with the histogram `table`."""
    levels = len(table) // 2
    for values, frequencies in reversed(list(_runs(codes, table))):
        clamped = np.clip(values, -levels, levels)
        writer.write_raw(np.abs(values[np.abs(clamped) == levels]) - levels)
        writer.write(clamped + levels, frequencies)


def read_codes(reader: AnsReader, rows: int, columns: int, table: np.ndarray) -> np.ndarray:
    """Read (rows, columns) codes, int64: the inverse of `write_codes`."""
    blocks = np.zeros((rows // DIM, DIM, columns), np.int64)
    first, middle, last = blocks[:, 0], blocks[:, 1:-1].transpose(0, 2, 1), blocks[:, -1]
    first[:] = _read(reader, first.size, _frequencies(table, 1, 0)).reshape(first.shape)
    for parity in range(2):
        where = first % 2 == parity
        run = _read(reader, int(where.sum()) * (DIM - 2), _frequencies(table, 2, parity))
        middle[where] = run.reshape(-1, DIM - 2)
    residues = -blocks[:, :-1].sum(1) % 4
    for residue in range(4):
        where = residues == residue
        last[where] = _read(reader, int(where.sum()), _frequencies(table, 4, residue))
    remaining = _read(reader, rows % DIM * columns, _frequencies(table, 2, 0)).reshape(rows % DIM, columns)
    return np.concatenate([blocks.reshape(rows // DIM * DIM, columns), remaining])


def _runs(codes: np.ndarray, table: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (codes, frequencies) for runs of codes that share a frequency model, in reading order."""
    blocks, remaining = _split(codes)
    first, middle, last = blocks[:, 0], blocks[:, 1:-1].transpose(0, 2, 1), blocks[:, -1]
    yield first.reshape(-1), _frequencies(table, 1, 0)
    for parity in range(2):
        yield middle[first % 2 == parity].reshape(-1), _frequencies(table, 2, parity)
    residues = -blocks[:, :-1].sum(1) % 4
    for residue in range(4):
        yield last[residues == residue], _frequencies(table, 4, residue)
    yield remaining.reshape(-1), _frequencies(table, 2, 0)


def _read(reader: AnsReader, count: int, frequencies: np.ndarray) -> np.ndarray:
    levels = len(frequencies) // 2
    values = reader.read(count, frequencies) - levels
    escaped = np.abs(values) == levels
    values[escaped] += np.sign(values[escaped]) * reader.read_raw(int(escaped.sum()))
    return values


def _frequencies(table: np.ndarray, modulus: int, residue: int) -> np.ndarray:
    """Return the frequencies of the codes of a residue class. The outermost codes escape larger ones of any class."""
    levels = len(table) // 2
    codes = np.arange(-levels, levels + 1)
    allowed = (codes % modulus == residue) | (np.abs(codes) == levels)
    return normalize_frequencies(np.where(allowed, _weights(table), 0))


def _weights(table: np.ndarray) -> np.ndarray:
    """Decode table bytes: b > 0 means (16 + b mod 16) · 2^(b div 16)."""
    table = table.astype(np.int64)
    return np.where(table > 0, (_MANTISSA + table % _MANTISSA) << (table // _MANTISSA), 0)


def _split(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (blocks, 8, columns) points and the remaining rows."""
    count = len(codes) // DIM
    return codes[: count * DIM].reshape(count, DIM, codes.shape[1]), codes[count * DIM :]
