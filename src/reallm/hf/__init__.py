"""Compressed models in transformers: modules, the quantizer that inserts them, loading, memory footprint.

Importing this package does not import transformers, which takes seconds.
"""

from __future__ import annotations

from typing import Any

# Imported eagerly so that `load` is the function here, not the module of that name.
from reallm.hf.load import is_artifact, load, load_tokenizer
from reallm.hf.memory_footprint import (
    artifact_memory_footprint,
    get_memory_footprint,
    predict_memory_footprint,
    unquantized_tensors,
    verify_artifact,
)
from reallm.hf.modules import (
    DECODE_AT_LOAD,
    DECODE_PER_USE,
    MODES,
    CompressedEmbedding,
    CompressedExperts,
    CompressedLinear,
    TiedLinear,
)

_WITH_TRANSFORMERS = ("ReallmConfig", "ReallmQuantizer", "marker_tensors", "register_with_transformers", "write_config")

__all__ = [
    "DECODE_AT_LOAD",
    "DECODE_PER_USE",
    "MODES",
    "CompressedEmbedding",
    "CompressedExperts",
    "CompressedLinear",
    "TiedLinear",
    "predict_memory_footprint",
    "is_artifact",
    "load",
    "load_tokenizer",
    "unquantized_tensors",
    "get_memory_footprint",
    "artifact_memory_footprint",
    "verify_artifact",
    *_WITH_TRANSFORMERS,
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reallm.hf import quantizer

    return getattr(quantizer, name)
