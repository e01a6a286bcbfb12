"""Linear decoders from a few latents to a patch of weights: low-frequency bases of a cosine or Hadamard transform."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

DCT, HADAMARD, LEARNED = "dct", "hadamard", "learned"
TRANSFORMS = (DCT, HADAMARD, LEARNED)


@functools.lru_cache(maxsize=64)
def fixed_basis(transform: str, rows: int, columns: int, kept: int) -> Float[Tensor, "kept patch"]:
    """Return the `kept` orthonormal basis patterns of lowest frequency of a patch, each row-major; float32.

    Patterns are sorted by the sum of their frequencies (sign changes for Hadamard) along both axes, then by the
    frequency along the rows axis.
    """
    build = _cosines if transform == DCT else _walsh
    over_rows, over_columns = build(rows), build(columns)
    order = sorted(((i, j) for i in range(rows) for j in range(columns)), key=lambda pair: (sum(pair), pair))
    patterns = [torch.outer(over_rows[i], over_columns[j]).reshape(-1) for i, j in order[:kept]]
    return torch.stack(patterns).float()


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """Return the orthonormal type-II cosine transform, lowest frequency first; float64."""
    angles = torch.arange(n, dtype=torch.float64)[:, None] * (2 * torch.arange(n, dtype=torch.float64) + 1)
    matrix = torch.cos(angles * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix


def _walsh(n: int) -> Float[Tensor, "n n"]:
    """Return the orthonormal Hadamard transform of a power of two, rows sorted by number of sign changes; float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[changes.argsort()] / math.sqrt(n)
