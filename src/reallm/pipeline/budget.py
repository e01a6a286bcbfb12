"""Plans from one number: bytes of the whole artifact, or bits of the block matrices, by predicted loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from reallm.allocate import MatrixInfo, Plan
from reallm.allocate.candidates import (
    NEURAL,
    calibrated_candidates,
    data_free_candidates,
    neural_candidates,
    plugin_candidates,
)
from reallm.allocate.format_plan import PER_LAYER
from reallm.allocate.loss_prediction import Analysis, load_corrections
from reallm.allocate.options import Options, matrix_options, predicted_bytes, predicted_loss
from reallm.allocate.recipe import DEFAULT_EMBEDDING
from reallm.allocate.sensitivity import sensitivity
from reallm.fit import gaussian_error, gaussian_share
from reallm.fit.objective import GUIDED
from reallm.formats import WeightFormat
from reallm.pipeline.artifact_size import ArtifactSize
from reallm.pipeline.byte_budget import plan_for_bits, plan_for_size, shrink_recipe
from reallm.pipeline.calibration_inputs import Progress, calibration_windows, gradient_dtype
from reallm.pipeline.compress_settings import Settings, calibration_record, for_analysis
from reallm.pipeline.cost import seconds_of_analysis
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.load_weight import checked_original
from reallm.pipeline.loss_analysis import FILES, analysis_file, compute_analysis, rank_one_residual_share
from reallm.source import Source, Walk

# Without calibration: KL per unit of relative error of an embedding that is the head too, and of each by itself;
# second-order, on SmolLM2-135M (docs/experiments/predicted-loss-and-entropy-coding.md).
_EMBEDDING_LOSS = {"tied": 9.75, "embedding": 0.9, "head": 8.85}
# What rank 1 leaves of the embedding that these were measured on. A mean adds one number to all logits: where it is
# larger, an error costs more than its share of the energy says, so that a residual is credited with no more than there.
_MIN_RANK_ONE_RESIDUAL = 0.5


def plan_for_budget(
    source: Source,
    walked: Walk,
    matrices: Sequence[MatrixInfo],
    settings: Settings,
    base_plan: Plan | None = None,
    progress: Progress | None = None,
    analyse: bool = True,
) -> Job:
    """A job whose plan has the least predicted loss within `size`, `bits_per_parameter` or `bits`.

    A `base_plan` plan is taken as it is; its options are for the changes that bring it into the size, should it be too
    large once it is measured. Without `analyse` only an analysis that is kept is used.

    Errors: RecipeError naming what is possible.
    """
    size = settings.size
    if settings.bits_per_parameter is not None:
        size = math.floor(settings.bits_per_parameter * source.total_parameters / 8)
    coding = size is not None if settings.coding is None else settings.coding
    analysis = _analysis(source, walked, settings, progress, analyse) if settings.calibration else None
    to_analyse = bool(settings.calibration) and analysis is None
    if base_plan is not None:
        matrices = [entry.matrix for entry in base_plan.entries]
    matrix_by_name = {matrix.name: matrix for matrix in walked.matrices}
    residual_share = functools.cache(lambda name: rank_one_residual_share(source, matrix_by_name[name]))
    reached = {m.name for m in walked.matrices if m.expert is None} if to_analyse else frozenset()
    options = format_options(
        matrices, walked, settings, analysis, coding and size is not None, base_plan, residual_share, reached
    )
    forecast = Forecast(options, size, None, math.nan, analysis is not None, to_analyse)
    draft = Job(source, walked, Plan((), _name(settings, size)), settings, coding, forecast)
    if base_plan is not None:
        plan, nbytes = base_plan, ArtifactSize(draft).overhead(base_plan) + predicted_bytes(base_plan, options)
        if size is not None and nbytes > size:  # what no few changes bring there is refused before any work
            shrink_recipe(ArtifactSize(draft), base_plan, options, size, nbytes, lambda _, option: option.nbytes)
    elif size is None:
        plan = plan_for_bits(matrices, options, float(settings.bits or 0), draft.plan.recipe)
        nbytes = None
    else:
        plan, nbytes = plan_for_size(ArtifactSize(draft), matrices, options, size, draft.plan.recipe)
    plan.check()
    forecast = dataclasses.replace(forecast, nbytes=nbytes, loss=predicted_loss(plan, options))
    return dataclasses.replace(draft, plan=plan, forecast=forecast)


def _name(settings: Settings, size: int | None) -> str:
    return f"{settings.bits:g} bits" if size is None else f"{size} bytes"


def format_options(
    matrices: Sequence[MatrixInfo],
    walked: Walk,
    settings: Settings,
    analysis: Analysis | None,
    coding: bool,
    base_plan: Plan | None = None,
    residual_share: Callable[[str], float] = lambda name: 1.0,
    to_analyse: Collection[str] = (),
) -> Options:
    """What every matrix can be stored as, with bytes and predicted losses.

    `residual_share`: share of an embedding's or head's energy that a term of rank 1 leaves, asked for where analysis is not.
    `to_analyse`: matrices that an analysis will know; they choose from what it will let them choose from.
    """
    corrections = load_corrections(settings.corrections)
    embedding_formats = {"embedding": settings.embedding, "head": settings.head}
    if settings.bits is not None:
        embedding_formats = {
            kind: DEFAULT_EMBEDDING if spec is None else spec for kind, spec in embedding_formats.items()
        }
    depth = 1 + max((matrix.block for matrix in matrices if matrix.block is not None), default=0)

    def candidates(matrix: MatrixInfo) -> Sequence[WeightFormat]:
        known = analysis is not None and analysis.knows(matrix.name)
        if matrix.kind == "block" and not known and matrix.name not in to_analyse:
            found: Sequence[WeightFormat] = data_free_candidates()
        else:
            found = calibrated_candidates(matrix.kind, _state_bits(settings))
        more = neural_candidates(matrix.kind, _index_bits(settings)) if NEURAL in settings.candidates else ()
        more += plugin_candidates(matrix.kind, settings.device)
        if not known:  # scales around a format are nothing to a prediction by roles
            found, more = (tuple(fmt for fmt in formats if fmt.predicted_by_role) for formats in (found, more))
        return [*corrections.select_candidates(matrix.kind, found), *more]

    def loss(matrix: MatrixInfo, fmt: WeightFormat) -> float:
        if analysis is not None and analysis.knows(matrix.name):
            predicted = analysis.loss(matrix.name, fmt, gaussian_error)
        elif matrix.kind == "block":
            of_role = sum(other.weights for other in matrices if other.role == matrix.role)
            predicted = matrix.weights / of_role * sensitivity(matrix, fmt, depth) * gaussian_error(fmt)
        else:
            beside = max(residual_share(matrix.name), _MIN_RANK_ONE_RESIDUAL) if fmt.residual_rank() else 1.0
            error = gaussian_error(fmt.without_residual())
            predicted = (
                _EMBEDDING_LOSS["tied" if walked.tied_heads and matrix.role != PER_LAYER else matrix.kind]
                * beside
                * error
            )
        return corrections.correct_loss(matrix, fmt, predicted)

    def share(matrix: MatrixInfo, fmt: WeightFormat) -> float:
        if not coding:
            return 1.0
        measured = analysis.share(matrix.name, fmt) if analysis is not None else None
        if matrix.kind == "block" or not fmt.residual_rank():
            return gaussian_share(fmt) if measured is None else measured
        # Factors are not coded: tuning changes them.
        base = fmt.without_residual()
        coded = base.nbytes(matrix.shape) / fmt.nbytes(matrix.shape)
        return 1 - coded * (1 - (gaussian_share(base) if measured is None else measured))

    always = {entry.matrix.name: entry.fmt for entry in base_plan.entries} if base_plan else None
    return matrix_options(
        matrices, candidates, loss, share, settings.rank, {} if base_plan else embedding_formats, always
    )


def _state_bits(settings: Settings) -> int:
    """Of trellis candidates. A CPU takes 60 s for 10⁶ weights at 12 bits, 2 h for a 135M model: none there."""
    if settings.state_bits is not None:
        return settings.state_bits
    return 0 if torch.device(settings.device).type == "cpu" else 16


def _index_bits(settings: Settings) -> int:
    """The most of codeword candidates: a CPU goes through 65,536 codewords for a vector in 1 ms."""
    return 12 if torch.device(settings.device).type == "cpu" else 16


def load_or_compute_analysis(
    source: Source, walked: Walk, settings: Settings, progress: Progress | None = None
) -> Analysis:
    """Numbers of every matrix: from the folder of analyses if they are there, else computed and put there.

    Errors: SourceError naming a tensor that is not finite.
    """
    few = for_analysis(settings)
    path = _kept_as(source, few)
    if path is not None and path.is_file():
        return Analysis.load(path)
    fingerprint, calibration = source.fingerprint(), calibration_record(few)
    if progress:
        seconds = seconds_of_analysis(source, walked, settings)
        count, context = few.calibration_windows, few.calibration_context
        progress(f"analysis of {count} windows of {context:,} tokens, about {seconds:.0f} s", 0, count)
    model = checked_original(source, gradient_dtype(source, settings.device))
    windows = calibration_windows(source, few, lambda: model, progress)
    embedding_candidates = [f for f in calibrated_candidates("embedding", 0) if f.without_residual().cheap_to_fit]
    origin = {"source": Path(source.label).name, "source_sha256": fingerprint, "calibration": calibration}
    guided = settings.objective == GUIDED
    found = compute_analysis(
        source, walked, model, windows, settings.device, settings.seed, embedding_candidates, origin, guided, progress
    )
    if path is not None:
        found.save(path)
    return found


def _analysis(
    source: Source, walked: Walk, settings: Settings, progress: Progress | None, analyse: bool
) -> Analysis | None:
    """The analysis; without `analyse` the one that is kept, if there is one."""
    if analyse:
        return load_or_compute_analysis(source, walked, settings, progress)
    if settings.analysis is None or not any(Path(settings.analysis).glob(FILES)):
        return None  # nothing is kept of any model: do not read the files for their fingerprint
    path = _kept_as(source, for_analysis(settings))
    return Analysis.load(path) if path is not None and path.is_file() else None


def _kept_as(source: Source, few: Settings) -> Path | None:
    """Where the analysis of these windows is kept; None where none is."""
    if few.analysis is None:
        return None
    return analysis_file(Path(few.analysis), source.fingerprint(), calibration_record(few), few.seed)
