"""Gradient descent on the parameters of a decoder, quantised as they will be stored at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.formats import parameters
from reallm.kernels import one_thread

_BETAS = (0.9, 0.99)
_EPSILON = 1e-8


class Through(torch.autograd.Function):
    """Rounded values forwards, gradients as if nothing had been rounded (Bengio et al., arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def stored_parameters(bits: int, flat: Float[Tensor, " parameters"]) -> parameters.Stored:
    """A flat vector as it is stored."""
    with torch.no_grad():
        return fit(parameters.storage(bits), flat.detach()[None])


def quantised(bits: int, flat: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
    """The vector as it comes back from the file; gradients pass as if it were the vector itself."""
    return Through.apply(flat, parameters.values(bits, stored_parameters(bits, flat), len(flat)).detach())


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980) on a few tensors: elementwise, so the same in every run."""

    def __init__(self, tensors: list[Tensor], rates: list[float]) -> None:
        self.tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        self._rates = rates
        self._moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in tensors]
        self._steps = 0

    def step(self, loss_of: Callable[..., Tensor], share: float) -> float:
        """One step of `share` of the rates along the gradient of `loss_of(*tensors)`; the loss before it."""
        with torch.enable_grad(), one_thread():
            loss = loss_of(*self.tensors)
            gradients = torch.autograd.grad(loss, self.tensors)
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in _BETAS]
        for tensor, gradient, (mean, square), rate in zip(
            self.tensors, gradients, self._moments, self._rates, strict=True
        ):
            with torch.no_grad():
                mean.lerp_(gradient, 1 - _BETAS[0])
                square.lerp_(gradient.square(), 1 - _BETAS[1])
                size = (square / corrections[1]).sqrt() + _EPSILON
                tensor.sub_(share * rate / corrections[0] * mean / size)
        return float(loss.detach())


def falling(step: int, steps: int) -> float:
    """Share of the rate at a step: a half cosine from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2
