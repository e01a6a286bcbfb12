"""Codes by error feedback: every column block is rounded after it has taken over the errors of those before it.

The rounding itself is a `Coder`'s, so that feedback works with any codec: GPTQ (Frantar et al.,
arXiv:2210.17323) with one column at a time, LDLQ of QuIP (Chee et al., arXiv:2307.13304) with blocks as wide as
a vector or a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.objective import Objective

# Share of the mean diagonal added to the diagonal: keeps a hessian of too few tokens invertible.
_DAMPING = 0.01
# Errors reach columns further right once a panel: one large product in place of many small ones.
_PANEL = 128


@runtime_checkable
class Coder(Protocol):
    """Rounds columns with scales and codebooks that are already chosen."""

    width: int  # columns that are coded together; the last block of a matrix may be narrower

    def encode(
        self, columns: Float[Tensor, "out columns"], start: int, importance: Float[Tensor, "rows columns"]
    ) -> tuple[Int[Tensor, "coded codes"], Float[Tensor, "out columns"]]:
        """Codes and decoded values of columns `start`, `start + 1`, … of the matrix.

        `start` and the number of columns are multiples of `width`, save at the matrix's end. Codes of
        neighbouring blocks are joined along their second axis.
        """


def coded(weight: Float[Tensor, "out in"], coder: Coder, objective: Objective | None) -> Int[Tensor, "coded codes"]:
    """The coder's codes of `weight`: by rounding, or by error feedback where the objective has a hessian."""
    objective = objective or Objective.plain(weight)
    if objective.hessian is None:
        return coder.encode(weight, 0, objective.importance)[0]
    return feedback(weight, coder, objective.hessian)


def feedback(
    weight: Float[Tensor, "out in"], coder: Coder, hessian: Float[Tensor, "in in"]
) -> Int[Tensor, "coded codes"]:
    """Codes whose decoding nearly minimises tr(D H Dᵀ), block by block from left to right.

    After a block J is rounded, the columns behind it move by -(error of J) · U_JJ⁻¹ U_J, U the upper Cholesky
    factor of H⁻¹: the best answer to that error as long as they can still move.
    """
    factor = inverse_factor(hessian)
    columns, width = weight.shape[1], coder.width
    panel = max(width, _PANEL // width * width)
    moving = weight.clone()
    codes = []
    for left in range(0, columns, panel):
        right = min(left + panel, columns)
        answers = torch.zeros_like(moving[:, left:right])
        for start in range(left, right, width):
            end = min(start + width, right)
            own = factor[start:end, start:end]
            # What an error in each column of this block costs once all later ones have answered.
            importance = own.diagonal().reciprocal().square()[None]
            found, decoded = coder.encode(moving[:, start:end], start, importance)
            codes.append(found)
            answer = _solved(moving[:, start:end] - decoded, own)
            answers[:, start - left : end - left] = answer
            moving[:, end:right] -= answer @ factor[start:end, end:right]
        moving[:, right:] -= answers @ factor[left:right, right:]
    return torch.cat(codes, 1)


def inverse_factor(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹."""
    return _damped(hessian, lambda lower: torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True))


def damped_root(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Lower triangular L with LLᵀ = H + damping."""
    return _damped(hessian, lambda lower: (lower, torch.zeros(())))


def _damped(hessian: Tensor, derived: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """What `derived` makes of the Cholesky factor of H + damping, which grows tenfold until both exist."""
    exact = hessian.double()
    identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    damping = _DAMPING * exact.diagonal().mean()
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(exact + damping * identity)
        if not failed:
            result, failed = derived(lower)
            if not failed and torch.isfinite(result).all():
                return result.float()
        damping = damping * 10
    raise AssertionError("a symmetric matrix that 1e6 times its mean diagonal does not make positive definite")


def _solved(errors: Float[Tensor, "out width"], own: Float[Tensor, "width width"]) -> Float[Tensor, "out width"]:
    """errors · own⁻¹."""
    if own.shape[0] == 1:
        return errors / own
    return torch.linalg.solve_triangular(own, errors, upper=True, left=False)
