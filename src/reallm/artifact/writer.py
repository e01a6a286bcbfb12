"""Writing tensors: one file for a finished matrix, shards for the whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from reallm.formats import Tensors

# A shard is held in memory beside the libraries: a run may take 1.5 GB beyond the working set of its largest matrix.
MAX_SHARD_BYTES = 500_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file by an atomic rename: it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    # transformers refuses files whose metadata does not name the framework.
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
    os.replace(partial, path)


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to ask for it is to set it
    os.umask(mask)
    return mask


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write named tensors as one `model.safetensors`, or as numbered shards with an index when larger.

    Tensors are taken one by one and at most a shard of them is held. A tensor larger than `max_bytes` gets
    a shard of its own.
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


def _flush(held: Tensors, shards: list[list[str]], folder: Path) -> None:
    shards.append(list(held))
    save_tensors(held, folder / _unnumbered(len(shards)))


def _unnumbered(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _name_shards(shards: list[list[str]], folder: Path, total: int) -> None:
    """Give shards the names that the Hugging Face libraries expect: only now their number is known."""
    if len(shards) == 1:
        os.replace(folder / _unnumbered(1), folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / _unnumbered(number), folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
