"""Column orders that put alike columns beside each other, and the permuted format fitted with them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.formats import Parts
from reallm.formats.permuted import Permuted, PermutedParts

# The greedy chain's memory of ReALLM: the next column is the nearest to the mean of the last 16.
_CHAIN_MEMORY = 16
# Gram matrices of all row blocks at once: 2**26 floats are 256 MB.
_GRAM_FLOATS = 1 << 26


@fit.register
def fit_permuted(
    fmt: Permuted, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> PermutedParts:
    """Order once, then fit the base to the reordered weight; a `start` keeps its order."""
    if isinstance(start, PermutedParts):
        order, base_start = start.order, start.base
    else:
        order, base_start = column_orders(fmt, weight), None
    inner = objective and _rearranged(fmt, objective, weight, order)
    base = fit(fmt.base, fmt.gather(weight, order), inner, seed, base_start)
    return PermutedParts(order, base)


def _rearranged(fmt: Permuted, objective: Objective, weight: Tensor, order: Tensor) -> Objective:
    """The objective in the new order; where row blocks have orders of their own only its importance is left.

    One hessian serves rows that share an order: feedback for every block would need a codebook for every block.
    """
    if len(order) == 1:
        return objective.with_columns(order[0].long())
    return Objective(fmt.gather(objective.importance.expand_as(weight), order))


def column_orders(fmt: Permuted, weight: Float[Tensor, "out in"]) -> Int[Tensor, "blocks in"]:
    """One order a row block, as `fmt.method` says."""
    blocks = _row_blocks(weight, fmt.block_rows)
    if fmt.method == "sort":
        return blocks.square().sum(1).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    per_chunk = max(1, _GRAM_FLOATS // weight.shape[1] ** 2)
    return torch.cat([greedy_chain(chunk) for chunk in blocks.split(per_chunk)])


def greedy_chain(blocks: Float[Tensor, "blocks rows in"]) -> Int[Tensor, "blocks in"]:
    """Chains of columns: begin with the largest, go on to the nearest to the mean of the last 16 placed.

    The method of ReALLM (Leconte et al., arXiv:2405.13155). Distances come from the Gram matrix, of which
    each step adds one row to a running sum and drops one: n² additions a chain in place of n² · rows.
    """
    gram = blocks.transpose(1, 2) @ blocks
    norms = gram.diagonal(dim1=1, dim2=2).clone()
    lanes = torch.arange(len(blocks), device=blocks.device)
    order = torch.empty(len(blocks), blocks.shape[2], dtype=torch.int64, device=blocks.device)
    placed = torch.zeros_like(norms, dtype=torch.bool)
    recent = torch.zeros_like(norms)
    column = norms.argmax(1)
    for step in range(order.shape[1]):
        order[:, step] = column
        placed[lanes, column] = True
        recent += gram[lanes, column]
        if step >= _CHAIN_MEMORY:
            recent -= gram[lanes, order[:, step - _CHAIN_MEMORY]]
        distance = norms - 2 * recent / min(step + 1, _CHAIN_MEMORY)
        column = distance.masked_fill(placed, float("inf")).argmin(1)
    return order.to(torch.int32)


def _row_blocks(weight: Float[Tensor, "out in"], block_rows: int) -> Float[Tensor, "blocks rows in"]:
    """Rows in blocks; a short last block is filled with zero rows, which change no distance."""
    rows = min(block_rows or weight.shape[0], weight.shape[0])
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % rows))
    return filled.view(-1, rows, weight.shape[1])
