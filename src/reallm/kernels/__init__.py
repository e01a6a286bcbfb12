"""Functions on plain tensors; nothing here knows what a format is."""

from reallm.kernels.hadamard import rotate, rotate_back
from reallm.kernels.nearest import nearest_entry, nearest_level
from reallm.kernels.packing import pack_bits, packed_nbytes, unpack_bits
from reallm.kernels.segments import segment_sum

__all__ = [
    "nearest_entry",
    "nearest_level",
    "pack_bits",
    "packed_nbytes",
    "rotate",
    "rotate_back",
    "segment_sum",
    "unpack_bits",
]
