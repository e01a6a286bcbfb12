"""Functions on plain tensors; nothing here knows what a format is."""

from reallm.kernels.hadamard import rotate, rotate_back
from reallm.kernels.heap import give_back_freed_blocks
from reallm.kernels.lookup import entries
from reallm.kernels.nearest import entry_table, nearest_entry, nearest_level
from reallm.kernels.ordered import average, one_thread, total
from reallm.kernels.packing import pack_bits, packed_nbytes, unpack_bits
from reallm.kernels.segments import segment_sum
from reallm.kernels.straight_through import straight_through
from reallm.kernels.trellis import closest_states, quantile_of_state, states_of

__all__ = [
    "average",
    "closest_states",
    "entries",
    "entry_table",
    "give_back_freed_blocks",
    "quantile_of_state",
    "states_of",
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
]
