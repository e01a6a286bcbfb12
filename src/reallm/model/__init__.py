"""The only room that imports transformers: reading models, walking them, loading compressed ones.

Importing it does not import transformers yet, which takes seconds.
"""

from __future__ import annotations

from typing import Any

# Imported eagerly also so that `walk` and `load` here are the functions, not the files of that name.
from reallm.model.load import is_artifact, load, load_tokenizer
from reallm.model.modules import (
    DECODE_AT_LOAD,
    DECODE_PER_USE,
    MODES,
    CompressedEmbedding,
    CompressedExperts,
    CompressedLinear,
    TiedLinear,
)
from reallm.model.resident import (
    artifact_memory_footprint,
    get_memory_footprint,
    predict_memory_footprint,
    unquantized_tensors,
    verify_artifact,
)
from reallm.model.silence import silence_transformers
from reallm.model.source import Source, open_source
from reallm.model.walk import Matrix, Unquantized, Walk, meta_model, read_matrix, walk

_LAZY_EXPORTS = ("ReallmConfig", "ReallmQuantizer", "marker_tensors", "register_with_transformers", "write_config")

__all__ = [
    "DECODE_AT_LOAD",
    "DECODE_PER_USE",
    "MODES",
    "CompressedEmbedding",
    "CompressedExperts",
    "CompressedLinear",
    "Unquantized",
    "Matrix",
    "Source",
    "TiedLinear",
    "Walk",
    "predict_memory_footprint",
    "is_artifact",
    "load",
    "load_tokenizer",
    "meta_model",
    "unquantized_tensors",
    "open_source",
    "silence_transformers",
    "read_matrix",
    "get_memory_footprint",
    "artifact_memory_footprint",
    "verify_artifact",
    "walk",
    *_LAZY_EXPORTS,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reallm.model import quantizer

    return getattr(quantizer, name)
