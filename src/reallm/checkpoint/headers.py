"""Tensors of a folder of safetensors files, listed from the headers alone and read one at a time."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from reallm.checkpoint.validation import check_shard_name, read_header, read_json
from reallm.errors import ReallmError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtypes of `checkpoint.validation.DTYPE_BYTES`.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file: `nbytes` bytes of data from byte `start` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int


def weight_files(folder: Path, error: type[ReallmError]) -> list[Path]:
    """Return the safetensors files of a model folder: the single file, or the shards its index names.

    Errors: `error` if there is no safetensors file; for a single file plus an index of other files, since loaders
    differ in which they read; for an index that is unreadable or leads out of the folder; for a missing shard (named).
    """
    single, index = folder / SINGLE, folder / INDEX
    files = _index_shards(index, error) if index.is_file() else [single]
    if single.is_file() and files != [single]:
        raise error(
            f"{folder}: holds two sets of weights, {SINGLE} and the {len(files)} files that {INDEX} names, and loaders "
            "differ in which they read; keep one of them, the other in another folder"
        )
    for file in files:
        if not file.is_file():
            raise error(f"{file}: weight file is missing; copy or download the model again")
    return files


def _index_shards(index: Path, error: type[ReallmError]) -> list[Path]:
    """Return the shards that an index names, sorted."""
    try:
        shards = sorted({check_shard_name(name) for name in read_json(index, error)["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{index}: not a safetensors index ({problem}); copy or download the model again") from problem
    if not shards:
        raise error(f"{index}: names no weight file; copy or download the model again")
    return [index.parent / shard for shard in shards]


def read_headers(files: list[Path], error: type[ReallmError]) -> dict[str, Header]:
    """Return the header of every tensor of the files by name; no data is read.

    Errors: `error` naming the file if it is truncated, damaged or holds a dtype torch does not have.
    """
    headers: dict[str, Header] = {}
    for file in files:
        entries, _ = read_header(file, error)
        for name, entry in entries.items():
            if name in headers:
                raise error(f"{file}: tensor {name!r} is in {headers[name].file.name} too; download the model again")
            headers[name] = Header(file, DTYPES[entry.dtype], entry.shape, entry.nbytes, entry.start)
    return headers


def read_tensor(header: Header, index: int | None = None) -> Tensor:
    """Read a tensor, or one slice of its first axis, from its file into newly allocated memory.

    The file is not memory-mapped: truncating a mapped file kills the process, and its pages count as memory.
    Errors: OSError naming a file that was deleted, or truncated since its header was read.
    """
    shape, start = header.shape, header.start
    if index is not None:
        start, shape = start + index * header.nbytes // shape[0], shape[1:]
    tensor = torch.empty(shape, dtype=header.dtype)
    fill_buffer(header.file, start, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return tensor


def same_values(one: Header, other: Header, dtype: torch.dtype) -> bool:
    """Return whether two tensors are equal after a cast to `dtype`; stops at the first chunk of rows that differs."""
    if one == other:
        return True
    if one.shape != other.shape or not one.shape:
        return False
    rows = one.shape[0]
    step = max(1, _CHUNK * rows // max(one.nbytes, other.nbytes, 1))
    chunks = (range(start, min(start + step, rows)) for start in range(0, rows, step))
    return all(torch.equal(_rows(one, chunk).to(dtype), _rows(other, chunk).to(dtype)) for chunk in chunks)


_CHUNK = 1 << 25  # bytes


def _rows(header: Header, rows: range) -> Tensor:
    each = header.nbytes // header.shape[0]
    shape, nbytes = (len(rows), *header.shape[1:]), len(rows) * each
    return read_tensor(replace(header, shape=shape, nbytes=nbytes, start=header.start + rows.start * each))


def fill_buffer(path: Path, start: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of a file from offset `start`.

    Errors: OSError naming a file that was deleted, or ends before the buffer is full.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(buffer):
            if not (count := file.readinto(buffer)):
                raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
            buffer = buffer[count:]
