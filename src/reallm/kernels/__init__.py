"""Functions on plain tensors; nothing here depends on formats."""

from reallm.kernels.bit_packing import pack_bits, packed_nbytes, unpack_bits, unpack_code_rows
from reallm.kernels.deterministic import average, one_thread, total
from reallm.kernels.hadamard import rotate, rotate_back
from reallm.kernels.lookup import entries
from reallm.kernels.malloc import set_mmap_threshold
from reallm.kernels.nearest import entry_table, nearest_entry, nearest_level
from reallm.kernels.segments import segment_sum
from reallm.kernels.straight_through import straight_through
from reallm.kernels.viterbi import closest_states, quantile_of_state, ring_states

__all__ = [
    "average",
    "closest_states",
    "entries",
    "entry_table",
    "set_mmap_threshold",
    "quantile_of_state",
    "ring_states",
    "nearest_entry",
    "nearest_level",
    "one_thread",
    "pack_bits",
    "packed_nbytes",
    "rotate",
    "rotate_back",
    "segment_sum",
    "straight_through",
    "total",
    "unpack_bits",
    "unpack_code_rows",
]
