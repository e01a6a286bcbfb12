"""Former names, for code that imports them from `reallm.model`: that package is now source, calibrate and hf."""

from reallm.hf import unquantized_tensors as not_compressed
from reallm.source import open_source, walk

__all__ = ["not_compressed", "open_source", "walk"]
