"""Best low-rank approximation, and the alternation of a low-rank residual with any base format."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import decode_unpacked, fit
from reallm.fit.feedback import damped_cholesky
from reallm.fit.objective import Objective
from reallm.formats import Unpacked
from reallm.formats.low_rank_plus import LowRankPlus, UnpackedLowRankPlus
from reallm.kernels import one_thread

_ALTERNATIONS = 10
# An iterate that gains less than 0.1 % does not pay for the next one.
_LEAST_GAIN = 1e-3
_POWER_STEPS = 6
_WARM_POWER_STEPS = 2
_OVERSAMPLING = 8


@fit.register
def fit_low_rank_plus(
    fmt: LowRankPlus, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedLowRankPlus:
    """Alternate base ← codec(W - left·rightᵀ), residual ← SVD(W - base); keep the best iterate.

    LQ-LoRA's loop (Guo et al., arXiv:2311.12023), begun with the residual of W itself. It stops when the
    error no longer falls; codec errors are not monotone, so the last iterate need not be the best.
    """
    objective = objective or Objective.plain(weight)
    best, least = None, float("inf")
    base = None
    left, right = _residual(fmt, weight, objective, seed, None)
    for _ in range(_ALTERNATIONS):
        base = fit(fmt.base, weight - _product(left, right), objective, seed, base)
        approximation = decode_unpacked(fmt.base, base, weight)
        left, right = _residual(fmt, weight - approximation, objective, seed, right)
        error = objective.error(weight, approximation + _product(left, right))
        if best is not None and error > least * (1 - _LEAST_GAIN):
            break
        best, least = UnpackedLowRankPlus(left, right, base), error
    assert best is not None
    return best


def low_rank(
    matrix: Float[Tensor, "out in"], rank: int, seed: int = 0, start: Float[Tensor, "in rank"] | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "in rank"]]:
    """(left, right) with left · rightᵀ close to the best approximation of that rank, equal norms a column.

    Subspace iteration with oversampling (Halko et al., arXiv:0909.4061), warm from `start`; matrices not
    much larger than the rank are decomposed in full.
    """
    width = rank + _OVERSAMPLING
    if min(matrix.shape) <= 2 * width:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        roots = s[:rank].sqrt()
        return u[:, :rank] * roots, vh[:rank].T * roots
    basis = _range_basis(matrix, width, seed, start)
    inside = basis.T @ matrix
    # Eigenvectors of the small Gram matrix in place of an SVD, which is twenty times slower on a GPU.
    energies, rotation = torch.linalg.eigh(inside @ inside.T)
    leading = rotation[:, -rank:].flip(1)
    roots = energies[-rank:].flip(0).clamp(min=0).pow(0.25)
    safe = torch.where(roots > 0, roots, 1.0)  # a matrix of lower rank has nothing to divide there
    return basis @ leading * roots, inside.T @ leading / safe


def _range_basis(matrix: Tensor, width: int, seed: int, start: Tensor | None) -> Tensor:
    """Orthonormal (out, width) basis that holds the leading left singular vectors."""
    # The generator lives on the CPU: the same start whatever the device.
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    if start is not None:
        probe[:, : start.shape[1]] = torch.nn.functional.normalize(start, dim=0)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_STEPS if start is None else _WARM_POWER_STEPS):
        probe = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ probe).Q
    return basis


@one_thread()
def _product(left: Tensor, right: Tensor) -> Float[Tensor, "out in"]:
    return left @ right.T


@one_thread()
def _residual(
    fmt: LowRankPlus, matrix: Tensor, objective: Objective, seed: int, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best residual by the objective: the plain one of matrix · root, taken back through the root.

    The root is the Cholesky factor of the hessian, tr(D H Dᵀ) = |D root|², or the root of the importance.
    """
    if objective.hessian is not None:
        root = damped_cholesky(objective.hessian)
        start = start if start is None else root.T @ start
        left, right = low_rank(matrix @ root, fmt.rank, seed, start)
        right = torch.linalg.solve_triangular(root.T, right, upper=True)
    else:
        roots = objective.column_importance.sqrt()[:, None]
        start = start if start is None else start * roots
        left, right = low_rank(matrix * roots.T, fmt.rank, seed, start)
        right = right / roots
    return fmt.fake_quantize_factor(left), fmt.fake_quantize_factor(right)
