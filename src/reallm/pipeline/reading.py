"""One matrix of a job's source, checked, and its seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.errors import SourceError
from reallm.model import Matrix, Source, read_matrix
from reallm.pipeline.job import Job

_SEEDS = 1 << 63  # torch's generators take no larger seed
_LARGEST_WEIGHT = 1e15  # squares of larger ones, summed over a matrix, overflow float32


def checked_original(source: Source, dtype: torch.dtype) -> torch.nn.Module:
    """The whole original on the CPU, in eval mode.

    Errors: SourceError naming a tensor that holds NaN or infinity, before any text is blamed for what comes of it.
    """
    model = source.load(dtype, "cpu").eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            check_finite(name, tensor)
    return model


def check_matrices(job: Job, matrices: Iterable[Matrix]) -> None:
    """Every weight read once, in little memory: seconds beside what finding it late takes. Errors: SourceError."""
    for matrix in matrices:
        _check_weight(matrix, read_matrix(job.source, matrix))


def checked_weight(job: Job, matrix: Matrix) -> Float[Tensor, "out in"]:
    """A matrix in float32 on the job's device. Errors: SourceError for numbers that no model has."""
    weight = read_matrix(job.source, matrix).to(job.settings.device, torch.float32)
    _check_weight(matrix, weight)
    return weight


def _check_weight(matrix: Matrix, weight: Tensor) -> None:
    check_finite(matrix.parameter, weight)
    if (largest := weight.abs().max().item()) > _LARGEST_WEIGHT:
        raise SourceError(f"{matrix.parameter}: a weight of {largest:.3g}; the model is damaged")


def check_finite(name: str, weight: Tensor) -> None:
    """Errors: SourceError naming a tensor that holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise SourceError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; the model is damaged")


def seed_of(job: Job, name: str) -> int:
    """Every matrix, and every shared decoder, has its own seed: none depends on which were fitted before it."""
    return (job.settings.seed + zlib.crc32(name.encode())) % _SEEDS
