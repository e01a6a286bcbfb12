"""Plans under a budget of stored bytes for embedding, blocks and head together: options, choice, small changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reallm.allocate.plan import MatrixInfo, Plan, Planned
from reallm.allocate.recipe import KEEP, FormatSpec, with_rank
from reallm.allocate.solver import Candidate, choose
from reallm.errors import FormatError, RecipeError
from reallm.formats import Shape, WeightFormat, from_spec

# The whole file is at least this share of its budget.
LEAST_SHARE = 0.995
# Tables of frequencies: what a coded matrix takes beside its share, and small tensors never earn.
_CODED_TABLES = 200
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Option:
    """A format for a matrix, the bytes it will about take in the file, and its predicted loss in nats a token."""

    fmt: WeightFormat
    nbytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # by matrix name


def parse_size(text: str) -> int:
    """Bytes of `60MB` (decimal), `57.2 MiB`, `800KB`, `2GB` or a plain number of bytes.

    Errors: RecipeError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"{text!r} is not a size: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def options_for(
    matrices: Sequence[MatrixInfo],
    candidates: Callable[[MatrixInfo], Sequence[WeightFormat]],
    loss: Callable[[MatrixInfo, WeightFormat], float],
    share: Callable[[MatrixInfo, WeightFormat], float],
    rank: int | None = None,
    ends: Mapping[str, FormatSpec | None] | None = None,
    always: Mapping[str, WeightFormat] | None = None,
) -> dict[str, list[Option]]:
    """What each matrix can be stored as. `ends` fixes the format of embedding or head; one that is kept has no options.

    `share`: stored bytes / bytes before entropy coding. `rank` puts a residual around every block format, which takes
    bytes and is credited with no gain. `always` names a format by matrix that is among its options whatever it loses.
    Errors: RecipeError for a matrix that no candidate can store.
    """
    found = {}
    size_of = functools.cache(_size)  # 30 matrices of a role have one shape
    for matrix in matrices:
        fixed = (ends or {}).get(matrix.kind)
        if fixed == KEEP:
            continue
        rows = []
        given = (always or {}).get(matrix.name)
        bases = candidates(matrix) if fixed is None else [from_spec(fixed)]
        for base in bases if given is None else [given, *bases]:
            fmt = with_rank(base, rank) if matrix.kind == "block" and base is not given else base
            if (full := size_of(fmt, matrix.shape)) is not None:
                nbytes = min(full, round(full * share(matrix, fmt)) + _CODED_TABLES)
                rows.append(Option(fmt, nbytes, loss(matrix, base)))
        if not rows:
            raise RecipeError(f"{matrix.name}: no candidate format stores a {matrix.shape} matrix; lower --rank")
        found[matrix.name] = _useful(rows, given)
    return found


def chosen_plan(
    matrices: Sequence[MatrixInfo], options: Options, budget: int, least: int = 0, name: str = "budget"
) -> Plan:
    """The plan of least predicted loss whose matrices take at most `budget` bytes, and `least` if that can be.

    Errors: RecipeError if the smallest options exceed the budget.
    """
    named = [matrix for matrix in matrices if matrix.name in options]
    picked = choose([_candidates(options[matrix.name]) for matrix in named], budget, least)
    entries = [Planned(matrix, options[matrix.name][place].fmt) for matrix, place in zip(named, picked, strict=True)]
    return Plan(tuple(entries), name)


def predicted_bytes(plan: Plan, options: Options) -> int:
    """Bytes that the matrices of a plan will about take."""
    return sum(option_of(entry, options).nbytes for entry in plan.entries)


def predicted_loss(plan: Plan, options: Options) -> float:
    """Predicted KL to the original, nats a token: losses of single matrices add up as long as they are small."""
    return sum(option_of(entry, options).loss for entry in plan.entries)


def option_of(entry: Planned, options: Options) -> Option:
    """The option that a planned matrix is."""
    return next(option for option in options[entry.matrix.name] if option.fmt == entry.fmt)


def nudged(
    plan: Plan,
    options: Options,
    stored: Mapping[str, int],
    room: int,
    least: int,
    nbytes_of: Callable[[MatrixInfo, Option], int],
) -> Plan:
    """The plan changed in few matrices, so that it takes `least` to `room` bytes (which may be negative) more than now.

    `stored` are the measured bytes of every matrix as planned now; one that is changed counts with `nbytes_of` its new
    option. As near as it comes where no change helps any more.
    """
    rows = [(row, entry, option) for row, entry in enumerate(plan.entries) for option in options[entry.matrix.name]]
    row_of = np.array([row for row, _, _ in rows])
    nbytes = np.array([nbytes_of(entry.matrix, option) for _, entry, option in rows])
    loss = np.array([option.loss for _, _, option in rows])
    chosen = np.array([place for place, (_, entry, option) in enumerate(rows) if option.fmt == entry.fmt])
    used = np.array([stored[entry.matrix.name] for entry in plan.entries])
    while True:
        left = room - (int(used.sum()) - sum(stored.values()))
        wanted = left - (room - least)
        if left >= 0 and wanted <= 0:
            break
        more, worse = nbytes - used[row_of], loss - loss[chosen][row_of]
        more[chosen] = 0  # no exchange
        best = _cheapest_saving(more, worse, left) if left < 0 else _best_filling(more, worse, left, wanted)
        if best is None:
            break
        used[row_of[best]] += more[best]
        chosen[row_of[best]] = best
    return Plan(tuple(Planned(rows[place][1].matrix, rows[place][2].fmt) for place in chosen), plan.recipe)


# Of exchanges: bytes more, loss more.
_Bytes, _Losses = np.ndarray, np.ndarray


def _cheapest_saving(more: _Bytes, worse: _Losses, left: int) -> int | None:
    """The exchange that saves at the least loss a byte; saving more than is needed counts for nothing."""
    saving = np.flatnonzero(more < 0)
    return _least(saving, np.maximum(worse[saving], 0.0) / np.minimum(-more[saving], -left))


def _best_filling(more: _Bytes, worse: _Losses, left: int, wanted: int) -> int | None:
    """One exchange that fills the budget, of those the one that gains most; else the one that gains most a byte."""
    gaining = np.flatnonzero((more > 0) & (more <= left) & (worse < 0))
    enough = gaining[more[gaining] >= wanted]
    return _least(enough, worse[enough]) if len(enough) else _least(gaining, worse[gaining] / more[gaining])


def _least(places: np.ndarray, cost: np.ndarray) -> int | None:
    return int(places[cost.argmin()]) if len(places) else None


def _candidates(options: Sequence[Option]) -> list[Candidate]:
    return [Candidate(option.nbytes, option.loss) for option in options]


def _useful(options: list[Option], given: WeightFormat | None) -> list[Option]:
    """By bytes, without those that are as large as another and lose more; the given one stays."""
    best: dict[int, Option] = {}
    for option in options:
        other = best.get(option.nbytes)
        if other is None or (option.loss < other.loss and (given is None or other.fmt != given)):
            best[option.nbytes] = option
    return [best[nbytes] for nbytes in sorted(best)]


def _size(fmt: WeightFormat, shape: Shape) -> int | None:
    """Bytes before entropy coding; None for a shape that the format cannot store."""
    try:
        fmt.check(shape)
    except FormatError:
        return None
    return fmt.nbytes(shape)
