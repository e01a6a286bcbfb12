"""What a matrix is: the interface of a format, and one file per format. To add one, see docs/add_a_format.md."""

import importlib
import pkgutil

from reallm.formats.base import (
    Shape,
    SharedDecoder,
    Tensors,
    Unpacked,
    WeightFormat,
    example_formats,
    from_spec,
    known_format,
    known_formats,
    map_tensors,
    named_tensors,
    register,
    replace_tensors,
    to_spec,
)
from reallm.formats.fake_quantize import fake_quantize, fake_quantizer, shared_decoder_name, zero_value
from reallm.formats.shared_decoders import (
    collect_shared_decoders,
    shared_decoder_layout,
    shared_decoder_tensors,
    use_shared_decoders,
)

# Every file of this folder is a format or serves one: importing them registers all.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Unpacked",
    "Shape",
    "SharedDecoder",
    "Tensors",
    "WeightFormat",
    "fake_quantize",
    "example_formats",
    "from_spec",
    "known_format",
    "known_formats",
    "map_tensors",
    "named_tensors",
    "register",
    "fake_quantizer",
    "shared_decoder_name",
    "shared_decoder_tensors",
    "shared_decoder_layout",
    "use_shared_decoders",
    "collect_shared_decoders",
    "to_spec",
    "zero_value",
    "replace_tensors",
]
