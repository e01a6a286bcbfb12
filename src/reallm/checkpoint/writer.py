"""Write tensors: one file per finished matrix, shards for the whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reallm.formats import Tensors

# A shard is held in memory in addition to the libraries: a run may take 1.5 GB beyond the working set of its largest
# matrix.
MAX_SHARD_BYTES = 500_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_tensors(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by an atomic rename: it is either complete or absent."""
    partial = path.with_name(path.name + ".partial")
    # transformers refuses files whose metadata does not name the framework.
    metadata = {"format": "pt", **(metadata or {})}
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
    partial.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner may read
    os.replace(partial, path)


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write named tensors as one `model.safetensors`, or as numbered shards with an index above `max_bytes`.

    Tensors are consumed one by one; at most one shard of them is in memory. A tensor larger than `max_bytes` gets
    its own shard.
    """
    shards: list[list[str]] = []
    total, size, held = 0, 0, {}
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            _flush(held, shards, folder)
            size, held = 0, {}
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    _flush(held, shards, folder)
    _name_shards(shards, folder, total)


# Order of tensors in a file: by dtype, the last of this table first, then by name.
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def predict_nbytes(tensors: Iterable[tuple[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> int:
    """Return the bytes of the files that `write_shards` would write; tensors may be on the meta device."""
    shards = _predict_shards(tensors, max_bytes)
    files = sum(_file_nbytes(shard) for shard in shards)
    if len(shards) == 1:
        return files
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    return files + len(_index([list(shard) for shard in shards], total)[1])


def predict_files(tensors: Iterable[tuple[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, int]:
    """Return the number of tensors by name of every safetensors file that `write_shards` would write."""
    shards = _predict_shards(tensors, max_bytes)
    names = [SINGLE] if len(shards) == 1 else _index([list(shard) for shard in shards], 0)[0]
    return {name: len(shard) for name, shard in zip(names, shards, strict=True)}


def _predict_shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> list[Tensors]:
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _file_nbytes(tensors: Tensors) -> int:
    """Return the bytes of a safetensors file: length field, header (JSON padded to a multiple of 8) and data."""
    places = {dtype: place for place, dtype in enumerate(_DTYPES)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-places[tensors[name].dtype], name)):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _flush(held: Tensors, shards: list[list[str]], folder: Path) -> None:
    shards.append(list(held))
    save_tensors(held, folder / _temporary_name(len(shards)))


def _temporary_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _name_shards(shards: list[list[str]], folder: Path, total: int) -> None:
    """Rename shards as the Hugging Face libraries expect; their total number is known only at the end."""
    if len(shards) == 1:
        os.replace(folder / _temporary_name(1), folder / SINGLE)
        return
    names, index = _index(shards, total)
    for number, name in enumerate(names, 1):
        os.replace(folder / _temporary_name(number), folder / name)
    (folder / INDEX).write_text(index, encoding="utf-8")


def _index(shards: list[list[str]], total: int) -> tuple[list[str], str]:
    """Return the names of the shards and the text of the index."""
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return names, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
