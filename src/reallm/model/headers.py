"""What a folder of safetensors files holds, read from the headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from reallm.errors import ReallmError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtype words of the safetensors specification that torch has too.
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
    """One tensor of a safetensors file; `nbytes` is what its data takes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def weight_files(folder: Path, error: type[ReallmError]) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards its index names.

    Errors: `error` for no safetensors at all, an unreadable index or a missing shard (named).
    """
    if (index := folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as problem:
            raise error(f"{index}: not a safetensors index ({problem}); copy or download the model again") from problem
        files = [folder / shard for shard in shards]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise error(f"{file}: weight file is missing; copy or download the model again")
    return files


def read_headers(files: list[Path], error: type[ReallmError]) -> dict[str, Header]:
    """Every tensor of the files by name, without reading any data.

    Errors: `error` naming the file if it is cut short, damaged or holds a dtype torch does not have.
    """
    headers: dict[str, Header] = {}
    for file in files:
        headers.update(_read_header(file, error))
    return headers


def _read_header(file: Path, error: type[ReallmError]) -> dict[str, Header]:
    """One file: 8 bytes of length, JSON, then the data up to the largest offset."""
    damaged = f"{file}: damaged safetensors file; copy or download the model again"
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # A length beyond the file would make read() try to allocate garbage sizes.
            if length > file.stat().st_size:
                raise error(damaged)
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        headers = {
            name: Header(file, DTYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0])
            for name, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{damaged} ({type(problem).__name__}: {problem})") from problem
    if 8 + length + sum(h.nbytes for h in headers.values()) != file.stat().st_size:
        raise error(damaged)
    return headers
