"""The original model: where it comes from, what lies in its files, and which of its parameters are matrices."""

# Imported eagerly also so that `walk` here is the function, not the file of that name.
from reallm.source.model_source import Source, open_source
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import Matrix, Unquantized, Walk, meta_model, read_matrix, walk

__all__ = [
    "Unquantized",
    "Matrix",
    "Source",
    "Walk",
    "meta_model",
    "open_source",
    "silence_transformers",
    "read_matrix",
    "walk",
]
