"""The trellis format: one scale, perhaps a table, and the best rings of bits for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit, matrix_shape
from reallm.fit.feedback import assign_codes
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.formats import Unpacked
from reallm.formats.trellis import Trellis, UnpackedTrellis, normal_quantiles
from reallm.kernels import average, closest_states, quantile_of_state, segment_sum

# Of 1.00 and 1.03 the former has the least error at 16 state bits, the latter at 12 and below; both within 1 %.
_WIDTH = 1.01
_TABLE_ROUNDS = 4
# Refits and sweeps under a hessian: every one is a search by Viterbi as long as that of feedback.
_ROUNDS, _TABLE_SWEEPS = 1, 2
_TABLE_TILES = 256  # 65,536 weights for at most some thousand entries


@fit.register
def fit_trellis(
    fmt: Trellis, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedTrellis:
    """One scale from the root mean square of the weights; codes by Viterbi's algorithm, fed back if there is data.

    With a hessian scale, table and codes then improve in turn by the objective (`alternate`).
    """
    scale = (average(weight.double().square()).sqrt() * _WIDTH).to(torch.float32)
    table = _table(fmt, weight, scale) if fmt.table_bits else None
    coder = _TrellisCoder(fmt, fmt.values(table, weight.device), scale)
    unpacked = UnpackedTrellis(assign_codes(weight, coder, objective), scale.reshape(1), table)
    if objective is None or objective.hessian is None:
        return unpacked

    def make_coder(unpacked: UnpackedTrellis) -> _TrellisCoder:
        return _TrellisCoder(fmt, fmt.values(unpacked.table, weight.device), unpacked.scales[0])

    # A scale beside a table would be the same freedom twice.
    names, rounds = (("scales",), _ROUNDS) if table is None else (("table",), _TABLE_SWEEPS)
    return alternate(fmt, unpacked, weight, objective, (names,), make_coder, rounds if start is None else 1)


@dataclass(frozen=True)
class _TrellisCoder:
    """Best rings for tiles of neighbouring columns."""

    fmt: Trellis
    values: Float[Tensor, " states"]
    scale: Float[Tensor, ""]

    @property
    def width(self) -> int:
        return self.fmt.tile_columns

    def encode(self, columns: Tensor, start: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Whole tiles; the filling of the last ones costs nothing when it is wrong."""
        targets = self.fmt.split_tiles(columns / torch.where(self.scale > 0, self.scale, 1.0))
        alike = importance.stride(-1) == 0  # one number for all columns, seen without a look at the GPU
        weights = None if alike else self.fmt.split_tiles(importance.expand_as(columns))
        states = closest_states(targets, self.values, self.fmt.bits, weights)
        decoded = self.fmt.join_tiles(self.values[states], matrix_shape(columns)) * self.scale
        down = self.fmt.tiles(matrix_shape(columns))[0]
        codes = (states & ((1 << self.fmt.bits) - 1)).to(torch.int32)
        return codes.view(down, -1), decoded


def _table(fmt: Trellis, weight: Tensor, scale: Tensor) -> Float[Tensor, " entries"]:
    """Entries as means of the weights that chose them, in turn with the choice, on a sample of tiles."""
    tiles = fmt.split_tiles(weight / torch.where(scale > 0, scale, 1.0))
    sample = tiles[:: max(1, len(tiles) // _TABLE_TILES)][:_TABLE_TILES]
    table = normal_quantiles(fmt.table_bits).to(weight.device)
    entry_of = quantile_of_state(fmt.bits, fmt.state_bits).to(weight.device) >> (fmt.state_bits - fmt.table_bits)
    for _ in range(_TABLE_ROUNDS):
        entries = entry_of[closest_states(sample, fmt.values(table, weight.device), fmt.bits)].reshape(-1)
        counts = segment_sum(torch.ones_like(sample.reshape(-1)), entries, len(table))
        sums = segment_sum(sample.reshape(-1), entries, len(table))
        table = torch.where(counts > 0, sums / counts.clamp(min=1), table)
    return table.to(torch.float16).to(torch.float32)
