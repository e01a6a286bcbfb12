"""Solve plans for a byte budget: of the artifact, of the block matrices, or of a recipe that is reduced to fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from reallm.allocate import MatrixInfo, Plan, PlanEntry
from reallm.allocate.format_plan import shared_decoder_nbytes
from reallm.allocate.options import (
    LEAST_SHARE,
    NbytesFn,
    Option,
    Options,
    extreme_plan,
    find_option,
    predicted_bytes,
    solve_plan,
)
from reallm.errors import RecipeError
from reallm.pipeline.artifact_size import ArtifactSize

_BITS_TOLERANCE = 0.01
_NEAR_SMALLEST = 0.02
_ROUNDS = 8  # solver runs, each with the bytes of headers and texts of the previous solution
_SMALL_FILE = 2_000_000  # bytes; 0.5 % of it is about a hundred layouts in config.json
_MAX_CHANGED_SHARE = 0.5  # of a recipe's matrices; with more changes it would be a different recipe
# Penalty for changing a matrix's format, in units of the mean loss of a matrix. Without it the solver makes many
# changes with a negligible predicted gain instead of the one change that suffices.
_SWAP_PENALTY = 0.1


def solve_for_size(
    artifact_size: ArtifactSize,
    matrices: Sequence[MatrixInfo],
    options: Options,
    size: int,
    least: int,
    name: str,
    nbytes_fn: NbytesFn | None = None,
    constant: int = 0,
    base: Plan | None = None,
    **limits: Any,
) -> tuple[Plan, int]:
    """Return the plan of least predicted loss whose artifact takes `least` to `size` bytes, and those bytes.

    A linear model predicts headers and texts; each round corrects it by the rendered texts of the last solution.
    `constant` are measured bytes that the model does not include; `limits` are passed to `solve_plan`.
    Errors: RecipeError if there is no such plan.
    """
    nbytes_fn = nbytes_fn or (lambda _, option: option.nbytes)

    # Texts stored once per format are negligible in a large file, but a small size can hardly be met without them.
    shared_text = artifact_size.shared_text if size < _SMALL_FILE else None

    def expected_nbytes(plan: Plan) -> int:
        return constant + artifact_size.overhead(plan) + _sum(plan, options, nbytes_fn)

    def linear_nbytes(plan: Plan) -> int:
        once: dict[str, int] = {}
        for entry in plan.entries:
            once |= shared_text(entry.matrix, entry.fmt) if shared_text else {}
        return _sum(plan, options, nbytes_with_text) + shared_decoder_nbytes(plan.shared_decoders) + sum(once.values())

    def nbytes_with_text(matrix: MatrixInfo, option: Option) -> int:
        return nbytes_fn(matrix, option) + artifact_size.text_nbytes(matrix, option.fmt)

    seen: list[tuple[Plan, int]] = []
    start = base or extreme_plan(matrices, options, lambda o: (o.nbytes, o.loss), name)
    overhead = expected_nbytes(start) - linear_nbytes(start)
    below = 0  # bytes by which the lower bound is relaxed: texts are not linear, and sizes of a tiny file have gaps
    for number in range(_ROUNDS):
        try:
            plan = solve_plan(
                matrices,
                options,
                size,
                max(least - below, 0),
                name,
                overhead,
                base,
                nbytes_with_text,
                shared_text,
                **limits,
            )
        except RecipeError:
            if number == 0 and not least:
                raise
            below += math.ceil((1 - LEAST_SHARE) * size)
            continue
        nbytes = expected_nbytes(plan)
        if least <= nbytes <= size:
            return plan, nbytes
        again = any(plan == other for other, _ in seen)
        seen.append((plan, nbytes))
        actual = nbytes - linear_nbytes(plan)
        # If the same plan is found again, its texts are known already, so only a lower target finds another plan.
        overhead = max(overhead, actual) + (math.ceil((1 - LEAST_SHARE) * size / 2) if again else 0)
        overhead = actual if nbytes < least and not again else overhead
    fitting = [row for row in seen if row[1] <= size]
    if not fitting:
        raise RecipeError(f"no plan takes {least:,} to {size:,} bytes")
    return max(fitting, key=lambda row: row[1])


def plan_for_size(
    artifact_size: ArtifactSize, matrices: Sequence[MatrixInfo], options: Options, size: int, name: str
) -> tuple[Plan, int]:
    """Return the plan of least predicted loss whose artifact takes 99.5 to 100 % of `size` bytes, and its bytes.

    Errors: RecipeError naming the smallest possible size, the largest useful size, or the nearest size below.
    """
    smallest = _check_size(artifact_size, matrices, options, size, name)
    least = math.ceil(LEAST_SHARE * size)
    try:
        plan, nbytes = solve_for_size(artifact_size, matrices, options, size, least, name)
    except RecipeError:
        plan, nbytes = None, smallest
    # Just above the smallest possible file there may be no file within 0.5 %.
    if plan is not None and (nbytes >= least or size <= (1 + _NEAR_SMALLEST) * smallest):
        return plan, nbytes
    raise RecipeError(f"--size {size:,} bytes cannot be met within 0.5 %; {max(nbytes, smallest):,} can")


def plan_for_bits(matrices: Sequence[MatrixInfo], options: Options, bits: float, name: str) -> Plan:
    """Return the plan of least predicted loss whose block matrices take `bits` bits per weight, within 1 % below.

    Shared decoders are included. Embedding and lm_head get their first option.
    Errors: RecipeError naming the possible range.
    """
    blocks = [matrix for matrix in matrices if matrix.kind == "block"]
    if not blocks:
        raise RecipeError("no block matrix is left to compress; loosen --include/--exclude")
    weights = sum(matrix.weights for matrix in blocks)
    extremes = [sum(pick(o.nbytes for o in options[m.name]) for m in blocks) * 8 / weights for pick in (min, max)]
    if not extremes[0] <= bits <= extremes[1] * (1 + _BITS_TOLERANCE):
        least, most = math.ceil(100 * extremes[0]) / 100, math.floor(100 * extremes[1]) / 100
        raise RecipeError(
            f"--bits {bits:g} is not possible for this model; give a value between {least:.2f} and {most:.2f}"
        )
    most_bytes, least_bytes = int(bits * weights / 8), int(bits * (1 - _BITS_TOLERANCE) * weights / 8) + 1
    try:
        plan = solve_plan(blocks, options, most_bytes, least_bytes, name)
    except RecipeError as error:
        raise RecipeError(f"--bits {bits:g} cannot be met within 1 % for this model: {error}") from error
    others = [m for m in matrices if m.kind != "block" and m.name in options]
    by_name = {e.matrix.name: e for e in plan.entries} | {m.name: PlanEntry(m, options[m.name][0].fmt) for m in others}
    return Plan(tuple(by_name[m.name] for m in matrices if m.name in by_name), name)


def shrink_recipe(
    artifact_size: ArtifactSize,
    recipe: Plan,
    options: Options,
    size: int,
    total: int,
    nbytes_fn: NbytesFn,
    constant: int = 0,
) -> Plan:
    """Return the recipe's plan with as few changed formats as bring its `total` bytes down to `size`.

    No format is assumed to have less loss than the recipe's.
    Errors: RecipeError if more than half of the matrices would need another format.
    """
    base_options = {entry.matrix.name: find_option(entry, options) for entry in recipe.entries}
    penalty = _SWAP_PENALTY * sum(option.loss for option in base_options.values()) / len(base_options)
    penalized = {
        name: [dataclasses.replace(option, loss=max(option.loss, current.loss)) for option in options[name]]
        for name, current in base_options.items()
    }
    matrices = [entry.matrix for entry in recipe.entries]
    limits = {"max_changes": math.floor(_MAX_CHANGED_SHARE * len(recipe.entries)), "swap_penalty": penalty}
    try:
        found, _ = solve_for_size(
            artifact_size, matrices, penalized, size, 0, recipe.recipe, nbytes_fn, constant, base=recipe, **limits
        )
    except RecipeError:
        raise too_large_error(recipe, total, size) from None
    return rename_plan(recipe, found, size)


def adjust_plan(
    artifact_size: ArtifactSize,
    plan: Plan,
    options: Options,
    size: int,
    nbytes_fn: NbytesFn,
    constant: int,
) -> Plan | None:
    """Return the plan with a few changes that bring its artifact to 99.5 to 100 % of `size`; None if none exists."""
    penalty = _SWAP_PENALTY * sum(find_option(e, options).loss for e in plan.entries) / len(plan.entries)
    matrices, least = [entry.matrix for entry in plan.entries], math.ceil(LEAST_SHARE * size)
    try:
        return solve_for_size(
            artifact_size,
            matrices,
            options,
            size,
            least,
            plan.recipe,
            nbytes_fn,
            constant,
            base=plan,
            swap_penalty=penalty,
        )[0]
    except RecipeError:
        return None


def rename_plan(recipe: Plan, plan: Plan, size: int) -> Plan:
    """Return the plan under the recipe's name; if a format differs, the name says that the recipe was changed."""
    same = all(now.fmt == before.fmt for now, before in zip(plan.entries, recipe.entries, strict=True))
    name = recipe.recipe if same else f"{recipe.recipe}, changed to fit {size} bytes"
    return dataclasses.replace(plan, recipe=name)


