"""Codes by error feedback: every block of columns takes over the errors of those before it, and is rounded then.

The rounding itself is a `Coder`'s, so that feedback works with any codec: GPTQ (Frantar et al.,
arXiv:2210.17323) with one column at a time, LDLQ of QuIP (Chee et al., arXiv:2307.13304) with blocks as wide as
a vector or a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.objective import Objective
from reallm.kernels import one_thread

# Share of the mean diagonal added to the diagonal: keeps a hessian of too few tokens invertible.
_DAMPING = 0.01
# Errors reach columns further right once a panel: one large product in place of many small ones.
_PANEL = 128

Blocks: TypeAlias = list[tuple[int, int]]  # (first column, one past the last)


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


@runtime_checkable
class MetricCoder(Coder, Protocol):
    """A coder that can also weigh the errors of a block's columns against one another, not only each by itself."""

    def encode_by(
        self, columns: Float[Tensor, "out columns"], start: int, root: Float[Tensor, "columns columns"]
    ) -> tuple[Int[Tensor, "coded codes"], Float[Tensor, "out columns"]]:
        """As `encode` for one block, at a small |(columns - decoded) · root|²."""


@runtime_checkable
class PanelCoder(Coder, Protocol):
    """A coder of single columns that can also go through a panel of them with feedback, all in one launch."""

    def has_panels(self, device: torch.device) -> bool:
        """Whether it can do so on this device."""

    def encode_panel(
        self,
        moving: Float[Tensor, "out panel"],
        columns: Int[Tensor, " panel"],
        factor: Float[Tensor, "panel panel"],
    ) -> tuple[Int[Tensor, "out panel"], Float[Tensor, "out panel"]]:
        """(codes, errors / U_jj) of the matrix's `columns`, each rounded after it has answered for those before it."""


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
    order = _columns_of(blocks, weight.device)
    factor = inverse_factor(hessian[order][:, order])
    moving = weight[:, order]
    codes: dict[int, Tensor] = {}
    by_panel = _panel_at_once if isinstance(coder, PanelCoder) and coder.has_panels(weight.device) else _panel_by_blocks
    left = 0
    for panel in _panels(blocks):
        right = left + sum(end - start for start, end in panel)
        found, answers = by_panel(coder, moving[:, left:right], panel, factor[left:right, left:right])
        codes |= found
        moving[:, right:].addmm_(answers, factor[left:right, right:], alpha=-1)
        left = right
    return torch.cat([codes[start] for start in sorted(codes)], 1)


def _panel_by_blocks(
    coder: Coder, moving: Float[Tensor, "out panel"], blocks: Blocks, factor: Float[Tensor, "panel panel"]
) -> tuple[dict[int, Tensor], Float[Tensor, "out panel"]]:
    """(codes by the first column of their block, answers: errors · U_JJ⁻¹) of a panel, block after block."""
    moving, answers = moving.clone(), torch.zeros_like(moving)
    codes, at = {}, 0
    encoded = _encoding_of(coder)
    for (start, end), (inverse, weights) in zip(blocks, _inverses(factor, blocks), strict=True):
        to = at + end - start
        # Least cost once all later blocks have answered: |errors · own⁻¹|², or its diagonal.
        codes[start], decoded = encoded(moving[:, at:to], start, inverse, weights)
        answers[:, at:to] = answer = (moving[:, at:to] - decoded) @ inverse
        if to < len(factor):
            moving[:, to:].addmm_(answer, factor[at:to, to:], alpha=-1)
        at = to
    return codes, answers


@one_thread()
def _inverses(
    factor: Float[Tensor, "panel panel"], blocks: Blocks
) -> list[tuple[Float[Tensor, "width width"], Float[Tensor, " width"]]]:
    """U_JJ⁻¹ of every block and the squares of its diagonal, in one call where all are as wide.

    A GPU has better to do than launches of 16 columns. The diagonal alone serves coders that weigh columns apart, a
    little better than the norms of its rows.
    """
    widths = [end - start for start, end in blocks]
    if len(set(widths)) > 1:
        pairs = zip(itertools.accumulate(widths), widths, strict=True)
        inverses = [_inverse(factor[to - width : to, to - width : to]) for to, width in pairs]
        return [(inverse, inverse.diagonal().square()) for inverse in inverses]
    stacked = _inverse(_diagonal_blocks(factor, widths[0]))
    return list(zip(stacked, stacked.diagonal(dim1=1, dim2=2).square(), strict=True))


