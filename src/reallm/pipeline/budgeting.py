"""Plans from one number: bytes of the whole artifact, or bits of the block matrices, by predicted loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from reallm.allocate import MatrixInfo, Plan, Planned
from reallm.allocate.analysis import Analysis, load_corrections
from reallm.allocate.budget import candidate_formats
from reallm.allocate.candidates import NEURAL, calibrated_candidates, neural_candidates
from reallm.allocate.plan import PER_LAYER, tables_nbytes
from reallm.allocate.recipe import DEFAULT_EMBEDDING
from reallm.allocate.sensitivity import sensitivity
from reallm.allocate.sizing import (
    LEAST_SHARE,
    Option,
    Options,
    chosen_plan,
    nudged,
    option_of,
    options_for,
    predicted_bytes,
    predicted_loss,
)
from reallm.errors import RecipeError
from reallm.fit import gaussian_error, gaussian_share
from reallm.fit.objective import GUIDED
from reallm.formats import Table, WeightFormat, tables_of
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.scaled import Scaled
from reallm.model import Source, Walk
from reallm.pipeline.analysis import FILES, analysed, analysis_file, share_beside_rank_one
from reallm.pipeline.calibrating import Progress, calibration_windows, gradient_dtype
from reallm.pipeline.cost import seconds_of_analysis
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.reading import checked_original
from reallm.pipeline.settings import Settings, calibration_of, for_analysis
from reallm.pipeline.whole import WholeFile

_BITS_TOLERANCE = 0.01
_NEAR_SMALLEST = 0.02
_ROUNDS = 12  # of choosing anew with the bytes of headers and texts that the last choice has
_MOST_CHANGED = 0.5  # of a recipe's matrices: with more of them in other formats it is another recipe
# What changing one of them costs beside its loss, in the mean loss of one: else whatever is predicted to lose a trace
# less in a byte less is taken before the one exchange that suffices.
_UNWILLING = 0.1
_TEXT_ROUNDS = 4  # config and plan name every format once, so that other formats may take other bytes of text
# Without calibration: KL per unit of relative error of an embedding that is the head too, and of each by itself;
# second-order, on SmolLM2-135M (docs/log.md, 2026-11-24).
_ENDS = {"tied": 9.75, "embedding": 0.9, "head": 8.85}
# What rank 1 leaves of the embedding that these were measured on. A mean adds one number to all logits: where it is
# larger, an error costs more than its share of the energy says, so that a residual is credited with no more than there.
_LEAST_BESIDE_RANK_ONE = 0.5


def from_budget(
    source: Source,
    walked: Walk,
    matrices: Sequence[MatrixInfo],
    settings: Settings,
    given: Plan | None = None,
    progress: Progress | None = None,
    analyse: bool = True,
) -> Job:
    """A job whose plan has the least predicted loss within `size`, `bits_per_parameter` or `bits`.

    A `given` plan is taken as it is; its options are for the changes that bring it into the size, should it be too
    large once it is measured. Without `analyse` only an analysis that is kept is used.

    Errors: RecipeError naming what is possible.
    """
    size = settings.size
    if settings.bits_per_parameter is not None:
        size = math.floor(settings.bits_per_parameter * source.total_parameters / 8)
    coding = size is not None if settings.coding is None else settings.coding
    analysis = _analysis(source, walked, settings, progress, analyse) if settings.calibration else None
    to_analyse = bool(settings.calibration) and analysis is None
    if given is not None:
        matrices = [entry.matrix for entry in given.entries]
    walked_as = {matrix.name: matrix for matrix in walked.matrices}
    left = functools.cache(lambda name: share_beside_rank_one(source, walked_as[name]))
    reached = {m.name for m in walked.matrices if m.expert is None} if to_analyse else frozenset()
    options = options_of(matrices, walked, settings, analysis, coding and size is not None, given, left, reached)
    forecast = Forecast(options, size, None, math.nan, analysis is not None, to_analyse)
    draft = Job(source, walked, Plan((), _name(settings, size)), settings, coding, forecast)
    if given is not None:
        plan, nbytes = given, WholeFile(draft).beside(given) + predicted_bytes(given, options)
        if size is not None and nbytes > size:  # what no few changes bring there is refused before any work
            expected = {entry.matrix.name: option_of(entry, options).nbytes for entry in given.entries}
            within(WholeFile(draft), given, given, options, size, expected, nbytes, lambda _, option: option.nbytes)
    elif size is None:
        plan = _for_bits(matrices, options, float(settings.bits or 0), draft.plan.recipe)
        nbytes = None
    else:
        plan, nbytes = plan_for_size(WholeFile(draft), matrices, options, size, draft.plan.recipe)
    plan.check()
    forecast = dataclasses.replace(forecast, nbytes=nbytes, loss=predicted_loss(plan, options))
    return dataclasses.replace(draft, plan=plan, forecast=forecast)


def _name(settings: Settings, size: int | None) -> str:
    return f"{settings.bits:g} bits" if size is None else f"{size} bytes"


def options_of(
    matrices: Sequence[MatrixInfo],
    walked: Walk,
    settings: Settings,
    analysis: Analysis | None,
    coding: bool,
    given: Plan | None = None,
    left: Callable[[str], float] = lambda name: 1.0,
    to_analyse: Collection[str] = (),
) -> Options:
    """What every matrix can be stored as, with bytes and predicted losses.

    `left`: share of an embedding's or head's energy that a term of rank 1 leaves, asked for where analysis is not.
    `to_analyse`: matrices that an analysis will know; they choose from what it will let them choose from.
    """
    corrections = load_corrections(settings.corrections)
    ends = {"embedding": settings.embedding, "head": settings.head}
    if settings.bits is not None:
        ends = {kind: DEFAULT_EMBEDDING if spec is None else spec for kind, spec in ends.items()}
    depth = 1 + max((matrix.block for matrix in matrices if matrix.block is not None), default=0)

    def candidates(matrix: MatrixInfo) -> Sequence[WeightFormat]:
        known = analysis is not None and analysis.knows(matrix.name)
        if matrix.kind == "block" and not known and matrix.name not in to_analyse:
            found: Sequence[WeightFormat] = candidate_formats()
        else:
            found = calibrated_candidates(matrix.kind, _state_bits(settings))
        more = neural_candidates(matrix.kind, _index_bits(settings)) if NEURAL in settings.candidates else ()
        if not known:  # scales around a format are nothing to a prediction by roles
            found, more = (tuple(fmt for fmt in formats if not isinstance(fmt, Scaled)) for formats in (found, more))
        return [*corrections.candidates_of(matrix.kind, found), *more]

    def loss(matrix: MatrixInfo, fmt: WeightFormat) -> float:
        if analysis is not None and analysis.knows(matrix.name):
            predicted = analysis.loss(matrix.name, fmt, gaussian_error)
        elif matrix.kind == "block":
            of_role = sum(other.weights for other in matrices if other.role == matrix.role)
            predicted = matrix.weights / of_role * sensitivity(matrix, fmt, depth) * gaussian_error(fmt)
        else:
            beside = max(left(matrix.name), _LEAST_BESIDE_RANK_ONE) if isinstance(fmt, LowRankPlus) else 1.0
            error = gaussian_error(fmt.base if isinstance(fmt, LowRankPlus) else fmt)
            predicted = (
                _ENDS["tied" if walked.tied_heads and matrix.role != PER_LAYER else matrix.kind] * beside * error
            )
        return corrections.corrected(matrix, fmt, predicted)

    def share(matrix: MatrixInfo, fmt: WeightFormat) -> float:
        if not coding:
            return 1.0
        measured = analysis.share(matrix.name, fmt) if analysis is not None else None
        if matrix.kind == "block" or not isinstance(fmt, LowRankPlus):
            return gaussian_share(fmt) if measured is None else measured
        # Factors are not coded: tuning changes them.
        coded = fmt.base.nbytes(matrix.shape) / fmt.nbytes(matrix.shape)
        return 1 - coded * (1 - (gaussian_share(fmt.base) if measured is None else measured))

    always = {entry.matrix.name: entry.fmt for entry in given.entries} if given else None
    return options_for(matrices, candidates, loss, share, settings.rank, {} if given else ends, always)


def _state_bits(settings: Settings) -> int:
    """Of trellis candidates. A CPU takes 60 s for 10⁶ weights at 12 bits, 2 h for a 135M model: none there."""
    if settings.state_bits is not None:
        return settings.state_bits
    return 0 if torch.device(settings.device).type == "cpu" else 16


def _index_bits(settings: Settings) -> int:
    """The most of codeword candidates: a CPU goes through 65,536 codewords for a vector in 1 ms."""
    return 12 if torch.device(settings.device).type == "cpu" else 16


def analysis_of(source: Source, walked: Walk, settings: Settings, progress: Progress | None = None) -> Analysis:
    """Numbers of every matrix: from the folder of analyses if they are there, else computed and put there.

    Errors: SourceError naming a tensor that is not finite.
    """
    few = for_analysis(settings)
    path = _kept_as(source, few)
    if path is not None and path.is_file():
        return Analysis.load(path)
    fingerprint, calibration = source.fingerprint(), calibration_of(few)
    if progress:
        seconds = seconds_of_analysis(source, walked, settings)
        count, context = few.calibration_windows, few.calibration_context
        progress(f"analysis of {count} windows of {context:,} tokens, about {seconds:.0f} s", 0, count)
    model = checked_original(source, gradient_dtype(source, settings.device))
    windows = calibration_windows(source, few, lambda: model, progress)
    codes = ("uniform", "normal_float")
    tried = [fmt for fmt in calibrated_candidates("embedding", 0) if getattr(fmt, "base", fmt).name in codes]
    origin = {"source": Path(source.label).name, "source_sha256": fingerprint, "calibration": calibration}
    guided = settings.objective == GUIDED
    found = analysed(source, walked, model, windows, settings.device, settings.seed, tried, origin, guided, progress)
    if path is not None:
        found.save(path)
    return found


def _analysis(
    source: Source, walked: Walk, settings: Settings, progress: Progress | None, analyse: bool
) -> Analysis | None:
    """The analysis; without `analyse` the one that is kept, if there is one."""
    if analyse:
        return analysis_of(source, walked, settings, progress)
    if settings.analysis is None or not any(Path(settings.analysis).glob(FILES)):
        return None  # nothing is kept of any model: do not read the files for their fingerprint
    path = _kept_as(source, for_analysis(settings))
    return Analysis.load(path) if path is not None and path.is_file() else None


def _kept_as(source: Source, few: Settings) -> Path | None:
    """Where the analysis of these windows is kept; None where none is."""
    if few.analysis is None:
        return None
    return analysis_file(Path(few.analysis), source.fingerprint(), calibration_of(few), few.seed)


def plan_for_size(
    whole: WholeFile, matrices: Sequence[MatrixInfo], options: Options, size: int, name: str
) -> tuple[Plan, int]:
    """The plan of least predicted loss whose artifact takes 99.5 to 100 % of `size` bytes, and the bytes expected.

    Errors: RecipeError naming the smallest possible size, or the largest useful one.
    """
    least = _checked_size(whole, matrices, options, size, name)
    smallest = _extreme(matrices, options, name, lambda o: (o.nbytes, o.loss))
    fewest = predicted_bytes(smallest, options)
    beside, best = whole.beside(smallest), None
    for number in range(_ROUNDS):
        # Where texts are some percent of the file they go up and down with the choice: try budgets around.
        trial = beside - int((number - 3) * 0.001 * size) if number > 3 else beside
        chosen = chosen_plan(matrices, options, max(size - trial, fewest), math.ceil(LEAST_SHARE * size) - trial, name)
        for plan in (chosen, _filled(whole, chosen, options, size)):
            now = whole.beside(plan)
            nbytes = now + predicted_bytes(plan, options)
            if nbytes <= size and (best is None or nbytes > best[1]):
                best = plan, nbytes
                if nbytes >= LEAST_SHARE * size:
                    return best
        if number < 3:
            beside = max(now, beside + nbytes - size) if nbytes > size else now
    if best is not None and size <= (1 + _NEAR_SMALLEST) * least:
        return best  # there is nothing finer between the smallest possible file and the next
    near = least if best is None else max(best[1], least)
    raise RecipeError(f"--size {size:,} bytes cannot be met within 0.5 %; {near:,} can")


def within(
    whole: WholeFile,
    recipe: Plan,
    plan: Plan,
    options: Options,
    size: int,
    stored: Mapping[str, int],
    total: int,
    nbytes_of: Callable[[MatrixInfo, Option], int],
) -> Plan:
    """`plan`, which began as `recipe` and takes `total` bytes, with few exchanges that bring it to at most `size`.

    `stored` are bytes by matrix in `total`; a matrix that is exchanged counts with `nbytes_of` its new option.
    Errors: RecipeError if more than half of the matrices would have other formats than the recipe's.
    """
    beside, text = whole.beside(plan), 0
    options = _unwilling(recipe, options)
    for _ in range(_TEXT_ROUNDS):
        room = size - total - text
        changed = renamed(recipe, nudged(plan, options, stored, room, -total, nbytes_of), size)
        exchanged = [now for now, before in zip(changed.entries, plan.entries, strict=True) if now != before]
        moved = sum(nbytes_of(e.matrix, option_of(e, options)) - stored[e.matrix.name] for e in exchanged)
        now = whole.beside(changed) - beside
        if total + moved + now <= size:
            if _other_formats(recipe, changed) > _MOST_CHANGED * len(recipe.entries):
                break
            return changed
        text = max(text, now)
    raise too_large(recipe, total, size)


def renamed(recipe: Plan, plan: Plan, size: int) -> Plan:
    """The plan under the recipe's name if all its formats are the recipe's, else under one that says they are not."""
    same = not _other_formats(recipe, plan)
    name = recipe.recipe if same else f"{recipe.recipe}, changed to fit {size} bytes"
    return dataclasses.replace(plan, recipe=name)


def too_large(recipe: Plan, total: int, size: int) -> RecipeError:
    """What to say of a recipe that `total` bytes are too many of."""
    half, many = math.floor(_MOST_CHANGED * len(recipe.entries)), len(recipe.entries)
    return RecipeError(
        f"recipe {recipe.recipe} takes about {total:,} bytes, {total - size:,} more than the {size:,} of --size, and "
        f"smaller formats for {half} of its {many} matrices do not make up for it; give --size {total}, a recipe with "
        "fewer bits, or --size without --recipe to have every format chosen"
    )


def _unwilling(recipe: Plan, options: Options) -> Options:
    """The options; a format other than the recipe's is never better than that, and a little worse for being another."""
    begun = {entry.matrix.name: option_of(entry, options) for entry in recipe.entries}
    more = _UNWILLING * sum(option.loss for option in begun.values()) / len(begun)

    def charged(option: Option, wanted: Option) -> Option:
        return (
            option
            if option.fmt == wanted.fmt
            else dataclasses.replace(option, loss=max(option.loss, wanted.loss) + more)
        )

    return {name: [charged(option, wanted) for option in options[name]] for name, wanted in begun.items()}


