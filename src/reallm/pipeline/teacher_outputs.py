"""What a run asks the original model as a whole, once: text that it writes, and gradients of the end-to-end loss.

Both stand in the work folder, so that a resumed run and the rounds of a size ask nothing twice.
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
# Files of the work folder, named as no matrix of a decoder is.
_WRITTEN, _GUIDANCE = "written", "guidance"

Original = Callable[[], torch.nn.Module]


def job_windows(job: Job, work: Path, original: Original, progress: Progress | None) -> Tensor:
    """Token ids (windows, context) of the job's calibration. `original` is asked for only to write text itself.

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
    """Guidance of every matrix in a block that a gradient reaches, finished ones too: a size may fit them again.

    Errors: ArtifactError naming a damaged file.
    """
    path = finished_file(work, _GUIDANCE)
    if path.is_file():
        kept = read_work_tensors(path, _guidance_layout(job))
    else:
        on_progress = phase_callback(progress, GRADIENTS, len(windows))
        found = guidance(original(), windows, _guided_matrices(job), job.settings.device, on_progress)
        kept = {
            name: tensor
            for matrix in _guided_matrices(job)
            for name, tensor in _guidance_tensors(matrix, found.get(matrix.name), job).items()
        }
        save_tensors(kept, path)
    pairs = {m.name: (kept[f"{m.name}.tokens"], kept[f"{m.name}.rows"]) for m in _guided_matrices(job)}
    return {name: Guidance(tokens, rows) for name, (tokens, rows) in pairs.items() if tokens.any()}


def teacher_layouts(job: Job) -> list[Tensors]:
    """What the files of this module will hold, on the meta device."""
    written = [_windows_layout(job)] if job.settings.calibration == (SELF,) else []
    return written + ([_guidance_layout(job)] if job.guided else [])


def _guided_matrices(job: Job) -> list[Matrix]:
    return [matrix for matrix, _ in job.compressed_matrices if matrix.block is not None and matrix.expert is None]


def _guidance_tensors(matrix: Matrix, own: Guidance | None, job: Job) -> Tensors:
    """Zeros for a matrix that no gradient reached."""
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
