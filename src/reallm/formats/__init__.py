"""What a matrix is: the waist, and one file per format. To add one, see docs/add_a_format.md."""

import importlib
import pkgutil

from reallm.formats.rounding import as_stored, rounding_of, table_of, zero_of
from reallm.formats.rows import decode_rows
from reallm.formats.shared import table_at_hand, table_tensors, tables_at_hand, tables_of
from reallm.formats.waist import (
    Parts,
    Shape,
    Table,
    Tensors,
    WeightFormat,
    example_formats,
    from_spec,
    known_format,
    known_formats,
    map_tensors,
    named_tensors,
    register,
    to_spec,
    with_tensors,
)

# Every file of this folder is a format or serves one: importing them registers all.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Parts",
    "Shape",
    "Table",
    "Tensors",
    "WeightFormat",
    "as_stored",
    "decode_rows",
    "example_formats",
    "from_spec",
    "known_format",
    "known_formats",
    "map_tensors",
    "named_tensors",
    "register",
    "rounding_of",
    "table_of",
    "table_at_hand",
    "table_tensors",
    "tables_at_hand",
    "tables_of",
    "to_spec",
    "zero_of",
    "with_tensors",
]
