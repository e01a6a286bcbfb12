"""A tuned artifact: the tensors of the one it comes from, some of them with other values, not one byte more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.artifact import StoredMatrix, read_manifest, write_shards
from reallm.artifact.coding import coded_tensor, decoded_tensor
from reallm.artifact.writer import INDEX
from reallm.errors import ArtifactError
from reallm.formats import Tensors, named_tensors, with_tensors
from reallm.formats.waist import inner, under
from reallm.model.headers import weight_files

CONFIG = "config.json"


def write_tuned(source: Path, staging: Path, trained: Tensors, note: dict[str, Any]) -> None:
    """Write the artifact of `source` with `trained` put in to the folder `staging`, which exists.

    `trained` are parts in natural units and kept tensors, by the name of what is stored of them. `note` is added to
    the provenance's list `tuned`. All other files are copied. Of an artifact with entropy-coded tensors those that
    trained are coded anew, and may take some bytes more or fewer.
    """
    coded: dict[str, tuple[str, ...]] = {}
    write_shards(_tensors(source, trained, coded), staging)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        if file.suffix != ".safetensors" and file.name not in (CONFIG, INDEX):
            target = staging / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    _write_config(source, staging, coded, note)


def _write_config(source: Path, staging: Path, coded: dict[str, tuple[str, ...]], note: dict[str, Any]) -> None:
    """The config of the source with a longer provenance, and the names of what is coded now."""
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    manifest = read_manifest(source)
    provenance = {**manifest.provenance, "tuned": [*manifest.provenance.get("tuned", []), note]}
    matrices = tuple(replace(matrix, coded=coded.get(matrix.name, ())) for matrix in manifest.matrices)
    config["quantization_config"] |= replace(manifest, matrices=matrices, provenance=provenance).to_dict()
    (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(source: Path, trained: Tensors, coded: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors, compressed matrices first: the order in which they were written, so that shards are the same.

    Notes in `coded` the local names of entropy-coded ones, by matrix.
    """
    handles = [safe_open(file, framework="pt") for file in weight_files(source, ArtifactError)]
    places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no dict
    for matrix in read_manifest(source).matrices:
        layout = matrix.fmt.layout(matrix.shape)
        tensors = {local: places.pop(f"{matrix.name}.{local}").get_tensor(f"{matrix.name}.{local}") for local in layout}
        names = matrix.coded
        if changed := inner(matrix.name, trained):
            tensors, names = _retrained(matrix, tensors, changed)
        coded[matrix.name] = names
        yield from sorted(under(matrix.name, tensors).items())
    for name, handle in places.items():
        tensor = trained.get(name, None)
        yield name, handle.get_tensor(name) if tensor is None else tensor


def _retrained(matrix: StoredMatrix, stored: Tensors, changed: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """What is stored of a matrix with other parts, and the names of what is coded of it."""
    layout = matrix.fmt.layout(matrix.shape)
    plain = {n: decoded_tensor(t, layout[n]) if n in matrix.coded else t for n, t in stored.items()}
    parts = matrix.fmt.unpack(plain, matrix.shape)
    own = {name: value for name, value in changed.items() if name in named_tensors(parts)}
    packed = matrix.fmt.pack(with_tensors(parts, own), matrix.shape)
    assert _sizes(packed) == _sizes(plain), f"{matrix.name}: tuning changed what is stored"
    tensors, names = dict(packed), []
    for name in matrix.coded:
        kept = stored[name] if torch.equal(packed[name], plain[name]) else coded_tensor(packed[name])
        if kept is not None:
            tensors[name] = kept
            names.append(name)
    return tensors, tuple(names)


def _sizes(tensors: Tensors) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
