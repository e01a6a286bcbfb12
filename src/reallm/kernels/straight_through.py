"""Straight-through estimator (STE)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def straight_through(values: Float[Tensor, "*size"], rounded: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """Return `rounded`; its gradient passes unchanged to `values` (Bengio et al., arXiv:1308.3432)."""
    return _StraightThrough.apply(values, rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
