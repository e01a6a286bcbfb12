"""Fit every matrix of a job, by its weights alone or on calibration inputs in a block-wise forward pass.

Every finished matrix is saved at once to the work folder, so that an interrupted run can resume.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.allocate import PlanEntry
from reallm.calibrate.block_loader import BlockLoader
from reallm.calibrate.hidden_states import HiddenStateCache, SecondMoments
from reallm.calibrate.loss_gradients import Guidance
from reallm.checkpoint import check_finished, finished_file, save_tensors
from reallm.errors import FormatError, SourceError
from reallm.fit import Objective, fit
from reallm.fit.objective import OUTPUTS
from reallm.formats import WeightFormat, use_shared_decoders
from reallm.formats.base import add_prefix, strip_prefix
from reallm.pipeline.calibration_inputs import Progress, calculation_dtype, gradient_dtype
from reallm.pipeline.decoder_training import matrices_missing_decoder, train_shared_decoders
from reallm.pipeline.fit_cache import FitCache, fit_key
from reallm.pipeline.job import Job
from reallm.pipeline.load_weight import checked_original, load_weight, matrix_seed
from reallm.pipeline.magnitudes import check_representable
from reallm.pipeline.teacher_outputs import job_windows, load_guidance
from reallm.source import Matrix
from reallm.source.decoder_blocks import block_numbers

ObjectiveOf = Callable[[Matrix], Objective | None]  # None: no calibration inputs for this matrix


def fit_all(job: Job, work: Path, progress: Progress | None) -> None:
    """Fit every matrix of the job that has no file in the work folder yet, and save it there."""
    done = _counting_callback(job, progress)
    if job.settings.calibration:
        _fit_calibrated(job, work, done, progress)
    else:
        with torch.no_grad(), use_shared_decoders(train_shared_decoders(job, work, {})):
            for matrix, planned in job.compressed_matrices:
                _load_or_fit(job, work, matrix, planned.fmt, None)
                done(matrix)


def _fit_calibrated(job: Job, work: Path, done: Callable[[Matrix], None], progress: Progress | None) -> None:
    """Fit block by block: accumulate Hessians of the inputs, fit, and run the inputs through the compressed block.

    Embedding, lm_head and all other matrices outside the blocks are fitted first, by their weights alone, because the
    first block's inputs come from the compressed embedding. Only one block of the dense model is in memory at a time,
    in addition to the weights outside the blocks.
    """
    by_block: dict[int | None, list[tuple[Matrix, PlanEntry]]] = defaultdict(list)
    numbers = block_numbers(job.source.skeleton, [matrix.name for matrix, _ in job.compressed_matrices])
    for matrix, planned in job.compressed_matrices:
        by_block[numbers[matrix.name]].append((matrix, planned))
    with torch.no_grad():
        windows, teacher_outputs = _teacher_outputs(job, work, progress)
        shared_decoders = train_shared_decoders(
            job, work, _shared_decoder_objectives(job, windows, work, teacher_outputs)
        )
    with torch.no_grad(), use_shared_decoders(shared_decoders):
        outside_blocks = by_block.pop(None, [])
        for matrix, planned in outside_blocks:
            _load_or_fit(job, work, matrix, planned.fmt, None)
            done(matrix)
        block_loader = BlockLoader(job.source, calibration_dtype(job))
        for matrix, planned in outside_blocks:
            _replace_weight(
                block_loader.model, matrix, planned.fmt, finished_file(work, matrix.name), job.settings.device
            )
        hidden_states = HiddenStateCache(block_loader.model, windows, job.settings.device, block_loader=block_loader)
        for number in range(len(hidden_states.blocks)):
            block_loader.load_block(number)
            block_matrices = by_block.pop(number, [])
            unfinished = [matrix for matrix, _ in block_matrices if not finished_file(work, matrix.name).is_file()]
            objective = teacher_outputs.objectives(hidden_states, unfinished)
            for matrix, planned in block_matrices:
                file = _load_or_fit(job, work, matrix, planned.fmt, objective)
                _replace_weight(block_loader.model, matrix, planned.fmt, file, job.settings.device)
                done(matrix)
            hidden_states.advance()
            block_loader.unload_block(number)
        assert not by_block, f"blocks {list(by_block)} are not decoder blocks"


def _shared_decoder_objectives(
    job: Job, windows: Tensor, work: Path, teacher_outputs: _TeacherOutputs
) -> dict[str, Objective]:
    """Return objectives on the inputs of the original model, for matrices whose shared decoder is not trained yet.

    They have only the diagonal of the Hessian: training a decoder does not use correlations between columns, and the
    Hessians of all blocks together are as large as the model.
    """
    by_block: dict[int | None, list[Matrix]] = defaultdict(list)
    missing = [matrix for matrix, _ in matrices_missing_decoder(job, work)]
    numbers = block_numbers(job.source.skeleton, [matrix.name for matrix in missing])
    for matrix in missing:
        by_block[numbers[matrix.name]].append(matrix)
    found: dict[str, Objective] = {}
    if not any(number is not None for number in by_block):
        return found
    block_loader = BlockLoader(job.source, calibration_dtype(job))
    hidden_states = HiddenStateCache(block_loader.model, windows, job.settings.device, block_loader=block_loader)
    for number in range(len(hidden_states.blocks)):
        block_loader.load_block(number)
        get_objective = teacher_outputs.objectives(hidden_states, by_block[number])
        for matrix in by_block[number]:
            if (objective := get_objective(matrix)) is not None:
                found[matrix.name] = Objective(objective.importance.cpu())
        hidden_states.advance()
        block_loader.unload_block(number)
    return found


def _load_or_fit(job: Job, work: Path, matrix: Matrix, fmt: WeightFormat, objective: ObjectiveOf | None) -> Path:
    """Return the file of a fitted matrix; fit and save the matrix if the file does not exist."""
    path = finished_file(work, matrix.name)
    if path.is_file():
        check_finished(path, add_prefix(matrix.name, fmt.layout(matrix.shape)))
    else:
        found = objective(matrix) if objective else None
        save_tensors(add_prefix(matrix.name, _fit_matrix(job, matrix, fmt, found)), path)
    return path


def _fit_matrix(job: Job, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> dict[str, Tensor]:
    weight = load_weight(job, matrix)
    with torch.no_grad():
        objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
        seed = matrix_seed(job, matrix.name)
        if job.settings.fits is None or fmt.shared_decoders():  # the key does not cover shared decoders
            tensors = fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
            check_representable(job, matrix, fmt, weight, tensors, objective)
            return tensors
        cache, key = FitCache(Path(job.settings.fits)), fit_key(fmt, weight, objective, seed)
        tensors = cache.get(key, fmt, matrix.shape)
        if tensors is None:
            tensors = fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
            check_representable(job, matrix, fmt, weight, tensors, objective)
            cache.store(key, tensors)
        return tensors


def _replace_weight(model: torch.nn.Module, matrix: Matrix, fmt: WeightFormat, file: Path, device: str) -> None:
    """Replace a weight of the dense model by its decoded value, if it is loaded (an untied lm_head is not)."""
    target = model.get_parameter(matrix.parameter)
    if target.is_meta:
        return
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
    # On the device: a CPU takes half an hour for a neural codebook (a GPU: seconds), and 0.2 s for a trellis.
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    decoded = fmt.decode(fmt.unpack(strip_prefix(matrix.name, tensors), matrix.shape), matrix.shape)
    target = target if matrix.expert is None else target[matrix.expert]
    target.copy_(decoded.T if matrix.transposed else decoded)


def _counting_callback(job: Job, progress: Progress | None) -> Callable[[Matrix], None]:
    """Return a callback that reports each finished matrix to `progress`, with the weights finished so far."""
    total = sum(math.prod(matrix.shape) for matrix, _ in job.compressed_matrices)
    so_far = 0

    def done(matrix: Matrix) -> None:
        nonlocal so_far
        so_far += math.prod(matrix.shape)
        if progress:
            progress(matrix.name, so_far, total)

    return done


def calibration_dtype(job: Job) -> torch.dtype:
    """Return the dtype in which the dense model computes."""
    return calculation_dtype(job.source)


@dataclass(frozen=True)
class _TeacherOutputs:
    """What the gradients of the end-to-end loss say of tokens and channels; nothing for the objective `outputs`."""

    guidance: dict[str, Guidance] | None = None

    def objectives(self, hidden_states: HiddenStateCache, matrices: Sequence[Matrix]) -> ObjectiveOf:
        """Return a function that gives the objective of a matrix of the present block.

        Second moments of the block's inputs are summed now, the rest is made when asked for. None for matrices that
        calibration does not reach: experts, and modules that no token reached.
        """
        guided = self.guidance or {}
        weights = {name: own.tokens for name, own in guided.items()} or None
        second_moments = hidden_states.second_moments(matrices, weights) if matrices else SecondMoments()
        rows = {name: own.rows for name, own in guided.items()}
        return lambda matrix: _output_objective(matrix, second_moments, rows.get(matrix.name))


def _output_objective(matrix: Matrix, second_moments: SecondMoments, rows: Tensor | None) -> Objective | None:
    """Return the objective of a matrix; errors: SourceError naming a matrix whose inputs overflowed."""
    if (hessian := second_moments.pop(matrix.name)) is None:
        return None
    try:
        return Objective.output_error(hessian, rows)
    except FormatError as error:
        raise SourceError(f"{matrix.name}: {error}") from error


def _teacher_outputs(job: Job, work: Path, progress: Progress | None) -> tuple[Tensor, _TeacherOutputs]:
    """Return the calibration windows, and what the gradients say of them unless everything is fitted already.

    The whole original model is loaded only for text that it writes itself and for gradients.
    """
    dtype = (
        calibration_dtype(job) if job.settings.objective == OUTPUTS else gradient_dtype(job.source, job.settings.device)
    )
    original = functools.cache(lambda: checked_original(job.source, dtype))
    windows = job_windows(job, work, original, progress)
    unfinished = any(
        matrix.block is not None and not finished_file(work, matrix.name).is_file()
        for matrix, _ in job.compressed_matrices
    )
    if not job.is_guided or not unfinished:
        return windows, _TeacherOutputs()
    return windows, _TeacherOutputs(guidance=load_guidance(job, work, windows, original, progress))
