"""Plans under a budget of stored bytes for embedding, blocks and head together: options, choice, small changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reallm.allocate.format_plan import MatrixInfo, Plan, PlanEntry, shared_decoder_nbytes
from reallm.allocate.problem import Choice, Problem
from reallm.allocate.recipe import KEEP, FormatSpec
from reallm.errors import FormatError, RecipeError
from reallm.formats import Shape, WeightFormat, collect_shared_decoders, from_spec
from reallm.formats.low_rank_plus import LowRankPlus

# The artifact is at least this share of its budget.
LEAST_SHARE = 0.995
# Tables of frequencies: what a coded matrix takes beside its share, and small tensors never earn.
_CODED_TABLES = 200
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Option:
    """A format for a matrix, the bytes it will about take in the file, and its predicted loss in nats per token."""

    fmt: WeightFormat
    nbytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # by matrix name
NbytesFn = Callable[[MatrixInfo, Option], int]  # what an option of a matrix takes in the file


def parse_size(text: str) -> int:
    """Bytes of `60MB` (decimal), `57.2 MiB`, `800KB`, `2GB` or a plain number of bytes.

    Errors: RecipeError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"{text!r} is not a size: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def matrix_options(
    matrices: Sequence[MatrixInfo],
    candidates: Callable[[MatrixInfo], Sequence[WeightFormat]],
    loss: Callable[[MatrixInfo, WeightFormat], float],
    share: Callable[[MatrixInfo, WeightFormat], float],
    rank: int | None = None,
    end_formats: Mapping[str, FormatSpec | None] | None = None,
    always: Mapping[str, WeightFormat] | None = None,
) -> dict[str, list[Option]]:
    """Return what each matrix can be stored as.

    `end_formats` fixes the format of embedding or lm_head; one that stays unquantized has no options.

    `share`: stored bytes / bytes before entropy coding. `rank` puts a residual around every block format, which takes
    bytes and is credited with no gain. `always` names a format by matrix that is among its options whatever it loses.
    Errors: RecipeError for a matrix that no candidate can store.
    """
    found = {}
    cached_size = functools.cache(_size)  # 30 matrices of a role have one shape
    for matrix in matrices:
        fixed = (end_formats or {}).get(matrix.kind)
        if fixed == KEEP:
            continue
        rows = []
        given = (always or {}).get(matrix.name)
        bases = candidates(matrix) if fixed is None else [from_spec(fixed)]
        for base in bases if given is None else [given, *bases]:
            fmt = LowRankPlus.replace_residual(base, rank) if matrix.kind == "block" and base is not given else base
            if (full := cached_size(fmt, matrix.shape)) is not None:
                nbytes = min(full, round(full * share(matrix, fmt)) + _CODED_TABLES)
                rows.append(Option(fmt, nbytes, loss(matrix, base)))
        if not rows:
            raise RecipeError(f"{matrix.name}: no candidate format stores a {matrix.shape} matrix; lower --rank")
        found[matrix.name] = _useful(rows, given)
    return found


def solve_plan(
    matrices: Sequence[MatrixInfo],
    options: Options,
    most: int,
    least: int = 0,
    name: str = "budget",
    overhead: int = 0,
    base: Plan | None = None,
    nbytes_fn: NbytesFn | None = None,
    shared_text: Callable[[MatrixInfo, WeightFormat], Mapping[str, int]] | None = None,
    max_changes: int | None = None,
    swap_penalty: float = 0.0,
) -> Plan:
    """Return the plan of least predicted loss that takes `least` to `most` bytes.

    Bytes are `overhead`, those of the matrices by `nbytes_fn` (default: as predicted), those of the decoders they
    share, and by key those of `shared_text`, once for all matrices whose format has the key. With a `base` plan, a
    matrix that has another format costs `swap_penalty` in addition, and at most `max_changes` have one.
    Errors: RecipeError if there is no such plan.
    """
    named = [matrix for matrix in matrices if matrix.name in options]
    shared_decoders = collect_shared_decoders(option.fmt for matrix in named for option in options[matrix.name])
    shared = {f"decoder {table}": shared_decoder_nbytes({table: shared_decoders[table]}) for table in shared_decoders}

    def choice(matrix: MatrixInfo, option: Option) -> Choice:
        text = shared_text(matrix, option.fmt) if shared_text else {}
        shared.update(text)
        needs = frozenset([*text, *(f"decoder {table}" for table in option.fmt.shared_decoders())])
        return Choice(option.nbytes if nbytes_fn is None else nbytes_fn(matrix, option), option.loss, needs)

    base_formats = {entry.matrix.name: entry.fmt for entry in base.entries} if base else {}
    problem = Problem(
        options=[[choice(matrix, option) for option in options[matrix.name]] for matrix in named],
        most=most,
        least=least,
        overhead=overhead,
        shared=shared,
        base=[_index(options[matrix.name], base_formats[matrix.name]) for matrix in named] if base else None,
        max_changes=max_changes,
        swap_penalty=swap_penalty,
    )
    picked = problem.solve()
    entries = [PlanEntry(matrix, options[matrix.name][place].fmt) for matrix, place in zip(named, picked, strict=True)]
    return Plan(tuple(entries), name)


def _index(options: Sequence[Option], fmt: WeightFormat) -> int:
    return next(place for place, option in enumerate(options) if option.fmt == fmt)


def extreme_plan(
    matrices: Sequence[MatrixInfo], options: Options, key: Callable[[Option], tuple], name: str = "budget"
) -> Plan:
    """Return the plan in which each matrix has the option that is least by `key`."""
    named = [matrix for matrix in matrices if matrix.name in options]
    return Plan(tuple(PlanEntry(matrix, min(options[matrix.name], key=key).fmt) for matrix in named), name)


def predicted_bytes(plan: Plan, options: Options) -> int:
    """Bytes that the matrices of a plan will about take."""
    return sum(find_option(entry, options).nbytes for entry in plan.entries)


def predicted_loss(plan: Plan, options: Options) -> float:
    """Predicted KL to the original, nats per token: losses of single matrices add up as long as they are small."""
    return sum(find_option(entry, options).loss for entry in plan.entries)


def find_option(entry: PlanEntry, options: Options) -> Option:
    """The option that a planned matrix is."""
    return next(option for option in options[entry.matrix.name] if option.fmt == entry.fmt)


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
