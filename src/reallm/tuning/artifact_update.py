"""Rewrite an artifact: new values in the same layout, or new formats around the same codes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.checkpoint import Manifest, StoredMatrix, read_ledger, read_manifest, write_shards
from reallm.checkpoint.checksums import compute_checksums
from reallm.checkpoint.entropy_coding import decode_tensor, encode_tensor
from reallm.checkpoint.headers import weight_files
from reallm.checkpoint.writer import INDEX
from reallm.errors import ArtifactError, RecipeError
from reallm.formats import Tensors, named_tensors, replace_tensors, use_shared_decoders
from reallm.formats.base import add_prefix, strip_prefix
from reallm.formats.shared_decoders import PREFIX as SHARED

CONFIG, PLAN = "config.json", "plan.yaml"

# (matrix, its stored tensors by local name) -> the matrix and tensors to write.
Change = Callable[[StoredMatrix, Tensors], tuple[StoredMatrix, Tensors]]


def check_size(artifact: Path, groups: Collection[str]) -> None:
    """Raise RecipeError if training these parameter groups could push the artifact beyond its size limit.

    Only entropy-coded tensors can grow: in the worst case they take their raw bytes.
    """
    ledger, size = read_ledger(artifact), read_manifest(artifact).size
    growth: Counter[str] = Counter()
    for row in ledger.entropy_coded_rows:
        if row.role in groups and (row.kind == "block" or row.kind in groups):
            growth[row.role] += (row.raw_nbytes or row.nbytes) - row.nbytes
    if size is not None and growth and (most := ledger.total_bytes + growth.total()) > size:
        raise RecipeError(
            f"--train {', '.join(growth)}: these are entropy-coded and could grow the artifact from "
            f"{ledger.total_bytes:,} to {most:,} bytes, but {artifact} has a size limit of {size:,}; leave them out"
        )


def write_tuned(source: Path, staging: Path, trained: Tensors, note: dict[str, Any]) -> None:
    """Write the artifact `source` with the `trained` tensors to the existing folder `staging`.

    `trained` maps stored names to unpacked tensors in natural units, unquantized tensors and packed shared decoders.
    `note`, most important entries first, is appended to the provenance's list `tuned`. All other files are copied.
    Trained tensors that are entropy-coded are encoded again, and may take a few bytes more or fewer.
    """

    def change(matrix: StoredMatrix, stored: Tensors) -> tuple[StoredMatrix, Tensors]:
        changed = strip_prefix(matrix.name, trained)
        return _update_matrix(matrix, stored, changed) if changed else (matrix, stored)

    rewrite_artifact(source, staging, change, note, trained)


def rewrite_artifact(
    source: Path, staging: Path, change: Change, note: dict[str, Any], unquantized: Tensors | None = None
) -> None:
    """Write the artifact `source` with `change` applied to every matrix, and `unquantized` replacing tensors by name.

    plan.yaml is copied only if every format stays. An artifact with a size limit stays below it: notes of earlier
    tuning runs are dropped, and if that is not enough, the limit is removed from the provenance.
    """
    manifest = read_manifest(source)
    matrices: list[StoredMatrix] = []
    write_shards(_tensors(source, change, unquantized or {}, matrices), staging)
    same_formats = [m.fmt for m in matrices] == [m.fmt for m in manifest.matrices]
    left_out = (CONFIG, INDEX) if same_formats else (CONFIG, INDEX, PLAN)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        if file.suffix != ".safetensors" and file.name not in left_out:
            target = staging / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    checksums = compute_checksums(staging.glob("*.safetensors"))
    manifest = replace(manifest, matrices=tuple(matrices), checksums=checksums)
    headroom = None if manifest.size is None else manifest.size - folder_nbytes(staging)
    (staging / CONFIG).write_text(_config_text(config, manifest, note, headroom), encoding="utf-8")


def folder_nbytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _config_text(config: dict[str, Any], manifest: Manifest, note: dict[str, Any], headroom: int | None) -> str:
    """Return config.json with `note` after the notes of earlier runs; the oldest are dropped to fit `headroom` bytes.

    If the weights alone leave no headroom, all notes stay and the size limit is removed.
    """

    def text(provenance: dict[str, Any]) -> str:
        section = config["quantization_config"] | replace(manifest, provenance=provenance).to_dict()
        return json.dumps(config | {"quantization_config": section}, indent=2, sort_keys=True) + "\n"

    earlier = manifest.provenance.get("tuned")
    notes = [one for one in earlier if isinstance(one, dict)] if isinstance(earlier, list) else []
    notes.append(note)
    others = {key: value for key, value in manifest.provenance.items() if key != "tuned"}
    for fewer in _truncate_notes(notes):
        candidate = text({**others, **({"tuned": fewer} if fewer else {})})
        if headroom is None or len(candidate.encode()) <= headroom:
            return candidate
    del others["size"]
    return text({**others, "tuned": notes})


def _truncate_notes(notes: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield all notes, then without the oldest (the next one counts them as `earlier`), then a shrinking last note."""
    yield notes
    remaining, dropped = list(notes), 0
    while len(remaining) > 1:
        before = remaining.pop(0).get("earlier")
        dropped += 1 + (before if type(before) is int else 0)
        yield [{"earlier": dropped, **remaining[0]}, *remaining[1:]]
    items = [*({"earlier": dropped} if dropped else {}).items(), *remaining[0].items()]
    yield from ([dict(items[:count])] for count in range(len(items) - 1, 0, -1))
    yield []


