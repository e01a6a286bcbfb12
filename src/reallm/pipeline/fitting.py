"""Every matrix of a job fitted, by its weights alone or along the stream of a calibration text.

Finished matrices are kept in the work folder as they come, so that an interrupted run goes on from there.
"""

from __future__ import annotations

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
from reallm.formats import WeightFormat, tables_at_hand
from reallm.formats.waist import inner, under
from reallm.model import Matrix
from reallm.model.gradients import Guidance, fisher, guidance
from reallm.model.stream import Stream
from reallm.pipeline.calibrating import calculation_dtype, calibration_windows
from reallm.pipeline.fits import Fits, key_of
from reallm.pipeline.job import Job
from reallm.pipeline.reading import checked_weight, seed_of
from reallm.pipeline.settings import GUIDED, OUTPUTS
from reallm.pipeline.sharing import missing_tables, trained_tables

Progress = Callable[[str, int, int], None]  # (matrix just finished, weights done, weights in all)


def fit_all(job: Job, work: Path, progress: Progress | None) -> None:
    done = _counted(job, progress)
    if job.settings.calibration:
        _fit_along_the_stream(job, work, done)
    else:
        with torch.no_grad(), tables_at_hand(trained_tables(job, work, {})):
            for matrix, planned in job.compressed:
                _fit_or_keep(job, work, matrix, planned.fmt, None)
                done(matrix)


def _fit_along_the_stream(job: Job, work: Path, done: Callable[[Matrix], None]) -> None:
    """Block by block: sum up its inputs, fit it, and let the compressed block carry the inputs on.

    Embedding and head come first, by their weights alone: the stream begins behind the compressed embedding.
    """
    by_block: dict[int | None, list[tuple[Matrix, Planned]]] = defaultdict(list)
    for matrix, planned in job.compressed:
        by_block[matrix.block].append((matrix, planned))
    with torch.no_grad():
        model = job.source.load(stream_dtype(job), "cpu").eval()
        windows = calibration_windows(job.source, job.settings, model)
        knowledge = _end_loss(job, model, windows, work)
        objectives = _before_the_stream(job, model, windows, work, knowledge)
        tables = trained_tables(job, work, objectives)
    with torch.no_grad(), tables_at_hand(tables):
        for matrix, planned in by_block.pop(None, []):
            _put(model, matrix, planned.fmt, _fit_or_keep(job, work, matrix, planned.fmt, None), job.settings.device)
            done(matrix)
        stream = Stream(model, windows, job.settings.device)
        for number in range(len(stream.blocks)):
            of_block = by_block.pop(number, [])
            open_ones = [matrix for matrix, _ in of_block if not finished_file(work, matrix.name).is_file()]
            objectives = knowledge.objectives(stream, open_ones)
            for matrix, planned in of_block:
                file = _fit_or_keep(job, work, matrix, planned.fmt, objectives.get(matrix.name))
                _put(model, matrix, planned.fmt, file, job.settings.device)
                done(matrix)
            stream.advance()
        assert not by_block, f"blocks {list(by_block)} are not decoder blocks"


def _before_the_stream(
    job: Job, model: torch.nn.Module, windows: Tensor, work: Path, knowledge: _EndLoss
) -> dict[str, Objective]:
    """What errors cost on the inputs of the original model, for matrices whose shared decoder is still to be trained.

    Only the diagonal: a decoder cannot tell which columns answer for which, and hessians of all blocks are as large as
    the model.
    """
    by_block: dict[int | None, list[Matrix]] = defaultdict(list)
    for matrix, _ in missing_tables(job, work):
        by_block[matrix.block].append(matrix)
    found: dict[str, Objective] = {}
    if not any(number is not None for number in by_block):
        return found
    stream = Stream(model, windows, job.settings.device)
    for number in range(len(stream.blocks)):
        for name, objective in knowledge.objectives(stream, by_block[number]).items():
            found[name] = Objective(objective.importance.cpu())
        stream.advance()
    return found


def _fit_or_keep(job: Job, work: Path, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> Path:
    """The file of a fitted matrix, made now unless it is there already."""
    path = finished_file(work, matrix.name)
    if path.is_file():
        check_finished(path, under(matrix.name, fmt.layout(matrix.shape)))
    else:
        save_tensors(under(matrix.name, _compressed(job, matrix, fmt, objective)), path)
    return path


def _compressed(job: Job, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> dict[str, Tensor]:
    weight = checked_weight(job, matrix)
    with torch.no_grad():
        objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
        seed = seed_of(job, matrix.name)
        if job.settings.fits is None or fmt.tables():  # the key knows nothing of decoders that matrices share
            return fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
        fits, key = Fits(Path(job.settings.fits)), key_of(fmt, weight, objective, seed)
        tensors = fits.found(key, fmt, matrix.shape)
        if tensors is None:
            tensors = fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)
            fits.keep(key, tensors)
        return tensors


def _put(model: torch.nn.Module, matrix: Matrix, fmt: WeightFormat, file: Path, device: str) -> None:
    """Replace a matrix of the dense model by its decoded self."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
    if fmt.multiply_adds(matrix.shape):  # a net: a processor takes half an hour for what a GPU does in seconds
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    decoded = fmt.decode(fmt.unpack(inner(matrix.name, tensors), matrix.shape), matrix.shape)
    target = model.get_parameter(matrix.parameter)
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
    """What the end loss says of tokens and channels (guided) or of weights (fisher); nothing for plain outputs."""

    guidance: dict[str, Guidance] | None = None
    fisher: dict[str, Tensor] | None = None

    def objectives(self, stream: Stream, matrices: Sequence[Matrix]) -> dict[str, Objective]:
        """By matrix of the present block; those that calibration tells nothing of, experts too, are left out."""
        if not matrices:
            return {}
        if self.fisher is not None:
            return {m.name: Objective(self.fisher[m.name]) for m in matrices if m.name in self.fisher}
        guided = self.guidance or {}
        moments = stream.moments(matrices, {name: own.tokens for name, own in guided.items()} or None)
        found = {}
        for matrix in matrices:
            if (hessian := moments.of(matrix.name)) is not None:
                try:
                    rows = guided[matrix.name].rows if matrix.name in guided else None
                    found[matrix.name] = Objective.of_outputs(hessian, rows)
                except FormatError as error:
                    raise SourceError(f"{matrix.name}: {error}") from error
        return found


def _end_loss(job: Job, model: torch.nn.Module, windows: Tensor, work: Path) -> _EndLoss:
    """Asks the original model, unless everything is fitted already."""
    open_ones = [
        matrix
        for matrix, _ in job.compressed
        if matrix.block is not None and not finished_file(work, matrix.name).is_file()
    ]
    if job.settings.objective == OUTPUTS or not open_ones:
        return _EndLoss()
    if job.settings.objective == GUIDED:
        return _EndLoss(guidance=guidance(model, windows, open_ones, job.settings.device))
    return _EndLoss(fisher=fisher(model, windows, open_ones, job.settings.device))
