"""Linear maps from a few latents to a patch of weights: the slowest patterns of a cosine or Hadamard transform."""

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
    """The `kept` slowest orthonormal patterns of a patch, row-major; float32.

    Patterns go by the sum of their frequencies (sign changes for Hadamard) along both sides, then by that along rows.
    """
    build = _cosines if transform == DCT else _walsh
    sides = [build(rows), build(columns)]
    order = sorted(((i, j) for i in range(rows) for j in range(columns)), key=lambda pair: (sum(pair), pair))
    patterns = [torch.outer(sides[0][i], sides[1][j]).reshape(-1) for i, j in order[:kept]]
    return torch.stack(patterns).float()


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """Orthonormal type-II cosine transform, slowest row first; float64."""
    angles = torch.arange(n, dtype=torch.float64)[:, None] * (2 * torch.arange(n, dtype=torch.float64) + 1)
    matrix = torch.cos(angles * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix


def _walsh(n: int) -> Float[Tensor, "n n"]:
    """Orthonormal Hadamard transform of a power of two, rows by their number of sign changes; float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[changes.argsort()] / math.sqrt(n)
