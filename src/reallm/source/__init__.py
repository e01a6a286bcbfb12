"""The source model: open it, list the content of its files, and find the matrices to compress."""

# Imported eagerly, also so that `walk` here is the function and not the module of that name.
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
