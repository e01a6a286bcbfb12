"""Codes by error feedback: every block of columns takes over the errors of those before it, and is rounded then.

The rounding itself is a `Coder`'s, so that feedback works with any codec: GPTQ (Frantar et al.,
arXiv:2210.17323) with one column at a time, LDLQ of QuIP (Chee et al., arXiv:2307.13304) with blocks as wide as
a vector or a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.objective import Objective
from reallm.kernels import one_thread

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
    weight: Float[Tensor, "out in"], coder: Coder, hessian: Float[Tensor, "in in"], *, falling: bool = True
) -> Int[Tensor, "coded codes"]:
    """Codes whose decoding nearly minimises tr(D H Dᵀ), block by block.

    After a block J is rounded, the columns that are still to come move by -(error of J) · U_JJ⁻¹ U_J, U the upper
    Cholesky factor of H⁻¹: the best answer to that error as long as they can still move. With `falling` the
    blocks go by falling diagonal of H, so that the inputs that matter most are rounded before errors pile up; else
    from left to right. The order leaves no trace in the codes.
    """
    blocks = _blocks(hessian.diagonal(), coder.width, falling)
    order = torch.cat([torch.arange(start, end) for start, end in blocks]).to(weight.device)
    factor = inverse_factor(hessian[order][:, order])
    moving = weight[:, order]
    codes: dict[int, Tensor] = {}
    left = 0
    for panel in _panels(blocks):
        right = left + sum(end - start for start, end in panel)
        answers = torch.zeros_like(moving[:, left:right])
        at = left
        for start, end in panel:
            to = at + end - start
            own = factor[at:to, at:to]
            # What an error in each column of this block costs once all later ones have answered.
            importance = own.diagonal().reciprocal().square()[None]
            codes[start], decoded = coder.encode(moving[:, at:to], start, importance)
            answer = _solved(moving[:, at:to] - decoded, own)
            answers[:, at - left : to - left] = answer
            moving[:, to:right] -= answer @ factor[at:to, to:right]
            at = to
        moving[:, right:] -= answers @ factor[left:right, right:]
        left = right
    return torch.cat([codes[start] for start in sorted(codes)], 1)


def importance_in_feedback(hessian: Float[Tensor, "in in"], width: int) -> Float[Tensor, " in"]:
    """What an error in each column costs once all columns that come after it have answered: U_jj⁻²."""
    blocks = _blocks(hessian.diagonal(), width, falling=True)
    order = torch.cat([torch.arange(start, end) for start, end in blocks]).to(hessian.device)
    found = torch.empty_like(hessian[0])
    found[order] = inverse_factor(hessian[order][:, order]).diagonal().reciprocal().square()
    return found


def _blocks(importance: Float[Tensor, " in"], width: int, falling: bool) -> list[tuple[int, int]]:
    """(first column, one past the last) of every block, in the order of rounding."""
    columns = len(importance)
    blocks = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    if not falling:
        return blocks
    means = torch.stack([importance[start:end].mean() for start, end in blocks]) if width > 1 else importance
    return [blocks[i] for i in means.argsort(descending=True, stable=True).tolist()]


def _panels(blocks: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring blocks of about _PANEL columns together."""
    panel: list[tuple[int, int]] = []
    for block in blocks:
        panel.append(block)
        if sum(end - start for start, end in panel) >= _PANEL:
            yield panel
            panel = []
    if panel:
        yield panel


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
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(exact + damping * identity)
            result, failed = (lower, failed) if failed else derived(lower)
        if not failed and torch.isfinite(result).all():
            return result.float()
        damping = damping * 10
    raise AssertionError("a symmetric matrix that 1e6 times its mean diagonal does not make positive definite")


def _solved(errors: Float[Tensor, "out width"], own: Float[Tensor, "width width"]) -> Float[Tensor, "out width"]:
    """errors · own⁻¹."""
    if own.shape[0] == 1:
        return errors / own
    with one_thread():
        return torch.linalg.solve_triangular(own, errors, upper=True, left=False)
