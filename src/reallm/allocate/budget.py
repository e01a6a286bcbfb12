"""A plan from one number: stored bits per block weight, met within 1 % and never exceeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reallm.allocate.plan import MatrixInfo, Plan, Planned
from reallm.allocate.recipe import DEFAULT_EMBEDDING, KEEP, FormatSpec, with_rank
from reallm.allocate.sensitivity import sensitivity
from reallm.allocate.solver import Candidate, choose
from reallm.errors import FormatError, RecipeError
from reallm.formats import WeightFormat, from_spec
from reallm.formats.codebook import Codebook
from reallm.formats.dense import Dense
from reallm.formats.normal_float import NormalFloat

TOLERANCE = 0.01
# Relative squared error of a format, however it was measured.
ErrorOf = Callable[[WeightFormat], float]


def candidate_formats() -> list[WeightFormat]:
    """What the budget chooses from: 1 to 8 bits and dense, in steps fine enough to land within 1 %.

    Learned scalar codes in many group sizes, and vector codes of two. No permutations: sorting helps some
    roles and harms others (docs/log.md, 2026-11-22), and the prediction cannot tell which.
    """
    signs = [NormalFloat(bits=1, group_size=g) for g in (64, 128, 256)]
    scalars = [Codebook(index_bits=b, vector_dim=1, group_size=g) for b in range(2, 9) for g in (16, 32, 64, 128, 256)]
    vectors = [Codebook(index_bits=i, vector_dim=2, group_size=g) for i in range(3, 9) for g in (32, 64, 128)]
    return [*signs, *scalars, *vectors, Dense()]


def plan_for_bits(
    bits: float,
    matrices: Sequence[MatrixInfo],
    error_of: ErrorOf,
    rank: int | None = None,
    embedding: FormatSpec = DEFAULT_EMBEDDING,
    head: FormatSpec = DEFAULT_EMBEDDING,
) -> Plan:
    """The plan of least predicted loss whose block matrices take at most `bits` stored bits a weight.

    Predicted loss of a matrix: its sensitivity times `error_of` its format, residual apart.
    Everything stored counts: scales, codebooks, and the residual if `rank` asks for one.

    Errors: RecipeError naming the possible range if `bits` is beyond it or cannot be met within 1 %.
    """
    blocks = [matrix for matrix in matrices if matrix.kind == "block"]
    if not blocks:
        raise RecipeError("no block matrix is left to compress; loosen --include/--exclude")
    options = [_options(matrix, error_of, rank, blocks) for matrix in blocks]
    tables = [[candidate for _, candidate in pairs] for pairs in options]
    _check_range(bits, tables, blocks)
    weights = sum(matrix.weights for matrix in blocks)
    chosen = choose(tables, int(bits * weights / 8), int(bits * (1 - TOLERANCE) * weights / 8) + 1)
    picked = {matrix.name: pairs[i][0] for matrix, pairs, i in zip(blocks, options, chosen, strict=True)}
    ends = {"embedding": embedding, "head": head}
    entries = [
        Planned(matrix, picked[matrix.name] if matrix.kind == "block" else from_spec(ends[matrix.kind]))
        for matrix in matrices
        if matrix.kind == "block" or ends[matrix.kind] != KEEP
    ]
    plan = Plan(tuple(entries), f"{bits:g} bits")
    plan.check()
    if plan.block_bits < bits * (1 - TOLERANCE):
        raise RecipeError(f"{bits:g} bits cannot be met within 1 %: the nearest below is {plan.block_bits:.3f}")
    return plan


def _fits(fmt: WeightFormat, matrix: MatrixInfo) -> bool:
    try:
        fmt.check(matrix.shape)
    except FormatError:
        return False
    return True


def _options(
    matrix: MatrixInfo, error_of: ErrorOf, rank: int | None, blocks: Sequence[MatrixInfo]
) -> list[tuple[WeightFormat, Candidate]]:
    """Formats that can store the matrix, with what they cost.

    A residual takes its bytes from the budget but is not credited with any gain: what it is worth depends on
    the matrix's spectrum, which nobody has looked at yet.
    """
    of_role = sum(other.weights for other in blocks if other.role == matrix.role)
    share = matrix.weights / of_role
    depth = 1 + max((other.block for other in blocks if other.block is not None), default=0)
    options = []
    for base in candidate_formats():
        fmt = with_rank(base, rank)
        if _fits(fmt, matrix):
            loss = share * sensitivity(matrix, base, depth) * error_of(base)
            options.append((fmt, Candidate(fmt.nbytes(matrix.shape), loss)))
    if not options:
        raise RecipeError(f"{matrix.name}: no candidate format stores a {matrix.shape} matrix; lower --rank")
    return options


def _check_range(bits: float, tables: Sequence[Sequence[Candidate]], blocks: Sequence[MatrixInfo]) -> None:
    weights = sum(matrix.weights for matrix in blocks)
    least, most = (8 * sum(pick(c.nbytes for c in table) for table in tables) / weights for pick in (min, max))
    if not least <= bits <= most * (1 + TOLERANCE):
        least, most = math.ceil(100 * least) / 100, math.floor(100 * most) / 100  # what is named must work
        raise RecipeError(f"--bits {bits:g} is not possible for this model; between {least:.2f} and {most:.2f} is")
