"""A tuned artifact: the tensors of the one it comes from, some of them with other values, not one byte more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reallm.artifact import read_manifest, write_shards
from reallm.artifact.writer import INDEX
from reallm.errors import ArtifactError
from reallm.formats import Tensors, named_tensors, with_tensors
from reallm.formats.waist import inner, under
from reallm.model.headers import weight_files

CONFIG = "config.json"


def write_tuned(source: Path, staging: Path, trained: Tensors, note: dict[str, Any]) -> None:
    """Write the artifact of `source` with `trained` put in to the folder `staging`, which exists.

    `trained` are parts in natural units and kept tensors, by the name of what is stored of them. `note` is added to
    the provenance's list `tuned`. All other files are copied.
    """
    write_shards(_tensors(source, trained), staging)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        if file.suffix != ".safetensors" and file.name not in (CONFIG, INDEX):
            target = staging / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    provenance = config["quantization_config"].setdefault("provenance", {})
    provenance["tuned"] = [*provenance.get("tuned", []), note]
    (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(source: Path, trained: Tensors) -> Iterator[tuple[str, Tensor]]:
    """All tensors, compressed matrices first: the order in which they were written, so that shards are the same."""
    handles = [safe_open(file, framework="pt") for file in weight_files(source, ArtifactError)]
    places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no dict
    for matrix in read_manifest(source).matrices:
        layout = matrix.fmt.layout(matrix.shape)
        tensors = {local: places.pop(f"{matrix.name}.{local}").get_tensor(f"{matrix.name}.{local}") for local in layout}
        if changed := inner(matrix.name, trained):
            parts = matrix.fmt.unpack(tensors, matrix.shape)
            own = {name: value for name, value in changed.items() if name in named_tensors(parts)}
            packed = matrix.fmt.pack(with_tensors(parts, own), matrix.shape)
            assert _sizes(packed) == _sizes(tensors), f"{matrix.name}: tuning changed what is stored"
            tensors = packed
        yield from sorted(under(matrix.name, tensors).items())
    for name, handle in places.items():
        tensor = trained.get(name, None)
        yield name, handle.get_tensor(name) if tensor is None else tensor


def _sizes(tensors: Tensors) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
