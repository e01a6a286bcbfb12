"""Adapters: low-rank residuals for one task over a frozen compressed model, each a small folder in PEFT's format.

    adapter_config.json         rank, and which modules; the scale is 1
    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (rank, in) and lora_B.weight (out, rank)

The adapted weight is weight + left · rightᵀ: `lora_B` is the left factor, `lora_A` the transpose of the right one. An
adapter is therefore the residual of the format `low_rank_plus`; `merge` and `split` convert one into the other.
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
    """Write an adapter into an existing folder; `factors` are by module path and stored as bfloat16.

    `base` is the name of the base model. `source_sha256` is the hash of the original model in the base's provenance:
    loading refuses the adapter over an artifact with a different hash.
    """
    tensors: Tensors = {}
    for path, pair in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.right.T.to(torch.bfloat16)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.left.to(torch.bfloat16)
    ranks = {path: pair.left.shape[1] for path, pair in factors.items()}
    common_rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != common_rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None if source_sha256 is None else f"{REVISION}{source_sha256}",
        "r": common_rank,
        "lora_alpha": common_rank,
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
    """Write the artifact with the adapter merged in, as a bfloat16 residual around each format.

    The residual takes 2 · rank · (out + in) bytes per matrix, which bits per weight include.
    Errors: ArtifactError if the adapter belongs to a different model, the artifact is damaged or `out` exists.
    """
    source, factors = Path(artifact), read_adapter(adapter)
    manifest = read_manifest(source)
    _check_fit(adapter, factors, source, manifest)
    check_output(Path(out))
    # The output gets new checksums: damaged tensors must not receive valid ones.
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
    """Invert `merge`: write the artifact without the outermost residuals of its linears, and these as an adapter.

    Residuals of embeddings and experts stay: neither reallm nor PEFT could load an adapter with them.
    Errors: ArtifactError if there is no such residual, or an output folder exists.
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
            raise ArtifactError(
                f"{artifact}: {matrix.name} has an entropy-coded residual; run reallm.unpack on it first"
            )
        factors[matrix.name] = Factors(*(fmt.unpack_factor(side, stored) for side in ("left", "right")))
        coded = tuple(name.removeprefix("base.") for name in matrix.coded)
        return replace(matrix, fmt=fmt.base, coded=coded), strip_prefix("base", stored)

    def write(folder: Path) -> None:
        rewrite_artifact(source, folder, change, {"adapter": "split off"})
        if not factors:
            raise ArtifactError(
                f"{artifact}: no linear has the format low_rank_plus with bfloat16 factors; nothing to split"
            )

    _write_folder(base, write)
    original = read_manifest(source).provenance.get("source_sha256")
    _write_folder(adapter, lambda folder: save_adapter(factors, folder, base.name, original))


def _check_fit(adapter: str | Path, factors: dict[str, Factors], source: Path, manifest: Manifest) -> None:
    """Raise ArtifactError unless every pair of factors fits a compressed matrix and the original model is the same."""
    check_base(adapter, manifest.provenance)
    shapes = {matrix.name: matrix.shape for matrix in manifest.matrices}
    for path, pair in factors.items():
        shape = pair.left.shape[0], pair.right.shape[0]
        if path not in shapes:
            raise ArtifactError(
                f"{adapter}: {path} is no compressed matrix of {source}; the adapter belongs to a different model"
            )
        if shape != shapes[path]:
            raise ArtifactError(f"{adapter}: {path} has the shape {shape}, but {shapes[path]} in {source}")


def _write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder next to `out`, then rename it to `out`."""
    check_output(out)
    work = work_folder(out)
    work.mkdir()
    try:
        write(work)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
