"""Sums and factorisations that are bit-identical for any number of threads.

torch splits a sum of everything into one part a thread, and LAPACK its matrices; products of matrices and sums along an
axis keep their order (docs/experiments/number-of-threads.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_WIDTH = 1024  # torch sums up to 32,768 values in one thread


def total(values: Shaped[Tensor, "..."], dtype: torch.dtype | None = None) -> Shaped[Tensor, ""]:
    """Return the sum of all values, in `dtype` or by default in their own."""
    flat = values.reshape(-1)
    while len(flat) > _WIDTH:
        end = len(flat) // _WIDTH * _WIDTH
        rows = flat[:end].view(-1, _WIDTH).sum(1, dtype=dtype)
        flat = torch.cat([rows, flat[end:].sum(0, keepdim=True, dtype=dtype)])
    return flat.sum(dtype=dtype)


def average(values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the mean of all values in their dtype."""
    return total(values) / values.numel()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside the context: for factorisations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
