"""Plans under a budget of stored bytes for embedding, blocks and head together: options, choice, small changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reallm.allocate.plan import MatrixInfo, Plan, Planned
from reallm.allocate.recipe import KEEP, FormatSpec, with_rank
from reallm.allocate.solver import Candidate, choose
from reallm.errors import FormatError, RecipeError
from reallm.formats import WeightFormat, from_spec

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
    for matrix in matrices:
        fixed = (ends or {}).get(matrix.kind)
        if fixed == KEEP:
            continue
        rows = []
        given = (always or {}).get(matrix.name)
        bases = candidates(matrix) if fixed is None else [from_spec(fixed)]
        for base in bases if given is None else [given, *bases]:
            fmt = with_rank(base, rank) if matrix.kind == "block" and base is not given else base
            if _fits(fmt, matrix):
                full = fmt.nbytes(matrix.shape)
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
    chosen = {entry.matrix.name: option_of(entry, options) for entry in plan.entries}
    infos = {entry.matrix.name: entry.matrix for entry in plan.entries}
    used = dict(stored)
    while True:
        left = room - (sum(used.values()) - sum(stored.values()))
        wanted = left - (room - least)
        if left >= 0 and wanted <= 0:
            break
        exchanges = [
            (name, option, nbytes_of(infos[name], option) - used[name], option.loss - chosen[name].loss)
            for name in chosen
            for option in options[name]
            if option.fmt != chosen[name].fmt
        ]
        best = _cheapest_saving(exchanges, left) if left < 0 else _best_filling(exchanges, left, wanted)
        if best is None:
            break
        name, option, more, _ = best
        chosen[name], used[name] = option, used[name] + more
    return Plan(tuple(Planned(entry.matrix, chosen[entry.matrix.name].fmt) for entry in plan.entries), plan.recipe)


_Exchange = tuple[str, Option, int, float]  # matrix, new option, bytes more, loss more


def _cheapest_saving(exchanges: Sequence[_Exchange], left: int) -> _Exchange | None:
    """The exchange that saves at the least loss a byte; saving more than is needed counts for nothing."""
    saving = [e for e in exchanges if e[2] < 0]
    return min(saving, key=lambda e: max(e[3], 0.0) / min(-e[2], -left), default=None)


def _best_filling(exchanges: Sequence[_Exchange], left: int, wanted: int) -> _Exchange | None:
    """One exchange that fills the budget, of those the one that gains most; else the one that gains most a byte."""
    gaining = [e for e in exchanges if 0 < e[2] <= left and e[3] < 0]
    enough = [e for e in gaining if e[2] >= wanted]
    if enough:
        return min(enough, key=lambda e: e[3])
    return min(gaining, key=lambda e: e[3] / e[2], default=None)


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


def _fits(fmt: WeightFormat, matrix: MatrixInfo) -> bool:
    try:
        fmt.check(matrix.shape)
    except FormatError:
        return False
    return True
