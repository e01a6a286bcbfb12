"""Functions on plain tensors; nothing here knows what a format is."""

from reallm.kernels.nearest import nearest_entry, nearest_level
from reallm.kernels.packing import pack_bits, packed_nbytes, unpack_bits

__all__ = ["nearest_entry", "nearest_level", "pack_bits", "packed_nbytes", "unpack_bits"]
