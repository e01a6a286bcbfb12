"""Plan formats for one budget by predicted loss: bytes of the artifact, or bits per weight of the block matrices."""

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
from reallm.pipeline.compress_settings import Settings, analysis_settings, calibration_record
from reallm.pipeline.cost import seconds_of_analysis
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.load_weight import checked_original
from reallm.pipeline.loss_analysis import FILES, analysis_file, compute_analysis, rank_one_residual_share
from reallm.source import Source, Walk

# Without calibration: KL per unit of relative error of an embedding that is the head too, and of each by itself;
# second-order, on SmolLM2-135M (docs/experiments/predicted-loss-and-entropy-coding.md).
_EMBEDDING_LOSS = {"tied": 9.75, "embedding": 0.9, "head": 8.85}
# Share of the energy that a rank-1 term leaves in the embedding on which these were measured. A mean adds one number to
# all logits: if it is larger, an error costs more than its share of the energy suggests, so a residual is credited with
# at most this gain.
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
    """Return a job whose plan has the least predicted loss within `size`, `bits_per_parameter` or `bits`.

    A `base_plan` is used unchanged; its options serve only to reduce it to the size if the measured artifact is too
    large. If `analyse` is false, only a stored analysis is used.

    Errors: RecipeError naming the possible values.
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
    analysed = {m.name for m in walked.matrices if m.expert is None} if to_analyse else frozenset()
    options = format_options(
        matrices, walked, settings, analysis, coding and size is not None, base_plan, residual_share, analysed
    )
    forecast = Forecast(options, size, None, math.nan, analysis is not None, to_analyse)
    draft = Job(source, walked, Plan((), _name(settings, size)), settings, coding, forecast)
    if base_plan is not None:
        plan, nbytes = base_plan, ArtifactSize(draft).overhead(base_plan) + predicted_bytes(base_plan, options)
        if size is not None and nbytes > size:  # refuse before any work if a few changes do not suffice
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
    """Return the candidate formats of every matrix, with bytes and predicted losses.

    `residual_share`: returns the share of the energy of embedding or lm_head that a rank-1 term leaves; called for
    matrices without analysis.
    `to_analyse`: matrices that a later analysis will cover; they get the candidates of analysed matrices.
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
            role_weights = sum(other.weights for other in matrices if other.role == matrix.role)
            predicted = matrix.weights / role_weights * sensitivity(matrix, fmt, depth) * gaussian_error(fmt)
        else:
            residual = max(residual_share(matrix.name), _MIN_RANK_ONE_RESIDUAL) if fmt.residual_rank() else 1.0
            error = gaussian_error(fmt.without_residual())
            predicted = (
                _EMBEDDING_LOSS["tied" if walked.tied_heads and matrix.role != PER_LAYER else matrix.kind]
                * residual
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

    base_formats = {entry.matrix.name: entry.fmt for entry in base_plan.entries} if base_plan else None
    return matrix_options(
        matrices, candidates, loss, share, settings.rank, {} if base_plan else embedding_formats, base_formats
    )


def _state_bits(settings: Settings) -> int:
    """Return the state bits of trellis candidates; by default 0 (none) on a CPU.

    At 12 bits a CPU takes 60 s per 10⁶ weights, 2 h for a model with 135M parameters.
    """
    if settings.state_bits is not None:
        return settings.state_bits
    return 0 if torch.device(settings.device).type == "cpu" else 16


def _index_bits(settings: Settings) -> int:
    """Return the largest index bits of neural codebooks; a CPU searches 65,536 codewords per vector in 1 ms."""
    return 12 if torch.device(settings.device).type == "cpu" else 16


def load_or_compute_analysis(
    source: Source, walked: Walk, settings: Settings, progress: Progress | None = None
) -> Analysis:
    """Load the analysis from the folder `settings.analysis`; if it is not there, compute it and save it.

    Errors: SourceError naming a tensor that is not finite.
    """
    selected = analysis_settings(settings)
    path = _analysis_path(source, selected)
    if path is not None and path.is_file():
        return Analysis.load(path)
    fingerprint, calibration = source.fingerprint(), calibration_record(selected)
    if progress:
        seconds = seconds_of_analysis(source, walked, settings)
        count, context = selected.calibration_windows, selected.calibration_context
        progress(f"analysis of {count} windows of {context:,} tokens, about {seconds:.0f} s", 0, count)
    model = checked_original(source, gradient_dtype(source, settings.device))
    windows = calibration_windows(source, selected, lambda: model, progress)
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
    """Return the analysis; if `analyse` is false, the stored one, or None if there is none."""
    if analyse:
        return load_or_compute_analysis(source, walked, settings, progress)
    if settings.analysis is None or not any(Path(settings.analysis).glob(FILES)):
        return None  # no analysis of any model is stored: do not read the weights for a fingerprint
    path = _analysis_path(source, analysis_settings(settings))
    return Analysis.load(path) if path is not None and path.is_file() else None


def _analysis_path(source: Source, selected: Settings) -> Path | None:
    """Return the file for the analysis of these windows; None without a folder."""
    if selected.analysis is None:
        return None
    return analysis_file(Path(selected.analysis), source.fingerprint(), calibration_record(selected), selected.seed)
