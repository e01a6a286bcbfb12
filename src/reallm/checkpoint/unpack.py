"""Read the output of `reallm pack` with numpy and the standard library alone: copy this file to where it is needed.

    python unpack.py FILE            # lists its content
    tensors = unpack("FILE")         # {name: array}
    code = files("FILE")             # {name: bytes}

Written from docs/artifact.md alone, as any other decoder would be. Only matrices in the format `entropy_coded` need
one more package, constriction.
"""

import json
import lzma
import math
import zlib
from pathlib import Path
from statistics import NormalDist

import numpy as np

MAGIC = b"RLM1"
DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "BOOL": "?"}
# Limits: bytes of the JSON; bytes of code per byte of the file; weights per stored byte of a matrix.
MOST_JSON, MOST, MOST_WEIGHTS = 32_000_000, 4096, 128
READ_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
READ_ERRORS += (lzma.LZMAError, zlib.error)
DTYPES |= {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def unpack(path):
    """Return {name: array} of a packed file; bfloat16, which numpy lacks, becomes float32.

    Errors: ValueError for a file that is not a packed file, damaged or forged; memory is bounded by its size.
    """
    return _read(path, _tensors)


def files(path):
    """Return {name: bytes} of the code files that were packed."""
    return _read(path, _files)


def _read(path, parse):
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give the file that reallm pack wrote")
    data = Path(path).read_bytes()
    if data[:4] != MAGIC or zlib.crc32(data[12:]) != int.from_bytes(data[8:12], "little"):
        raise ValueError(f"{path}: not a file of reallm pack, or damaged")
    try:
        size = int.from_bytes(data[4:8], "little")
        header = json.loads(_decompress(zlib.decompressobj(), data[12 : 12 + size], MOST_JSON))
        return parse(header, data, 12 + size)
    except READ_ERRORS as problem:
        raise ValueError(f"{path}: damaged or forged ({type(problem).__name__}: {problem})") from problem


def _tensors(header, data, at):
    found = {}
    for entry in header["tensors"]:
        stored = {}
        for local, dtype, shape, size, coded in entry["stored"]:
            stored[local] = _array(data[at : at + _size(size)], dtype, shape, coded)
            at += size
        held = sum(array.nbytes for array in stored.values())
        if entry["format"] and math.prod(map(_size, entry["matrix"])) > MOST_WEIGHTS * held:
            raise ValueError("a matrix has more weights than the file can hold")
        found[entry["name"]] = _values(entry, stored)
    for name, owner in header["same"].items():
        found[name] = found[owner]
    return found


def _files(header, data, at):
    at += sum(_size(item[3]) for entry in header["tensors"] for item in entry["stored"])
    found = {}
    for name, size in header["files"]:
        found[name] = _decompress(lzma.LZMADecompressor(), data[at : at + _size(size)], MOST * len(data))
        at += size
    return found


def _decompress(decompressor, data, most):
    """Return the decompressed bytes. Errors: ValueError if the stream is truncated or holds more than `most` bytes."""
    found = decompressor.decompress(data, most)
    if not decompressor.eof:
        raise ValueError("a compressed stream is truncated or too large")
    return found


def _size(number):
    if type(number) is not int or not 0 <= number < 1 << 40:
        raise ValueError(f"{number!r} is not a size")
    return number


def _array(data, dtype, shape, coded):
    kind = np.dtype(DTYPES[dtype])
    nbytes = math.prod(map(_size, shape)) * kind.itemsize
    return np.frombuffer(_decode_entropy(data, nbytes) if coded else data, kind).reshape(shape)


def _floats(array, dtype):
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _values(entry, stored):
    """Return a stored tensor, or the decoded matrix of its format, in the original shape and dtype."""
    fmt, dtype = entry["format"], entry["dtype"]
    if fmt is None:
        return _floats(stored["values"], dtype)
    rows, columns = entry["matrix"]
    weight = {"dense": _dense, "uniform": _uniform, "normal_float": _normal_float, "codebook": _codebook}.get(
        fmt["format"], _entropy_coded
    )(fmt, stored, rows, columns)
    return weight.reshape(entry["shape"]).astype(np.float32 if dtype == "BF16" else DTYPES[dtype])


def _dense(fmt, stored, rows, columns):
    return _floats(stored["values"], {"bfloat16": "BF16"}.get(fmt["dtype"]))


def _uniform(fmt, stored, rows, columns):
    bits = fmt["bits"]
    codes = _codes(stored["codes"], bits, rows * columns).reshape(rows, columns)
    if fmt["symmetric"]:
        zero = np.float32(2 ** (bits - 1) if bits > 1 else 0.5)
    else:
        groups = math.ceil(columns / (fmt["group_size"] or columns))
        zero = _expand_groups(
            _codes(stored["zeros"], bits, rows * groups).astype(np.float32).reshape(rows, groups), fmt, columns
        )
    return (codes - zero) * _scales(fmt, stored, rows, columns)


def _normal_float(fmt, stored, rows, columns):
    bits = fmt["bits"]
    codes = _codes(stored["codes"], bits, rows * columns).reshape(rows, columns)
    return _levels(bits)[codes] * _scales(fmt, stored, rows, columns)


def _codebook(fmt, stored, rows, columns):
    vectors = math.ceil(columns / fmt["vector_dim"])
    if stored["codebook"].shape != (2 ** min(fmt["index_bits"], 16), fmt["vector_dim"]) or fmt["vector_dim"] > 16:
        raise ValueError("the shape of a codebook differs from its format")
    codes = _codes(stored["codes"], fmt["index_bits"], rows * vectors)
    values = stored["codebook"].astype(np.float32)[codes].reshape(rows, -1)[:, :columns]
    return values * _scales(fmt, stored, rows, columns)


def _codes(packed, bits, count):
    """Unpack `count` codes of 1 to 16 bits; above 8 bits the low bytes come first, then the high bits."""
    if not 0 < bits <= 16 or packed.dtype != np.uint8:
        raise ValueError(f"codes of {bits} bits")
    if bits > 8:
        return packed[:count] | _codes(packed[count:], bits - 8, count).astype(np.int64) << 8
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def _scales(fmt, stored, rows, columns):
    scales = stored["scales"].astype(np.float32)
    if fmt["scales"] == "two_level":
        ratio = scales / np.float32(np.iinfo(stored["scales"].dtype).max)
        scales = ratio * np.abs(ratio) * np.repeat(stored["scales_max"], 256)[: len(scales)]
    return _expand_groups(scales.reshape(rows, -1), fmt, columns)


def _expand_groups(groups, fmt, columns):
    return np.repeat(groups, min(fmt["group_size"] or columns, columns), axis=1)[:, :columns]


def _levels(bits):
    if not 0 < bits <= 8:
        raise ValueError(f"levels of {bits} bits")
    if bits == 1:
        return np.array([-1.0, 1.0], np.float32)
    n = 2**bits
    tail = (1 / (2 * n) + 1 / (2 * n - 2)) / 2
    low, high = ([NormalDist().inv_cdf(tail + k * (0.5 - tail) / m) for k in range(m)] for m in (n // 2 - 1, n // 2))
    levels = sorted([*low, 0.0, *(-q for q in high)])
    return (np.array(levels) / levels[-1]).astype(np.float32)


def _weights(table):
    table = table.astype(np.int64)
    return np.where(table > 0, (16 + table % 16) << (table // 16), 0)


def _decode_entropy(data, nbytes):
    """Return the bytes of an entropy-coded tensor."""
    width = data[0]
    # The packer uses LZMA up to 256 KB, and at most 2,048 steps in each lane of four bytes.
    most = 2**18 if width == 0 else 2048 * len(data) // 4 * width // 8
    if width > 8 or nbytes > most:
        raise ValueError("a tensor decodes to more bytes than its code can represent")
    if width == 0:
        filters = [{"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20}]
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data[1:], nbytes)
    lanes, start = int.from_bytes(data[1:5], "little"), 5 + 2**width
    table = np.frombuffer(data[5:start], np.uint8)
    freqs = (table > 0) + _weights(table) * (2**14 - (table > 0).sum()) // _weights(table).sum()
    freqs[freqs.argmax()] += 2**14 - freqs.sum()
    starts, symbol_of = np.cumsum(freqs) - freqs, np.repeat(np.arange(2**width, dtype=np.uint8), freqs)
    states = np.frombuffer(data[start : start + 4 * lanes], "<u4").astype(np.int64)
    words, at = np.frombuffer(data[start + 4 * lanes :], "<u2"), 0
    symbols = np.empty(-(-8 * nbytes // width), np.uint8)
    for first in range(0, len(symbols), lanes):
        state = states[: len(symbols) - first]
        slot = state % 2**14
        symbol = symbols[first : first + lanes] = symbol_of[slot]
        state[:] = (state >> 14) * freqs[symbol] + slot - starts[symbol]
        low = np.flatnonzero(state < 2**16)
        state[low] = state[low] << 16 | words[at : at + len(low)]
        at += len(low)
    bits = (symbols[:, None] >> np.arange(width, dtype=np.uint8) & 1).reshape(-1)
    return np.packbits(bits[: 8 * nbytes], bitorder="little").tobytes()


def _entropy_coded(fmt, stored, rows, columns):
    from constriction import stream

    words = stored["codes"].view("<u4")
    used = np.flatnonzero(words)
    coder = stream.stack.AnsCoder(np.array(words[: used[-1] + 1 if len(used) else 0], np.uint32))
    classes = np.zeros(columns, np.int64)
    if fmt["classes"] > 1:
        classes = _codes(stored["column_classes"], (fmt["classes"] - 1).bit_length(), columns)
    codes = np.zeros((rows, columns), np.int64)
    for number, table in enumerate(stored["frequencies"]):
        codes[:, classes == number] = _points(stream.model, coder, table, rows, int((classes == number).sum()))
    return codes * stored["step"]


def _points(models, coder, table, rows, columns):
    """Decode the codes of one class; each group of eight rows is a point of the E8 lattice."""
    most = len(table) // 2
    values = np.arange(-most, most + 1)

    def read(count, modulus, residue):
        if not count:
            return np.zeros(0, np.int64)
        weights = np.where((values % modulus == residue) | (abs(values) == most), _weights(table), 0)
        freqs = weights * 2**24 // weights.sum()
        freqs[freqs.argmax()] += 2**24 - freqs.sum()
        possible = np.flatnonzero(freqs)
        found = np.full(count, possible[0])
        if len(possible) > 1:
            found = possible[
                coder.decode(models.Categorical((freqs[possible] - 1).astype(float), perfect=False), count)
            ]
        found, large = found - most, np.abs(found - most) == most
        if large.any():
            found[large] += np.sign(found[large]) * coder.decode(models.Uniform(2**16), int(large.sum()))
        return found

    blocks = np.zeros((rows // 8, 8, columns), np.int64)
    first, middle, last = blocks[:, 0], blocks[:, 1:-1].transpose(0, 2, 1), blocks[:, -1]
    first[:] = read(first.size, 1, 0).reshape(first.shape)
    for parity in range(2):
        where = first % 2 == parity
        middle[where] = read(int(where.sum()) * 6, 2, parity).reshape(-1, 6)
    residues = -blocks[:, :-1].sum(1) % 4
    for residue in range(4):
        last[residues == residue] = read(int((residues == residue).sum()), 4, residue)
    rest = read(rows % 8 * columns, 2, 0).reshape(rows % 8, columns)
    return np.concatenate([blocks.reshape(-1, columns), rest])


if __name__ == "__main__":
    import sys

    for name, array in unpack(sys.argv[1]).items():
        print(name, array.dtype, array.shape)
    for name, text in files(sys.argv[1]).items():
        print(name, len(text), "bytes")