def _other_formats(recipe: Plan, plan: Plan) -> int:
    return sum(now.fmt != before.fmt for now, before in zip(plan.entries, recipe.entries, strict=True))


def _filled(whole: WholeFile, plan: Plan, options: Options, size: int) -> Plan:
    """The plan with a few exchanges that bring it into the budget, as far as texts of the same length go."""
    expected = {entry.matrix.name: option_of(entry, options).nbytes for entry in plan.entries}
    room = size - whole.beside(plan) - sum(expected.values())
    return nudged(plan, options, expected, room, room - int((1 - LEAST_SHARE) * size), lambda _, option: option.nbytes)


def _checked_size(whole: WholeFile, matrices: Sequence[MatrixInfo], options: Options, size: int, name: str) -> int:
    """Bytes of the smallest possible artifact; RecipeError if `size` is below them or beyond all use."""
    smallest = _extreme(matrices, options, name, lambda o: (o.nbytes, o.loss))
    least = whole.nbytes(smallest)
    if size < least:
        tokenizer = sum(whole.companions.values())
        kept = whole.beside(smallest) - tokenizer
        parts = f"{tokenizer:,} of tokenizer, {kept:,} of headers, config and tensors that are kept"
        raise RecipeError(f"--size {size:,} bytes is too small: the smallest possible is {least:,} bytes ({parts})")
    finest = _extreme(matrices, options, name, lambda o: (o.loss, o.nbytes))
    most = whole.beside(finest) + predicted_bytes(finest, options)
    if math.ceil(LEAST_SHARE * size) > most:
        raise RecipeError(f"--size {size:,} bytes is more than this model needs: the largest useful is {most:,} bytes")
    return least


