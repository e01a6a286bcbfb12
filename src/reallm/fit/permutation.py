"""Orders of columns and rows that put alike ones beside each other, and the permuted format fitted with them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.formats import Unpacked
from reallm.formats.permuted import Permuted, UnpackedPermuted
from reallm.kernels import one_thread

# The greedy chain's memory of ReALLM: the next column is the nearest to the mean of the last 16.
_CHAIN_MEMORY = 16
# Gram matrices of all row blocks at once: 2**26 floats are 256 MB.
_GRAM_FLOATS = 1 << 26
# The likeness of all pairs of so many rows is 1 GB; a vocabulary of 128,000 would take 66.
_MOST_COMPARED = 1 << 14


@fit.register
def fit_permuted(
    fmt: Permuted, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedPermuted:
    """Order once, then fit the base to the reordered weight; a `start` keeps its orders.

    Distances of rows do not depend on the order of columns, so that neither side waits for the other.
    """
    base_start, row_order, order = None, None, None
    if isinstance(start, UnpackedPermuted):
        order, row_order, base_start = start.order, start.row_order, start.base
    elif fmt.rows:
        row_order = find_row_order(fmt, weight)
    if row_order is not None:
        weight, objective = weight[row_order.long()], objective and objective.select_rows(row_order.long())
    if order is None:
        order = find_column_orders(fmt, weight)
    inner = objective and _permute_objective(fmt, objective, weight, order)
    return UnpackedPermuted(order, fit(fmt.base, fmt.gather(weight, order), inner, seed, base_start), row_order)


def _permute_objective(fmt: Permuted, objective: Objective, weight: Tensor, order: Tensor) -> Objective:
    """The objective in the new order; where row blocks have orders of their own only its importance is left.

    One hessian serves rows that share an order: feedback for every block would need a codebook for every block.
    """
    if len(order) == 1:
        return objective.select_columns(order[0].long())
    return Objective(fmt.gather(objective.importance.expand_as(weight), order))


def find_column_orders(fmt: Permuted, weight: Float[Tensor, "out in"]) -> Int[Tensor, "blocks in"]:
    """One order a row block, as `fmt.method` says."""
    return _orders(fmt.method, _row_blocks(weight, fmt.block_rows))


def find_row_order(fmt: Permuted, weight: Float[Tensor, "out in"]) -> Int[Tensor, " out"]:
    """One order of all rows, as `fmt.method` says.

    Errors: FormatError for more than 16,384 rows that would have to be compared in pairs.
    """
    if fmt.method != "sort" and len(weight) > _MOST_COMPARED:
        raise FormatError(
            f"permuted: method={fmt.method!r} compares all pairs of {len(weight):,} rows, more than "
            f"{_MOST_COMPARED:,}; use method='sort', or rows=False"
        )
    return _orders(fmt.method, weight.T[None])[0]


def _orders(method: str, blocks: Float[Tensor, "blocks rows in"]) -> Int[Tensor, "blocks in"]:
    if method == "sort":
        return blocks.square().sum(1).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    find = greedy_chain if method == "greedy" else fiedler_order
    per_chunk = max(1, _GRAM_FLOATS // blocks.shape[2] ** 2)
    return torch.cat([find(chunk) for chunk in blocks.split(per_chunk)])


def fiedler_order(blocks: Float[Tensor, "blocks rows in"]) -> Int[Tensor, "blocks in"]:
    """Columns along the Fiedler vector of the graph whose edges are max(0, cosine)⁴ of pairs of columns.

    Where likeness falls with the distance on some line, this is the order on it (Atkins, Boman and Hendrickson, A
    spectral algorithm for seriation, SIAM J. Comput. 28, 1998). The fourth power keeps the cosines of unrelated
    columns, 1/√rows each and many, from outvoting alike neighbours: with the square shuffled curves were not found
    again. Degrees are divided out, or single columns unlike all others would be the vector. The end with the larger
    columns comes first.
    """
    energy = blocks.double().square().sum(1)
    unit = torch.nn.functional.normalize(blocks.double(), dim=1)
    likeness = (unit.transpose(1, 2) @ unit).clamp(min=0).pow(4)
    roots = likeness.sum(2).sqrt()
    roots = torch.where(roots > 0, roots, 1.0)  # a zero column is like none
    laplacian = torch.eye(likeness.shape[1]).to(likeness) - likeness / roots[:, :, None] / roots[:, None]
    # The vector of eigenvalue 0 is known; it is lifted above all others, which are at most 2.
    flat = torch.nn.functional.normalize(roots, dim=1)
    with one_thread():
        lifted = laplacian + 3 * flat[:, :, None] * flat[:, None]
        places = torch.linalg.eigh(lifted).eigenvectors[:, :, 0] / roots
    begins = (places * energy).sum(1, keepdim=True) <= places.mean(1, keepdim=True) * energy.sum(1, keepdim=True)
    return torch.where(begins, places, -places).argsort(dim=1, stable=True).to(torch.int32)


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