def _inverse(own: Float[Tensor, "*blocks width width"]) -> Float[Tensor, "*blocks width width"]:
    """Of upper triangular matrices."""
    identity = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
    return torch.linalg.solve_triangular(own, identity, upper=True)


def _panel_at_once(
    coder: PanelCoder, moving: Float[Tensor, "out panel"], blocks: Blocks, factor: Float[Tensor, "panel panel"]
) -> tuple[dict[int, Tensor], Float[Tensor, "out panel"]]:
    """The same by a coder that goes through the columns of a panel itself."""
    starts = [start for start, _ in blocks]
    columns = torch.tensor(starts, device=moving.device)
    codes, answers = coder.encode_panel(moving.contiguous(), columns, factor.contiguous())
    return dict(zip(starts, codes.split(1, 1), strict=True)), answers


def swept(
    weight: Float[Tensor, "out in"],
    coder: Coder,
    hessian: Float[Tensor, "in in"],
    codes: Int[Tensor, "coded codes"],
    decoded: Float[Tensor, "out in"],
) -> tuple[Int[Tensor, "coded codes"], Float[Tensor, "out in"]]:
    """Every block rounded once more, against the errors of all other blocks, those rounded after it too.

    With all other errors fixed the cost of the errors D_J of a block J is that of their distance to
    D_J - (D H)_J H_JJ⁻¹ in H_JJ. Rows of codes take a block's new codes only where they lower tr(D H Dᵀ), so that it
    never rises. The search by blocks of AQLM (Egiazarian et al., arXiv:2401.06118).
    """
    blocks = _blocks(hessian.diagonal(), coder.width, falling=True)
    codes, decoded = codes.clone(), decoded.clone()
    per_block = codes.shape[1] // len(blocks)
    rows_per_code = -(-len(weight) // len(codes))
    roots, inverses = _own_roots(hessian, coder.width)
    weights = roots.square().sum(2)
    slopes, encoded = (weight - decoded) @ hessian, _encoding_of(coder)
    for start, end in blocks:
        number, span = start // coder.width, slice(0, end - start)
        slope, present = slopes[:, start:end], decoded[:, start:end]
        target = torch.addmm(present, slope, inverses[number, span, span])
        found, rounded = encoded(target, start, roots[number, span, span], weights[number, span])
        step = rounded - present
        twice = torch.addmm(slope, step, hessian[start:end, start:end], beta=2, alpha=-1)
        gains = by_code_row((twice * step).sum(1), len(codes))
        place = slice(number * per_block, (number + 1) * per_block)
        better = gains[:, None] > 0
        codes[:, place] = torch.where(better, found, codes[:, place])
        kept = better if rows_per_code == 1 else better.repeat_interleave(rows_per_code, 0)[: len(weight)]
        step = torch.where(kept, step, 0.0)
        decoded[:, start:end] += step
        slopes.addmm_(step, hessian[start:end], alpha=-1)
    return codes, decoded


@one_thread()
def _own_roots(hessian: Tensor, width: int) -> tuple[Float[Tensor, "blocks w w"], Float[Tensor, "blocks w w"]]:
    """Lower Cholesky factors and inverses of all diagonal blocks of H + damping, filled up with ones.

    In a few calls for all: on a GPU each block by itself would have to wait for the answer whether it can be factored.
    """
    missing = -len(hessian) % width
    filled = torch.nn.functional.pad(hessian.double(), (0, missing, 0, missing))
    filled[range(len(hessian), len(filled)), range(len(hessian), len(filled))] = 1
    own = _diagonal_blocks(filled, width)
    sizes = own.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * sizes.mean(1) + torch.finfo(torch.float32).tiny
    damped = own + damping[:, None, None] * torch.eye(width, dtype=own.dtype, device=own.device)
    roots, failed = torch.linalg.cholesky_ex(damped)
    # Where float32 sums have left a block indefinite beyond the damping, its columns are taken apart.
    roots = torch.where(failed[:, None, None] > 0, torch.diag_embed((sizes.abs() + damping[:, None]).sqrt()), roots)
    return roots.float(), torch.cholesky_inverse(roots).float()


def _diagonal_blocks(matrix: Float[Tensor, "n n"], width: int) -> Float[Tensor, "blocks width width"]:
    """The blocks on the diagonal; `width` divides n."""
    count = len(matrix) // width
    return matrix.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def by_code_row(values: Float[Tensor, " out"], count: int) -> Float[Tensor, " coded"]:
    """Sums over the output rows that share one of `count` rows of codes (rows of tiles)."""
    rows = -(-len(values) // count)
    if rows == 1:
        return values
    return torch.nn.functional.pad(values, (0, rows * count - len(values))).view(count, rows).sum(1)


def importance_in_feedback(hessian: Float[Tensor, "in in"], width: int) -> Float[Tensor, " in"]:
    """What an error in each column costs once all columns that come after it have answered: U_jj⁻²."""
    blocks = _blocks(hessian.diagonal(), width, falling=True)
    order = _columns_of(blocks, hessian.device)
    found = torch.empty_like(hessian[0])
    found[order] = inverse_factor(hessian[order][:, order]).diagonal().reciprocal().square()
    return found


def costs_in_feedback(
    hessian: Float[Tensor, "in in"], tested: Float[Tensor, "in in"], widths: tuple[int, ...]
) -> dict[int, Float[Tensor, " in"]]:
    """What a rounding error in each column costs by the hessian `tested`, answered as `hessian` says; by coder width.

    diag(V T Vᵀ) with V_J = U_JJ⁻¹ U_J for every block J of columns. On the hessian itself these are the squared
    norms of U_JJ⁻¹; on that of other text they are larger, the more so the fewer tokens `hessian` has. One factor
    serves all widths, in the order of the widest: the others divide it. Only the blocks of U T Uᵀ on the diagonal are
    needed, and one product makes them for all widths.
    """
    widest = max(widths)
    blocks = _blocks(hessian.diagonal(), widest, falling=True)
    order = _columns_of(blocks, hessian.device)
    factor, tested = _rough_inverse_factor(hessian[order][:, order]), tested[order][:, order]
    count, found = len(factor), {}
    size = -(-count // widest) * widest
    filled = torch.eye(size, device=factor.device, dtype=factor.dtype)
    filled[:count, :count] = factor
    costs = _diagonal_of_product(filled, torch.nn.functional.pad(tested, (0, size - count, 0, size - count)), widest)
    for width in widths:
        own, parts = _diagonal_blocks(filled, width), _diagonal_blocks_of_each(costs, width)
        halved = torch.linalg.solve_triangular(own, parts, upper=True)
        solved = torch.linalg.solve_triangular(own, halved.mT, upper=True)
        found[width] = torch.empty_like(tested[0])
        found[width][order] = solved.diagonal(dim1=1, dim2=2).reshape(-1)[:count]
    return found


def _rough_inverse_factor(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """`inverse_factor` in a third of the time, in float32: for predictions, not for fits.

    H = R Rᵀ with R upper triangular, the factor of H in the opposite order, so that U = R⁻¹. Damping of 1 % is far
    above what rounding does to a hessian of thousands of inputs; where it is not, float64 has more of it.
    """
    turned = hessian.flip(0, 1)
    turned.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    with one_thread():
        root, failed = torch.linalg.cholesky_ex(turned)
    if failed or not torch.isfinite(root).all():
        root = damped_root(hessian.flip(0, 1))
    return _inverse_of_upper(root.flip(0, 1))


def _inverse_of_upper(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """By halves: products are faster than LAPACK's substitution, and a third of its operations."""
    count = len(upper)
    if count <= _LEAST_INVERSE:
        return torch.linalg.solve_triangular(upper, torch.eye(count, device=upper.device), upper=True)
    half, found = count // 2, torch.zeros_like(upper)
    first, second = _inverse_of_upper(upper[:half, :half]), _inverse_of_upper(upper[half:, half:])
    found[:half, :half], found[half:, half:] = first, second
    found[:half, half:] = first @ (upper[:half, half:] @ second).neg_()
    return found


_LEAST_INVERSE = 96


def _diagonal_of_product(
    upper: Float[Tensor, "n n"], middle: Float[Tensor, "n n"], width: int
) -> Float[Tensor, "blocks width width"]:
    """The blocks on the diagonal of U M Uᵀ, panel by panel: U is triangular, and half of the product is never asked."""
    count, found = len(upper), []
    panel = width * max(1, -(-count // (width * _PRODUCT_PANELS)))
    for start in range(0, count, panel):
        rows = upper[start : start + panel, start:]
        moved = (rows @ middle[start:, start:]).view(-1, width, count - start)
        found.append(moved @ rows.view(-1, width, count - start).mT)
    return torch.cat(found)


_PRODUCT_PANELS = 4


def _diagonal_blocks_of_each(blocks: Float[Tensor, "blocks widest widest"], width: int) -> Float[Tensor, "_ w w"]:
    """The smaller blocks on the diagonals of blocks, in order."""
    count, widest, _ = blocks.shape
    parts = blocks.reshape(count, widest // width, width, widest // width, width)
    return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, width, width)


def _encoding_of(coder: Coder) -> Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes a block (columns, start, root, weights) at a small |(columns - decoded) · root|².

    Coders that take no root are given the weights of the columns.
    """
    if isinstance(coder, MetricCoder):
        return lambda columns, start, root, weights: coder.encode_by(columns, start, root)
    return lambda columns, start, root, weights: coder.encode(columns, start, weights[None])


def _blocks(importance: Float[Tensor, " in"], width: int, falling: bool) -> Blocks:
    """(first column, one past the last) of every block, in the order of rounding."""
    columns = len(importance)
    blocks = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    if not falling:
        return blocks
    means = importance[: columns // width * width].view(-1, width).mean(1)
    if columns % width:
        means = torch.cat([means, importance[-(columns % width) :].mean()[None]])
    return [blocks[i] for i in means.argsort(descending=True, stable=True).tolist()]


def _columns_of(blocks: Blocks, device: torch.device) -> Int[Tensor, " in"]:
    """All columns, in the order of rounding."""
    return torch.tensor([column for start, end in blocks for column in range(start, end)]).to(device)


def _panels(blocks: Blocks) -> Iterator[Blocks]:
    """Neighbouring blocks of about _PANEL columns together."""
    panel: Blocks = []
    for block in blocks:
        panel.append(block)
        if sum(end - start for start, end in panel) >= _PANEL:
            yield panel
            panel = []
    if panel:
        yield panel


def inverse_factor(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹."""
    return _damped(hessian, inverse=True)


def damped_root(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Lower triangular L with LLᵀ = H + damping."""
    return _damped(hessian, inverse=False)


def _damped(hessian: Tensor, inverse: bool) -> Tensor:
    """The lower Cholesky factor of H + damping or the upper of its inverse; damping grows tenfold until it exists.

    One name for all steps: each is 0.5 GB in float64 for 8,192 inputs, and no more than three are held at once.
    """
    damping = _DAMPING * hessian.double().diagonal().mean()
    for _ in range(8):
        factor = hessian.double()
        factor.diagonal().add_(damping)
        with one_thread():
            factor, failed = torch.linalg.cholesky_ex(factor)
            if inverse and not failed:
                factor = torch.cholesky_inverse(factor)
                factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed and torch.isfinite(factor).all():
            return factor.float()
        damping = damping * 10
    raise AssertionError("a symmetric matrix that 1e6 times its mean diagonal does not make positive definite")
