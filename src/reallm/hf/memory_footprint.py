"""Memory footprint of a model: measured, and predicted from shapes."""

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
    """Return the bytes of all parameters and buffers, each storage once; also works on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {storage._cdata: storage for tensor in tensors if (storage := tensor.untyped_storage()) is not None}
    return sum(storage.nbytes() for storage in storages.values())


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Return the number of a model's parameters, every compressed matrix counted as the dense one it replaces.

    Replaces the method of transformers, which does not count matrices that are stored as buffers.
    """
    compressed = compressed_modules(model)
    trained = tuple(
        f"{path}.trainable_weight." for path in compressed
    )  # tensors from which a matrix is decoded in fine-tuning
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
    """Make `num_parameters()` of a loaded model and its submodels count compressed matrices, or undo it.

    The method is set on instances: their class names, which go into config.json, stay those of transformers.
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
    """Return the memory footprint of a model in each mode, predicted from shapes: `{mode: bytes}`.

    `config` is the transformers config, `formats` the format of each compressed matrix by module path,
    `dtype` the compute dtype (the config's by default). "decode_per_use" is all stored tensors and the
    unquantized tensors; "decode_at_load" adds the decoded matrices. Temporary memory of decoding is not included.
    """
    model = meta_model(config, dtype or config.dtype)
    replace_with_compressed(model, formats)
    per_use = get_memory_footprint(model)
    decoded = sum(m.shape[0] * m.shape[1] * m.compute_dtype.itemsize for m in compressed_modules(model).values())
    return {DECODE_PER_USE: per_use, DECODE_AT_LOAD: per_use + decoded}


def artifact_memory_footprint(folder: Path) -> dict[str, int]:
    """Return `predict_memory_footprint` of the artifact in `folder`; no tensor is loaded."""
    formats = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    with _limited_config(folder) as config:
        return predict_memory_footprint(config, formats)


def unquantized_tensors(folder: Path) -> dict[str, str]:
    """Return the unquantized tensors of an artifact, in model order, each with the reason."""
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
    """Yield the config of an artifact, with limits on the model that is built from it."""
    headers = read_headers(weight_files(Path(folder), ArtifactError), ArtifactError)
    config = read_config(Path(folder), str(folder))
    with silence_transformers(), loading_limits(str(folder), ArtifactError, len(headers)):
        yield config


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, CompressedEmbedding))
