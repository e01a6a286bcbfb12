"""Compute the outputs of the whole original model that a run needs: text, and gradients of the end-to-end loss.

Both are saved to the work folder, so that a resumed run and the rounds of a size do not compute them again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reallm.calibrate.loss_gradients import Guidance, guidance
from reallm.calibrate.windows import SELF
from reallm.checkpoint import finished_file, read_work_tensors, save_tensors
from reallm.formats import Tensors
from reallm.formats.base import empty
from reallm.pipeline.calibration_inputs import Progress, calibration_windows, phase_callback
from reallm.pipeline.job import Job
from reallm.source import Matrix

GRADIENTS = "gradients of the end-to-end loss"  # a phase of the progress
# Names of files in the work folder that no matrix of a decoder has.
_WRITTEN, _GUIDANCE = "written", "guidance"

Original = Callable[[], torch.nn.Module]


def job_windows(job: Job, work: Path, original: Original, progress: Progress | None) -> Tensor:
    """Return token ids (windows, context) for calibration. `original` is called only if it writes the text itself.

    Errors: ArtifactError naming a damaged file.
    """
    if job.settings.calibration != (SELF,):
        return calibration_windows(job.source, job.settings, original, progress)
    path = finished_file(work, _WRITTEN)
    if not path.is_file():
        written = calibration_windows(job.source, job.settings, original, progress)
        save_tensors({"windows": written.to(torch.int32)}, path)
    return read_work_tensors(path, _windows_layout(job))["windows"].long()


def load_guidance(
    job: Job, work: Path, windows: Tensor, original: Original, progress: Progress | None
) -> dict[str, Guidance]:
    """Return the guidance of every matrix in a block that has gradients, including fitted ones: a size may refit them.

    Errors: ArtifactError naming a damaged file.
    """
    path = finished_file(work, _GUIDANCE)
    if path.is_file():
        stored = read_work_tensors(path, _guidance_layout(job))
    else:
        on_progress = phase_callback(progress, GRADIENTS, len(windows))
        found = guidance(original(), windows, _guided_matrices(job), job.settings.device, on_progress)
        stored = {
            name: tensor
            for matrix in _guided_matrices(job)
            for name, tensor in _guidance_tensors(matrix, found.get(matrix.name), job).items()
        }
        save_tensors(stored, path)
    pairs = {m.name: (stored[f"{m.name}.tokens"], stored[f"{m.name}.rows"]) for m in _guided_matrices(job)}
    return {name: Guidance(tokens, rows) for name, (tokens, rows) in pairs.items() if tokens.any()}


def teacher_layouts(job: Job) -> list[Tensors]:
    """Return the tensors of the files that this module writes, on the meta device."""
    text_layouts = [_windows_layout(job)] if job.settings.calibration == (SELF,) else []
    return text_layouts + ([_guidance_layout(job)] if job.is_guided else [])


def _guided_matrices(job: Job) -> list[Matrix]:
    return [matrix for matrix, _ in job.compressed_matrices if matrix.block is not None and matrix.expert is None]


def _guidance_tensors(matrix: Matrix, own: Guidance | None, job: Job) -> Tensors:
    """Return the tensors to save; zeros for a matrix without gradients."""
    if own is None:
        return {name: torch.zeros(tensor.shape) for name, tensor in _matrix_guidance_layout(matrix, job).items()}
    return {f"{matrix.name}.tokens": own.tokens, f"{matrix.name}.rows": own.rows}


def _windows_layout(job: Job) -> Tensors:
    return {"windows": empty((job.settings.calibration_windows, job.settings.calibration_context), torch.int32)}


def _guidance_layout(job: Job) -> Tensors:
    return {
        name: tensor
        for matrix in _guided_matrices(job)
        for name, tensor in _matrix_guidance_layout(matrix, job).items()
    }


def _matrix_guidance_layout(matrix: Matrix, job: Job) -> Tensors:
    shape = job.settings.calibration_windows, job.settings.calibration_context
    tokens, rows = empty(shape, torch.float32), empty((matrix.shape[0],), torch.float32)
    return {f"{matrix.name}.tokens": tokens, f"{matrix.name}.rows": rows}
