"""Bytes that a model takes in memory: measured, and predicted from shapes."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reallm.checkpoint import read_manifest
from reallm.checkpoint.checksums import verify
from reallm.checkpoint.headers import read_headers, weight_files
from reallm.errors import ArtifactError
from reallm.formats import WeightFormat
from reallm.hf.modules import DECODE_AT_LOAD, DECODE_PER_USE, CompressedEmbedding
from reallm.hf.replacement import compressed_modules, replace_with_compressed
from reallm.source.limits import loading_limits
from reallm.source.model_source import read_config
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import EXCLUDED_BY_PLAN, meta_model, walk


def get_memory_footprint(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once; works on the meta device too."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {storage._cdata: storage for tensor in tensors if (storage := tensor.untyped_storage()) is not None}
    return sum(storage.nbytes() for storage in storages.values())


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Count a model's parameters, every compressed matrix as the one it stands for: the original's number.

    The method of transformers, which counts what is a parameter, for models whose matrices are buffers.
    """
    compressed = compressed_modules(model)
    trained = tuple(f"{path}.live." for path in compressed)  # what a matrix is decoded from while it is tuned
    embeddings = tuple(f"{path}." for path, module in model.named_modules() if _is_embedding(module))
    total = 0
    for name, parameter in model.named_parameters():
        skipped = exclude_embeddings and name.startswith(embeddings)
        skipped |= not parameter.requires_grad if only_trainable else name.startswith(trained)
        total += 0 if skipped else parameter.numel()
    if only_trainable:
        return total
    return total + sum(
        module.shape[0] * module.shape[1]
        for module in compressed.values()
        if not (exclude_embeddings and _is_embedding(module))
    )


def count_matrices(model: nn.Module, compressed: bool = True) -> None:
    """Have `num_parameters()` of a loaded model, and of models within it, count compressed matrices, or no longer.

    The method is put on the instances: their class names stay those of transformers, which go into config.json.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("num_parameters", None)
            if compressed:
                module.num_parameters = types.MethodType(num_parameters, module)  # type: ignore[method-assign]


def predict_memory_footprint(
    config: Any, formats: dict[str, WeightFormat], dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Resident bytes of a model in each mode, from shapes alone: `{mode: bytes}`.

    `config` is the transformers config, `formats` the format of each compressed matrix by module path,
    `dtype` the compute dtype (the config's by default). "decode_per_use" is all stored tensors and the
    dense rest; "decode_at_load" adds the decoded matrices. What one decode needs for a moment is not in it.
    """
    model = meta_model(config, dtype or config.dtype)
    replace_with_compressed(model, formats)
    per_use = get_memory_footprint(model)
    decoded = sum(m.shape[0] * m.shape[1] * m.compute_dtype.itemsize for m in compressed_modules(model).values())
    return {DECODE_PER_USE: per_use, DECODE_AT_LOAD: per_use + decoded}


def artifact_memory_footprint(folder: Path) -> dict[str, int]:
    """`predict_memory_footprint` of the artifact in `folder`; nothing is loaded."""
    formats = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    with _limited_config(folder) as config:
        return predict_memory_footprint(config, formats)


def unquantized_tensors(folder: Path) -> dict[str, str]:
    """Tensors that an artifact stores as the original has them, in model order, each with the reason."""
    compressed = {matrix.name for matrix in read_manifest(folder).matrices}
    with _limited_config(folder) as config:
        found = walk(meta_model(config))
    left_out = {m.parameter: EXCLUDED_BY_PLAN for m in found.matrices if m.name not in compressed}
    return {unquantized.name: unquantized.reason for unquantized in found.unquantized} | left_out


def verify_artifact(folder: Path) -> None:
    """Compare every tensor of an artifact with its checksum. Errors: ArtifactError naming the first that differs."""
    verify(weight_files(Path(folder), ArtifactError), read_manifest(folder).checksums)


@contextlib.contextmanager
def _limited_config(folder: Path) -> Iterator[Any]:
    """The config of an artifact, and the bounds of what is built of it."""
    headers = read_headers(weight_files(Path(folder), ArtifactError), ArtifactError)
    config = read_config(Path(folder), str(folder))
    with silence_transformers(), loading_limits(str(folder), ArtifactError, len(headers)):
        yield config


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, CompressedEmbedding))
