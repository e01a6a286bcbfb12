"""Gradient descent on the parameters of a decoder, quantised as they will be stored at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.formats import parameters
from reallm.kernels import one_thread, straight_through

_BETAS = (0.9, 0.99)
_EPSILON = 1e-8


def quantize_parameters(bits: int, flat: Float[Tensor, " parameters"]) -> parameters.UnpackedParameters:
    """A flat vector as it is stored."""
    with torch.no_grad():
        return fit(parameters.storage(bits), flat.detach()[None])


def fake_quantize_parameters(bits: int, flat: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
    """The vector as it comes back from the file; gradients pass as if it were the vector itself."""
    return straight_through(flat, parameters.values(bits, quantize_parameters(bits, flat), len(flat)).detach())


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980) on one tensor: elementwise, so the same in every run."""

    def __init__(self, tensor: Tensor, rate: float) -> None:
        self.tensor = tensor.detach().clone().requires_grad_()
        self._rate = rate
        self._mean, self._square = torch.zeros_like(tensor), torch.zeros_like(tensor)
        self._steps = 0

    @torch.no_grad()
    def update(self, gradient: Tensor, share: float) -> None:
        """One step of `share` of the rate."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        mean, square = self._mean / (1 - _BETAS[0] ** self._steps), self._square / (1 - _BETAS[1] ** self._steps)
        self.tensor.sub_(share * self._rate * mean / (square.sqrt() + _EPSILON))


def gradient_step(adams: Sequence[Adam], loss_fn: Callable[..., Tensor], share: float) -> None:
    """One step of all tensors along the gradient of `loss_fn(*tensors)`."""
    gradients = compute_gradients([adam.tensor for adam in adams], loss_fn)
    for adam, gradient in zip(adams, gradients, strict=True):
        adam.update(gradient, share)


def compute_gradients(tensors: Sequence[Tensor], loss_fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Of `loss_fn(*tensors)`, by each tensor."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad(), one_thread():
        return torch.autograd.grad(loss_fn(*tensors), tensors)


def cosine_decay(step: int, steps: int) -> float:
    """Share of the rate at a step: a half cosine from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2
