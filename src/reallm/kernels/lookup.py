"""Table look-up with a fast and deterministic gradient."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def entries(table: Float[Tensor, "size dim"], codes: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
    """Return table[codes].

    On a CPU this uses index_select: indexing takes three times as long (1.3 ms for a matrix of 221,000 codes), and the
    gradient of an embedding takes 36 ms instead of 1. On a GPU it uses an embedding, whose gradient sorts the codes
    first: the gradient of indexing processes equal codes serially, and index_select adds in arbitrary order.
    """
    if table.is_cuda:
        return F.embedding(codes, table)
    return table.index_select(0, codes.reshape(-1)).view(*codes.shape, table.shape[1])
