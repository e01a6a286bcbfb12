"""Every matrix of a job fitted, by its weights alone or along the stream of a calibration text.

Finished matrices are kept in the work folder as they come, so that an interrupted run goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.allocate import Planned
from reallm.artifact import check_finished, finished_file, save_tensors
from reallm.errors import FormatError, SourceError
from reallm.fit import Objective, fit
from reallm.fit.objective import OUTPUTS
from reallm.formats import WeightFormat, tables_at_hand
from reallm.formats.waist import inner, under
from reallm.model import Matrix
from reallm.model.decoder import block_numbers
from reallm.model.gradients import Guidance, fisher
from reallm.model.pieces import Pieces
from reallm.model.stream import Moments, Stream
from reallm.pipeline.calibrating import Progress, calculation_dtype, gradient_dtype, telling
from reallm.pipeline.fits import Fits, key_of
from reallm.pipeline.job import Job
from reallm.pipeline.magnitudes import check_held
from reallm.pipeline.original import GRADIENTS, guidance_of, windows_of
from reallm.pipeline.reading import checked_original, checked_weight, seed_of
from reallm.pipeline.sharing import missing_tables, trained_tables

ObjectiveOf = Callable[[Matrix], Objective | None]  # None: calibration tells nothing of this matrix


def fit_all(job: Job, work: Path, progress: Progress | None) -> None:
    done = _counted(job, progress)
    if job.settings.calibration:
        _fit_along_the_stream(job, work, done, progress)
    else:
        with torch.no_grad(), tables_at_hand(trained_tables(job, work, {})):
            for matrix, planned in job.compressed:
                _fit_or_keep(job, work, matrix, planned.fmt, None)
                done(matrix)


def _fit_along_the_stream(job: Job, work: Path, done: Callable[[Matrix], None], progress: Progress | None) -> None:
    """Block by block: sum up its inputs, fit it, and let the compressed block carry the inputs on.

    Embedding, head and whatever else lies outside the blocks come first, by their weights alone: the stream begins
    behind the compressed embedding. Of the dense model one block at a time is in memory, with what lies outside them.
    """
    by_block: dict[int | None, list[tuple[Matrix, Planned]]] = defaultdict(list)
    numbers = block_numbers(job.source.skeleton, [matrix.name for matrix, _ in job.compressed])
    for matrix, planned in job.compressed:
        by_block[numbers[matrix.name]].append((matrix, planned))
    with torch.no_grad():
        windows, knowledge = _asked_of_the_original(job, work, progress)
        tables = trained_tables(job, work, _before_the_stream(job, windows, work, knowledge))
    with torch.no_grad(), tables_at_hand(tables):
        ends = by_block.pop(None, [])
        for matrix, planned in ends:
            _fit_or_keep(job, work, matrix, planned.fmt, None)
            done(matrix)
        pieces = Pieces(job.source, stream_dtype(job))
        for matrix, planned in ends:
            _put(pieces.model, matrix, planned.fmt, finished_file(work, matrix.name), job.settings.device)
        stream = Stream(pieces.model, windows, job.settings.device, pieces=pieces)
        for number in range(len(stream.blocks)):
            pieces.fill(number)
            of_block = by_block.pop(number, [])
            open_ones = [matrix for matrix, _ in of_block if not finished_file(work, matrix.name).is_file()]
            objective = knowledge.objectives(stream, open_ones)
            for matrix, planned in of_block:
                file = _fit_or_keep(job, work, matrix, planned.fmt, objective)
                _put(pieces.model, matrix, planned.fmt, file, job.settings.device)
                done(matrix)
            stream.advance()
            pieces.empty(number)
        assert not by_block, f"blocks {list(by_block)} are not decoder blocks"


def _before_the_stream(job: Job, windows: Tensor, work: Path, knowledge: _EndLoss) -> dict[str, Objective]:
    """What errors cost on the inputs of the original model, for matrices whose shared decoder is still to be trained.

    Only the diagonal: a decoder cannot tell which columns answer for which, and hessians of all blocks are as large as
    the model.
    """
    by_block: dict[int | None, list[Matrix]] = defaultdict(list)
    missing = [matrix for matrix, _ in missing_tables(job, work)]
    numbers = block_numbers(job.source.skeleton, [matrix.name for matrix in missing])
    for matrix in missing:
        by_block[numbers[matrix.name]].append(matrix)
    found: dict[str, Objective] = {}
    if not any(number is not None for number in by_block):
        return found
    pieces = Pieces(job.source, stream_dtype(job))
    stream = Stream(pieces.model, windows, job.settings.device, pieces=pieces)
    for number in range(len(stream.blocks)):
        pieces.fill(number)
        objective_of = knowledge.objectives(stream, by_block[number])
        for matrix in by_block[number]:
            if (objective := objective_of(matrix)) is not None:
                found[matrix.name] = Objective(objective.importance.cpu())
        stream.advance()
        pieces.empty(number)
    return found


def _fit_or_keep(job: Job, work: Path, matrix: Matrix, fmt: WeightFormat, objective: ObjectiveOf | None) -> Path:
    """The file of a fitted matrix, made now unless it is there already."""
    path = finished_file(work, matrix.name)
    if path.is_file():
        check_finished(path, under(matrix.name, fmt.layout(matrix.shape)))
    else:
        known = objective(matrix) if objective else None
        save_tensors(under(matrix.name, _compressed(job, matrix, fmt, known)), path)
    return path


def _compressed(job: Job, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> dict[str, Tensor]:
    weight = checked_weight(job, matrix)
    with torch.no_grad():
        objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
        seed = seed_of(job, matrix.name)
        if job.settings.fits is None or fmt.tables():  # the key knows nothing of decoders that matrices share
            tensors = fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
            check_held(job, matrix, fmt, weight, tensors, objective)
            return tensors
        fits, key = Fits(Path(job.settings.fits)), key_of(fmt, weight, objective, seed)
        tensors = fits.found(key, fmt, matrix.shape)
        if tensors is None:
            tensors = fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
            check_held(job, matrix, fmt, weight, tensors, objective)
            fits.keep(key, tensors)
        return tensors


def _put(model: torch.nn.Module, matrix: Matrix, fmt: WeightFormat, file: Path, device: str) -> None:
    """Replace a matrix of the dense model by its decoded self, if it is in memory: an untied head is not."""
    target = model.get_parameter(matrix.parameter)
    if target.is_meta:
        return
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
    # On the device: a processor takes half an hour for a net that a GPU decodes in seconds, and 0.2 s for a trellis.
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    decoded = fmt.decode(fmt.unpack(inner(matrix.name, tensors), matrix.shape), matrix.shape)
    target = target if matrix.expert is None else target[matrix.expert]
    target.copy_(decoded.T if matrix.transposed else decoded)


def _counted(job: Job, progress: Progress | None) -> Callable[[Matrix], None]:
    """Tells `progress` of each matrix that is done, and of the weights so far."""
    total = sum(math.prod(matrix.shape) for matrix, _ in job.compressed)
    so_far = 0

    def done(matrix: Matrix) -> None:
        nonlocal so_far
        so_far += math.prod(matrix.shape)
        if progress:
            progress(matrix.name, so_far, total)

    return done


def stream_dtype(job: Job) -> torch.dtype:
    """What the dense model computes in."""
    return calculation_dtype(job.source)


@dataclass(frozen=True)
class _EndLoss:
    """What the end loss says of tokens and channels (guided) or of weights (fisher); nothing for plain outputs.

    Errors are fed back by the stream's second moments in every case. Fisher weights of a matrix with 3,000 inputs have
    no hessian of their own (one of 9 million numbers for every row): by themselves they lost 0.62 nats of KL where
    codebooks lose 0.25 with feedback, and behind a rotation they are nothing (docs/experiments/guided-calibration.md).
    """

    guidance: dict[str, Guidance] | None = None
    fisher: dict[str, Tensor] | None = None

    def objectives(self, stream: Stream, matrices: Sequence[Matrix]) -> ObjectiveOf:
        """Of the matrices of the present block: sums over its inputs are taken now, the rest is made when asked for.

        Nothing for those that calibration tells nothing of: experts, and modules that no token reached.
        """
        guided, of_weights = self.guidance or {}, self.fisher or {}
        weights = {name: own.tokens for name, own in guided.items()} or None
        moments = stream.moments(matrices, weights) if matrices else Moments()
        rows = {name: own.rows for name, own in guided.items()}
        return lambda matrix: _of_outputs(matrix, moments, rows.get(matrix.name), of_weights.get(matrix.name))


def _of_outputs(
    matrix: Matrix, moments: Moments, rows: Tensor | None, importance: Tensor | None = None
) -> Objective | None:
    """`importance` in place of the hessian's diagonal. Errors: SourceError naming a matrix whose inputs overflowed."""
    if (hessian := moments.take(matrix.name)) is None:
        return None
    try:
        objective = Objective.of_outputs(hessian, rows)
    except FormatError as error:
        raise SourceError(f"{matrix.name}: {error}") from error
    return objective if importance is None else dataclasses.replace(objective, importance=importance)


def _asked_of_the_original(job: Job, work: Path, progress: Progress | None) -> tuple[Tensor, _EndLoss]:
    """The windows, and what the end loss says, unless everything is fitted already.

    Text that the model writes itself and gradients of the end loss take the whole original in memory, and only they.
    Fisher weights, twice the bytes of a model of 16 bits, are not kept on disk: a resumed run asks for them again.
    """
    dtype = stream_dtype(job) if job.settings.objective == OUTPUTS else gradient_dtype(job.source, job.settings.device)
    original = functools.cache(lambda: checked_original(job.source, dtype))
    windows = windows_of(job, work, original, progress)
    open_ones = [
        matrix
        for matrix, _ in job.compressed
        if matrix.block is not None and not finished_file(work, matrix.name).is_file()
    ]
    if job.settings.objective == OUTPUTS or not open_ones:
        return windows, _EndLoss()
    if job.guided:
        return windows, _EndLoss(guidance=guidance_of(job, work, windows, original, progress))
    told = telling(progress, GRADIENTS, len(windows))
    return windows, _EndLoss(fisher=fisher(original(), windows, open_ones, job.settings.device, told))