def _extreme(matrices: Sequence[MatrixInfo], options: Options, name: str, key: Callable[[Option], tuple]) -> Plan:
    """Each matrix in the option that is least by `key`."""
    named = [matrix for matrix in matrices if matrix.name in options]
    return Plan(tuple(Planned(m, min(options[m.name], key=key).fmt) for m in named), name)


def _for_bits(matrices: Sequence[MatrixInfo], options: Options, bits: float, name: str) -> Plan:
    """The plan of least predicted loss whose block matrices take `bits` stored bits a weight, within 1 % below.

    Errors: RecipeError naming the possible range.
    """
    blocks = [matrix for matrix in matrices if matrix.kind == "block"]
    if not blocks:
        raise RecipeError("no block matrix is left to compress; loosen --include/--exclude")
    weights = sum(matrix.weights for matrix in blocks)
    extremes = [sum(pick(o.nbytes for o in options[m.name]) for m in blocks) * 8 / weights for pick in (min, max)]
    if not extremes[0] <= bits <= extremes[1] * (1 + _BITS_TOLERANCE):
        least, most = math.ceil(100 * extremes[0]) / 100, math.floor(100 * extremes[1]) / 100
        raise RecipeError(f"--bits {bits:g} is not possible for this model; between {least:.2f} and {most:.2f} is")
    least_bytes = int(bits * (1 - _BITS_TOLERANCE) * weights / 8) + 1
    plan = _with_shared(blocks, options, int(bits * weights / 8), least_bytes, name)
    if plan.block_bits < bits * (1 - _BITS_TOLERANCE):
        raise RecipeError(f"{bits:g} bits cannot be met within 1 %: the nearest below is {plan.block_bits:.3f}")
    ends = [m for m in matrices if m.kind != "block" and m.name in options]
    by_name = {e.matrix.name: e for e in plan.entries} | {m.name: Planned(m, options[m.name][0].fmt) for m in ends}
    return Plan(tuple(by_name[m.name] for m in matrices if m.name in by_name), name)


