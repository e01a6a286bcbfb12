"""Matrices of numbers so small or large that float16 cannot hold what a format stores of them.

Their formats take bfloat16, which is as many bytes; what a format loses of them all the same is refused.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from reallm.allocate import Planned
from reallm.errors import SourceError
from reallm.fit import Objective, fit, relative_error
from reallm.formats import Tensors, WeightFormat
from reallm.formats.range import is_beyond_float16, ordinary_magnitude, with_wide_range
from reallm.model import Matrix
from reallm.pipeline.job import Job
from reallm.pipeline.reading import checked_weight, seed_of

# Of the squared error at an ordinary magnitude; fits that start at random differ by some per cent.
_MORE, _LITTLE = 1.5, 0.01


def within_range(job: Job) -> Job:
    """The job with formats that can hold every matrix; ordinary ones keep theirs. Reads each matrix once."""
    options = {} if job.forecast is None else dict(job.forecast.options)
    changed: dict[str, WeightFormat] = {}
    for matrix, planned in job.compressed:
        formats = [planned.fmt, *(option.fmt for option in options.get(matrix.name, ()))]
        if any(with_wide_range(fmt) != fmt for fmt in formats) and is_beyond_float16(checked_weight(job, matrix)):
            changed[matrix.name] = with_wide_range(planned.fmt)
            options[matrix.name] = [
                dataclasses.replace(option, fmt=with_wide_range(option.fmt)) for option in options.get(matrix.name, ())
            ]
    if not changed:
        return job
    entries = tuple(Planned(e.matrix, changed.get(e.matrix.name, e.fmt)) for e in job.plan.entries)
    forecast = None if job.forecast is None else dataclasses.replace(job.forecast, options=options)
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, entries=entries), forecast=forecast)


def check_held(
    job: Job, matrix: Matrix, fmt: WeightFormat, weight: Float[Tensor, "out in"], tensors: Tensors, objective: Objective
) -> None:
    """Compare what was stored of a matrix beyond float16 with what is stored of it at an ordinary magnitude.

    Errors: SourceError naming the matrix, if the format loses more of it.
    """
    if not is_beyond_float16(weight):
        return
    stored = {name: tensor.to(weight.device) for name, tensor in tensors.items()}
    found = relative_error(weight, fmt.decode(fmt.unpack(stored, matrix.shape), matrix.shape))
    ordinary = ordinary_magnitude(weight)
    parts = fit(fmt, ordinary, objective, seed_of(job, matrix.name))
    best = relative_error(ordinary, fmt.decode(parts, matrix.shape))
    if not found <= _MORE * best + _LITTLE:  # nan neither
        size = weight.double().square().mean().sqrt().item()
        raise SourceError(
            f"{matrix.parameter}: {fmt.name} cannot hold weights of about {size:.1e} (squared error {found:.3f} of "
            f"their energy, {best:.3f} at an ordinary magnitude); leave it as it is with --exclude {matrix.name}"
        )
