"""Adapters: residuals for a task over one frozen compressed model, each a small folder in the form that PEFT reads.

    adapter_config.json         rank, and which modules; the scale is 1
    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (rank, in) and lora_B.weight (out, rank)

weight + left · rightᵀ: `lora_B` is the left factor and `lora_A` the right one, transposed. So an adapter is a residual
of the format `low_rank_plus`, and the one becomes the other: `merge` and `split`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from reallm.checkpoint import Manifest, StoredMatrix, check_output, read_manifest, save_tensors, work_folder
from reallm.checkpoint.checksums import verify
from reallm.checkpoint.headers import weight_files
from reallm.errors import ArtifactError, FormatError
from reallm.formats import Tensors
from reallm.formats.base import add_prefix, strip_prefix
from reallm.formats.low_rank_plus import BFLOAT16, LowRankPlus
from reallm.hf.adapters import CONFIG, PREFIX, REVISION, WEIGHTS, Adapters, Factors, check_base, read_adapter
from reallm.source.model_source import read_config
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import meta_model, walk
from reallm.tuning.artifact_update import rewrite_artifact

__all__ = ["Adapters", "Factors", "merge", "read_adapter", "save_adapter", "split"]


def save_adapter(factors: dict[str, Factors], folder: Path, base: str, source_sha256: str | None = None) -> None:
    """Write an adapter, by module path, into the existing folder; factors are stored as bfloat16.

    `base` is the name of the model that it belongs to, `source_sha256` what the provenance of that says of its
    original: over artifacts that say another the adapter is refused.
    """
    tensors: Tensors = {}
    for path, pair in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.right.T.to(torch.bfloat16)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.left.to(torch.bfloat16)
    ranks = {path: pair.left.shape[1] for path, pair in factors.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None if source_sha256 is None else f"{REVISION}{source_sha256}",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merge(artifact: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the artifact with the adapter in it, as a bfloat16 residual around each format.

    That takes 2 · rank · (out + in) bytes per matrix, which its bits count.
    Errors: ArtifactError if the adapter is of another model, the artifact is damaged or `out` is in the way.
    """
    source, factors = Path(artifact), read_adapter(adapter)
    manifest = read_manifest(source)
    _check_fit(adapter, factors, source, manifest)
    check_output(Path(out))
    # The checksums are made again: what is damaged must not get right ones.
    verify(weight_files(source, ArtifactError), manifest.checksums)

    def change(matrix: StoredMatrix, stored: Tensors) -> tuple[StoredMatrix, Tensors]:
        pair = factors.get(matrix.name)
        if pair is None:
            return matrix, stored
        fmt = LowRankPlus(matrix.fmt, pair.left.shape[1])
        try:
            fmt.check(matrix.shape)
        except FormatError as error:
            raise ArtifactError(f"{adapter}: {matrix.name}: {error}") from error
        packed = fmt.pack_factor("left", pair.left) | fmt.pack_factor("right", pair.right)
        coded = tuple(f"base.{name}" for name in matrix.coded)
        return replace(matrix, fmt=fmt, coded=coded), packed | add_prefix("base", stored)

    _write_folder(Path(out), lambda folder: rewrite_artifact(source, folder, change, {"adapter": "merged"}))


def split(artifact: str | Path, base: str | Path, adapter: str | Path) -> None:
    """The inverse of `merge`: the artifact without its linears' residuals that lie outermost, and these as an adapter.

    Those of embeddings and experts stay: neither we nor PEFT could load an adapter with them.
    Errors: ArtifactError if there are none, or a folder to write is in the way.
    """
    source, base, adapter = Path(artifact), Path(base), Path(adapter)
    check_output(adapter)
    factors: dict[str, Factors] = {}
    with silence_transformers():
        walked = walk(meta_model(read_config(source, str(source))))
    linears = {matrix.name for matrix in walked.matrices if matrix.kind != "embedding" and matrix.expert is None}

    def change(matrix: StoredMatrix, stored: Tensors) -> tuple[StoredMatrix, Tensors]:
        fmt = matrix.fmt
        if matrix.name not in linears or fmt.residual_dtype() != BFLOAT16:
            return matrix, stored
        if {"left", "right"} & set(matrix.coded):
            raise ArtifactError(f"{artifact}: {matrix.name} has an entropy-coded residual; reallm.unpack it first")
        factors[matrix.name] = Factors(*(fmt.unpack_factor(side, stored) for side in ("left", "right")))
        coded = tuple(name.removeprefix("base.") for name in matrix.coded)
        return replace(matrix, fmt=fmt.base, coded=coded), strip_prefix("base", stored)

    def write(folder: Path) -> None:
        rewrite_artifact(source, folder, change, {"adapter": "split off"})
        if not factors:
            raise ArtifactError(f"{artifact}: no linear of it is low_rank_plus with bfloat16 factors; nothing to split")

    _write_folder(base, write)
    original = read_manifest(source).provenance.get("source_sha256")
    _write_folder(adapter, lambda folder: save_adapter(factors, folder, base.name, original))


def _check_fit(adapter: str | Path, factors: dict[str, Factors], source: Path, manifest: Manifest) -> None:
    """Errors: ArtifactError unless each pair of factors is of a compressed matrix, and of the same original."""
    check_base(adapter, manifest.provenance)
    shapes = {matrix.name: matrix.shape for matrix in manifest.matrices}
    for path, pair in factors.items():
        shape = pair.left.shape[0], pair.right.shape[0]
        if path not in shapes:
            raise ArtifactError(f"{adapter}: {path} is no compressed matrix of {source}; it is of another model")
        if shape != shapes[path]:
            raise ArtifactError(f"{adapter}: {path} has another shape, {shape}, than in {source}, {shapes[path]}")


def _write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written beside its place, and put it there by one rename."""
    check_output(out)
    work = work_folder(out)
    work.mkdir()
    try:
        write(work)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
