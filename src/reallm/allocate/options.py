"""Plans under a byte budget for embedding, blocks and lm_head together: options, allocation, small changes."""

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

# The artifact takes at least this share of its budget.
LEAST_SHARE = 0.995
# Bytes of frequency tables that an entropy-coded matrix takes in addition to its share.
_CODED_TABLES = 200
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Option:
    """A format for a matrix, its predicted bytes in the file, and its predicted loss in nats per token."""

    fmt: WeightFormat
    nbytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # by matrix name
NbytesFn = Callable[[MatrixInfo, Option], int]  # bytes of a matrix's option in the file


def parse_size(text: str) -> int:
    """Return the bytes of `60MB` (decimal), `57.2 MiB`, `800KB`, `2GB` or a plain number of bytes.

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
    """Return the options of each matrix by name.

    `end_formats` fixes the format of embedding or lm_head; an unquantized one has no options. `share` is stored bytes /
    bytes before entropy coding. `rank` adds a residual to every block format; its bytes count, its gain does not.
    `always` gives a format by matrix that stays among its options whatever its loss.
    Errors: RecipeError for a matrix that no candidate can store.
    """
    found = {}
    cached_size = functools.cache(_size)  # 30 matrices of a role have one shape
    for matrix in matrices:
        fixed = (end_formats or {}).get(matrix.kind)
        if fixed == KEEP:
            continue
        rows = []
        required = (always or {}).get(matrix.name)
        bases = candidates(matrix) if fixed is None else [from_spec(fixed)]
        for base in bases if required is None else [required, *bases]:
            fmt = LowRankPlus.replace_residual(base, rank) if matrix.kind == "block" and base is not required else base
            if (full := cached_size(fmt, matrix.shape)) is not None:
                nbytes = min(full, round(full * share(matrix, fmt)) + _CODED_TABLES)
                rows.append(Option(fmt, nbytes, loss(matrix, base)))
        if not rows:
            raise RecipeError(f"{matrix.name}: no candidate format stores a {matrix.shape} matrix; lower --rank")
        found[matrix.name] = _non_dominated(rows, required)
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

    Bytes are `overhead`, plus the matrices by `nbytes_fn` (default: the predicted bytes), plus shared decoders, plus
    the values of `shared_text`, each key once for all matrices whose format has it. With a `base` plan, a matrix whose
    format differs from it costs `swap_penalty` in addition, and at most `max_changes` matrices may differ.
    Errors: RecipeError if there is no such plan.
    """
    named = [matrix for matrix in matrices if matrix.name in options]
    shared_decoders = collect_shared_decoders(option.fmt for matrix in named for option in options[matrix.name])
    shared = {f"decoder {key}": shared_decoder_nbytes({key: shared_decoders[key]}) for key in shared_decoders}

    def choice(matrix: MatrixInfo, option: Option) -> Choice:
        text = shared_text(matrix, option.fmt) if shared_text else {}
        shared.update(text)
        needs = frozenset([*text, *(f"decoder {key}" for key in option.fmt.shared_decoders())])
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
    """Return the plan in which each matrix has its option with the smallest `key`."""
    named = [matrix for matrix in matrices if matrix.name in options]
    return Plan(tuple(PlanEntry(matrix, min(options[matrix.name], key=key).fmt) for matrix in named), name)


def predicted_bytes(plan: Plan, options: Options) -> int:
    """Return the predicted bytes of the matrices of a plan."""
    return sum(find_option(entry, options).nbytes for entry in plan.entries)


def predicted_loss(plan: Plan, options: Options) -> float:
    """Return the predicted KL to the original in nats per token; small losses of single matrices add up."""
    return sum(find_option(entry, options).loss for entry in plan.entries)


def find_option(entry: PlanEntry, options: Options) -> Option:
    """Return the option of a planned matrix."""
    return next(option for option in options[entry.matrix.name] if option.fmt == entry.fmt)


def _non_dominated(options: list[Option], required: WeightFormat | None) -> list[Option]:
    """Return the options sorted by bytes: of equal size only the one of least loss, or the required one."""
    best: dict[int, Option] = {}
    for option in options:
        other = best.get(option.nbytes)
        if other is None or (option.loss < other.loss and (required is None or other.fmt != required)):
            best[option.nbytes] = option
    return [best[nbytes] for nbytes in sorted(best)]


def _size(fmt: WeightFormat, shape: Shape) -> int | None:
    """Return the bytes before entropy coding; None for a shape that the format cannot store."""
    try:
        fmt.check(shape)
    except FormatError:
        return None
    return fmt.nbytes(shape)
