"""Plans from one number: bytes of the whole artifact, or bits of the block matrices, by predicted loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from reallm.allocate import MatrixInfo, Plan
from reallm.allocate.analysis import Analysis, load_corrections
from reallm.allocate.candidates import NEURAL, calibrated_candidates, data_free_candidates, neural_candidates
from reallm.allocate.options import Options, options_for, predicted_bytes, predicted_loss
from reallm.allocate.recipe import DEFAULT_EMBEDDING
from reallm.allocate.sensitivity import sensitivity
from reallm.fit import gaussian_error, gaussian_share
from reallm.fit.objective import GUIDED
from reallm.formats import WeightFormat
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.scaled import Scaled
from reallm.model import Source, Walk
from reallm.pipeline.analysis import analysed, analysis_file, share_beside_rank_one
from reallm.pipeline.byte_budget import plan_for_bits, plan_for_size, shrink_recipe
from reallm.pipeline.calibrating import Progress, calculation_dtype, calibration_windows
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.settings import Settings, calibration_of
from reallm.pipeline.whole import WholeFile

# Without calibration: KL per unit of relative error of an embedding that is the head too, and of each by itself;
# second-order, on SmolLM2-135M (docs/experiments/predicted-loss-and-entropy-coding.md).
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
) -> Job:
    """A job whose plan has the least predicted loss within `size`, `bits_per_parameter` or `bits`.

    A `given` plan is taken as it is; its options are for the changes that bring it into the size, should it be too
    large once it is measured.

    Errors: RecipeError naming what is possible.
    """
    size = settings.size
    if settings.bits_per_parameter is not None:
        size = math.floor(settings.bits_per_parameter * source.total_parameters / 8)
    coding = size is not None if settings.coding is None else settings.coding
    analysis = analysis_of(source, walked, settings, progress) if settings.calibration else None
    if given is not None:
        matrices = [entry.matrix for entry in given.entries]
    walked_as = {matrix.name: matrix for matrix in walked.matrices}
    left = functools.cache(lambda name: share_beside_rank_one(source, walked_as[name]))
    options = options_of(matrices, walked, settings, analysis, coding and size is not None, given, left)
    forecast = Forecast(options, size, None, math.nan, analysis is not None)
    draft = Job(source, walked, Plan((), _name(settings, size)), settings, coding, forecast)
    if given is not None:
        plan, nbytes = given, WholeFile(draft).overhead(given) + predicted_bytes(given, options)
        if size is not None and nbytes > size:  # what no few changes bring there is refused before any work
            shrink_recipe(WholeFile(draft), given, options, size, nbytes, lambda _, option: option.nbytes)
    elif size is None:
        plan = plan_for_bits(matrices, options, float(settings.bits or 0), draft.plan.recipe)
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
) -> Options:
    """What every matrix can be stored as, with bytes and predicted losses.

    `left`: share of an embedding's or head's energy that a term of rank 1 leaves, asked for where analysis is not.
    """
    corrections = load_corrections(settings.corrections)
    ends = {"embedding": settings.embedding, "head": settings.head}
    if settings.bits is not None:
        ends = {kind: DEFAULT_EMBEDDING if spec is None else spec for kind, spec in ends.items()}
    depth = 1 + max((matrix.block for matrix in matrices if matrix.block is not None), default=0)

    def candidates(matrix: MatrixInfo) -> Sequence[WeightFormat]:
        known = analysis is not None and analysis.knows(matrix.name)
        if matrix.kind == "block" and not known:
            found: Sequence[WeightFormat] = data_free_candidates()
        else:
            found = calibrated_candidates(matrix.kind, _state_bits(settings))
        more = neural_candidates(matrix.kind, _index_bits(settings)) if NEURAL in settings.candidates else ()
        if not known:  # scales around a format are nothing to a prediction by roles
            more = tuple(fmt for fmt in more if not isinstance(fmt, Scaled))
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
            predicted = _ENDS["tied" if walked.tied_heads else matrix.kind] * beside * error
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
    """Numbers of every matrix: from the folder of analyses if they are there, else computed and put there."""
    path = None
    context = min(settings.calibration_context, settings.analysis_context)
    most = settings.calibration_windows * (settings.calibration_context // context)  # in the text that calibrates
    windows = min(settings.analysis_windows, most)
    few = dataclasses.replace(settings, calibration_windows=windows, calibration_context=context)
    calibration = calibration_of(few)
    fingerprint = source.fingerprint()
    if settings.analysis is not None:
        path = analysis_file(Path(settings.analysis), fingerprint, calibration, settings.seed)
        if path.is_file():
            return Analysis.load(path)
    model = source.load(calculation_dtype(source), "cpu").eval()
    windows = calibration_windows(source, few, lambda: model, progress)
    codes = ("uniform", "normal_float")
    tried = [fmt for fmt in calibrated_candidates("embedding", 0) if getattr(fmt, "base", fmt).name in codes]
    origin = {"source": Path(source.label).name, "source_sha256": fingerprint, "calibration": calibration}
    guided = settings.objective == GUIDED
    found = analysed(source, walked, model, windows, settings.device, settings.seed, tried, origin, guided, progress)
    if path is not None:
        found.save(path)
    return found