def too_large_error(recipe: Plan, total: int, size: int) -> RecipeError:
    """Return the error for a recipe whose artifact of `total` bytes cannot be brought to `size`."""
    most, count = math.floor(_MAX_CHANGED_SHARE * len(recipe.entries)), len(recipe.entries)
    return RecipeError(
        f"recipe {recipe.recipe} takes about {total:,} bytes, {total - size:,} more than --size {size:,}, and smaller "
        f"formats for {most} of its {count} matrices do not suffice; give --size {total}, a recipe with fewer bits, or "
        "--size without --recipe to choose every format automatically"
    )


def _sum(plan: Plan, options: Options, nbytes_fn: NbytesFn) -> int:
    return sum(nbytes_fn(entry.matrix, find_option(entry, options)) for entry in plan.entries)


def _check_size(
    artifact_size: ArtifactSize, matrices: Sequence[MatrixInfo], options: Options, size: int, name: str
) -> int:
    """Return the bytes of the smallest possible artifact.

    Errors: RecipeError if `size` is smaller than that, or larger than any plan can use.
    """
    smallest = extreme_plan(matrices, options, lambda o: (o.nbytes, o.loss), name)
    least = artifact_size.nbytes(smallest)
    if size < least:
        tokenizer = sum(artifact_size.auxiliary_files.values())
        other = artifact_size.overhead(smallest) - tokenizer
        detail = f"{tokenizer:,} of tokenizer, {other:,} of headers, config and unquantized tensors"
        raise RecipeError(f"--size {size:,} bytes is too small: the smallest possible is {least:,} bytes ({detail})")
    finest = extreme_plan(matrices, options, lambda o: (o.loss, o.nbytes), name)
    most = artifact_size.overhead(finest) + predicted_bytes(finest, options)
    if math.ceil(LEAST_SHARE * size) > most:
        raise RecipeError(f"--size {size:,} bytes is more than this model needs: the largest useful is {most:,} bytes")
    return least