def _tensors(
    source: Path, change: Change, unquantized: Tensors, matrices: list[StoredMatrix]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, compressed matrices first: the order of the source, so that the shards are the same.

    Appends to `matrices` how each matrix is stored now.
    """
    handles = [safe_open(file, framework="pt") for file in weight_files(source, ArtifactError)]
    places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no dict
    manifest = read_manifest(source)
    full = {
        name: {local: f"{SHARED}.{name}.{local}" for local in t.layout} for name, t in manifest.shared_decoders.items()
    }
    shared_decoders = {
        name: {local: places[path].get_tensor(path) for local, path in paths.items()} for name, paths in full.items()
    }
    for matrix in manifest.matrices:
        names = [f"{matrix.name}.{local}" for local in matrix.fmt.layout(matrix.shape)]
        stored = strip_prefix(matrix.name, {name: places.pop(name).get_tensor(name) for name in names})
        with use_shared_decoders(shared_decoders):
            matrix, stored = change(matrix, stored)
        matrices.append(matrix)
        yield from sorted(add_prefix(matrix.name, stored).items())
    for name, handle in places.items():
        tensor = unquantized.get(name)
        yield name, handle.get_tensor(name) if tensor is None else tensor


def _update_matrix(matrix: StoredMatrix, stored: Tensors, changed: Tensors) -> tuple[StoredMatrix, Tensors]:
    """Return a matrix and its stored tensors with some unpacked tensors changed."""
    layout = matrix.fmt.layout(matrix.shape)
    plain = {n: decode_tensor(t, layout[n]) if n in matrix.coded else t for n, t in stored.items()}
    unpacked = matrix.fmt.unpack(plain, matrix.shape)
    own = {name: value for name, value in changed.items() if name in named_tensors(unpacked)}
    packed = matrix.fmt.pack(replace_tensors(unpacked, own), matrix.shape)
    assert _sizes(packed) == _sizes(plain), f"{matrix.name}: tuning changed the stored layout"
    tensors, names = dict(packed), []
    for name in matrix.coded:
        coded = stored[name] if torch.equal(packed[name], plain[name]) else encode_tensor(packed[name])
        if coded is not None:
            tensors[name] = coded
            names.append(name)
    return replace(matrix, coded=tuple(names)), tensors


def _sizes(tensors: Tensors) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
