"""Values that are rounded in the forward pass (straight-through estimator) only."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def straight_through(values: Float[Tensor, "*size"], rounded: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """`rounded`, with gradients as if it were `values` (Bengio et al., arXiv:1308.3432)."""
    return _Through.apply(values, rounded)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
