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
    expected_resident_nbytes,
    not_compressed,
    resident_nbytes,
    resident_of_artifact,
    verify_artifact,
)
from reallm.model.silence import quiet
from reallm.model.source import Source, open_source
from reallm.model.walk import Kept, Matrix, Walk, meta_model, read_matrix, walk

_WITH_TRANSFORMERS = ("ReallmConfig", "ReallmQuantizer", "marker_tensors", "register_with_transformers", "write_config")

__all__ = [
    "DECODE_AT_LOAD",
    "DECODE_PER_USE",
    "MODES",
    "CompressedEmbedding",
    "CompressedExperts",
    "CompressedLinear",
    "Kept",
    "Matrix",
    "Source",
    "TiedLinear",
    "Walk",
    "expected_resident_nbytes",
    "is_artifact",
    "load",
    "load_tokenizer",
    "meta_model",
    "not_compressed",
    "open_source",
    "quiet",
    "read_matrix",
    "resident_nbytes",
    "resident_of_artifact",
    "verify_artifact",
    "walk",
    *_WITH_TRANSFORMERS,
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reallm.model import quantizer

    return getattr(quantizer, name)
