"""Load and check weights of a job's source model, and derive seeds."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.errors import SourceError
from reallm.pipeline.job import Job
from reallm.source import Matrix, Source, read_matrix

_SEED_LIMIT = 1 << 63  # generators of torch accept only smaller seeds
_LARGEST_WEIGHT = 1e15  # the sum of squares of a matrix with larger weights overflows float32


def checked_original(source: Source, dtype: torch.dtype) -> torch.nn.Module:
    """Load the whole original model on the CPU, in eval mode.

    Errors: SourceError naming a tensor with NaN or infinity, so that the error does not appear as one of the text.
    """
    model = source.load(dtype, "cpu").eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            check_finite(name, tensor)
    return model


def check_matrices(job: Job, matrices: Iterable[Matrix]) -> None:
    """Read and check every matrix once, which takes seconds and little memory. Errors: SourceError."""
    for matrix in matrices:
        _check_weight(matrix, read_matrix(job.source, matrix))


def load_weight(job: Job, matrix: Matrix) -> Float[Tensor, "out in"]:
    """Load a matrix in float32 on the job's device. Errors: SourceError for non-finite or too large weights."""
    weight = read_matrix(job.source, matrix).to(job.settings.device, torch.float32)
    _check_weight(matrix, weight)
    return weight


def _check_weight(matrix: Matrix, weight: Tensor) -> None:
    check_finite(matrix.parameter, weight)
    if (largest := weight.abs().max().item()) > _LARGEST_WEIGHT:
        raise SourceError(f"{matrix.parameter}: a weight of {largest:.3g}; the model is damaged")


def check_finite(name: str, weight: Tensor) -> None:
    """Check a tensor. Errors: SourceError naming a tensor with NaN or infinity."""
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise SourceError(f"{name}: {count} of {weight.numel()} weights are NaN or infinite; the model is damaged")


def matrix_seed(job: Job, name: str) -> int:
    """Return the seed of a matrix or shared decoder; it does not depend on what was fitted before."""
    return (job.settings.seed + zlib.crc32(name.encode())) % _SEED_LIMIT
