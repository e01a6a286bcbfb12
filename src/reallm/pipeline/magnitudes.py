"""Handle matrices with weights so small or large that float16 cannot represent the tensors of their format.

Their formats use bfloat16 instead, which takes the same bytes. A format that still loses precision is an error.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from reallm.allocate import PlanEntry
from reallm.errors import SourceError
from reallm.fit import Objective, fit, relative_error
from reallm.formats import Tensors, WeightFormat
from reallm.formats.range import is_beyond_float16, ordinary_magnitude, with_wide_range
from reallm.pipeline.job import Job
from reallm.pipeline.load_weight import load_weight, matrix_seed
from reallm.source import Matrix

# Tolerance relative to the error at an ordinary magnitude; fits with random initialisation differ by some per cent.
_MAX_RATIO, _MAX_EXCESS = 1.5, 0.01


def use_wide_range(job: Job) -> Job:
    """Return the job with bfloat16 formats for matrices beyond float16. Reads each matrix at most once."""
    options = {} if job.forecast is None else dict(job.forecast.options)
    changed: dict[str, WeightFormat] = {}
    for matrix, planned in job.compressed_matrices:
        formats = [planned.fmt, *(option.fmt for option in options.get(matrix.name, ()))]
        if any(with_wide_range(fmt) != fmt for fmt in formats) and is_beyond_float16(load_weight(job, matrix)):
            changed[matrix.name] = with_wide_range(planned.fmt)
            options[matrix.name] = [
                dataclasses.replace(option, fmt=with_wide_range(option.fmt)) for option in options.get(matrix.name, ())
            ]
    if not changed:
        return job
    entries = tuple(PlanEntry(e.matrix, changed.get(e.matrix.name, e.fmt)) for e in job.plan.entries)
    forecast = None if job.forecast is None else dataclasses.replace(job.forecast, options=options)
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, entries=entries), forecast=forecast)


def check_representable(
    job: Job, matrix: Matrix, fmt: WeightFormat, weight: Float[Tensor, "out in"], tensors: Tensors, objective: Objective
) -> None:
    """Compare the error of a matrix beyond float16 with its error at an ordinary magnitude.

    Errors: SourceError naming the matrix if its format loses more.
    """
    if not is_beyond_float16(weight):
        return
    stored = {name: tensor.to(weight.device) for name, tensor in tensors.items()}
    found = relative_error(weight, fmt.decode(fmt.unpack(stored, matrix.shape), matrix.shape))
    ordinary = ordinary_magnitude(weight)
    unpacked = fit(fmt, ordinary, objective, matrix_seed(job, matrix.name))
    best = relative_error(ordinary, fmt.decode(unpacked, matrix.shape))
    if not found <= _MAX_RATIO * best + _MAX_EXCESS:  # also false for NaN
        size = weight.double().square().mean().sqrt().item()
        raise SourceError(
            f"{matrix.parameter}: {fmt.name} cannot represent weights of about {size:.1e} (relative squared error "
            f"{found:.3f}, {best:.3f} at an ordinary magnitude); leave it unquantized with --exclude {matrix.name}"
        )