def _with_shared(blocks: Sequence[MatrixInfo], options: Options, budget: int, least: int, name: str) -> Plan:
    """The plan of least predicted loss, decoders that its matrices share within the budget too.

    They are in no matrix's bytes: those that would be chosen if they were free are given room, and what is chosen then
    is chosen among them. Where that ends below `least`, as with a model so small that decoders are dear, one or none is
    shared.
    Errors: RecipeError if the smallest options exceed the budget.
    """

    def among(tables: Mapping[str, Table], taken: int) -> Plan | None:
        """The plan with no decoders but these, if its matrices fit what is left."""
        rows = {m.name: [o for o in options[m.name] if o.fmt.tables().keys() <= tables.keys()] for m in blocks}
        if not all(rows.values()) or sum(min(o.nbytes for o in found) for found in rows.values()) > budget - taken:
            return None
        return chosen_plan(blocks, rows, budget - taken, max(least - taken, 0), name)

    everything = tables = tables_of(option.fmt for matrix in blocks for option in options[matrix.name])
    plan = among(tables, 0)
    while plan is not None and (plan.nbytes > budget or plan.tables.keys() < tables.keys()):
        tables = plan.tables
        plan = among(tables, tables_nbytes(tables))
    if plan is not None and plan.nbytes >= least:
        return plan
    few = [{}, *({table: everything[table]} for table in everything)]
    found = [plan for plan in [plan, *(among(some, tables_nbytes(some)) for some in few)] if plan is not None]
    if not found:
        raise RecipeError(f"{name} leave no room for the decoders that {len(blocks)} matrices would share")
    return min(found, key=lambda plan: (plan.nbytes < least, predicted_loss(plan, options)))
