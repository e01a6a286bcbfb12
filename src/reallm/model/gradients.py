"""What the end loss says of a model's matrices: squared gradients on calibration text, in the original model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.kernels import average
from reallm.model.walk import Matrix, linear_shape

# (module path, its inputs (tokens, in), gradients of its outputs (tokens, out)) of one window
Seen = Callable[[str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]


def token_weights(
    model: nn.Module, windows: Int[Tensor, "windows context"], matrices: Sequence[Matrix], device: str | torch.device
) -> dict[str, Float[Tensor, "windows context"]]:
    """How much each token's output of each module matters: the mean squared gradient of the loss, mean 1 a module.

    With them XᵀX becomes the end-loss-guided hessian of GuidedQuant (Kim et al., arXiv:2505.07004), all output
    channels in one group. Modules that no gradient reaches are left out.
    """
    found: dict[str, list[Tensor]] = {}

    def seen(name: str, inputs: Tensor, gradients: Tensor) -> None:
        found.setdefault(name, []).append(gradients.float().square().mean(1).cpu())

    _backward_each(model, windows, matrices, device, seen)
    weights = {name: torch.stack(parts) for name, parts in found.items() if len(parts) == len(windows)}
    return {name: weight / average(weight) for name, weight in weights.items() if average(weight) > 0}


def fisher(
    model: nn.Module, windows: Int[Tensor, "windows context"], matrices: Sequence[Matrix], device: str | torch.device
) -> dict[str, Float[Tensor, "out in"]]:
    """The diagonal of the Fisher information of every weight, tokens taken as independent: Σ_t g_ti² x_tj², mean 1."""
    found: dict[str, Tensor] = {}

    def seen(name: str, inputs: Tensor, gradients: Tensor) -> None:
        update = gradients.float().square().T @ inputs.float().square()
        found[name] = found[name] + update.cpu() if name in found else update.cpu()

    _backward_each(model, windows, matrices, device, seen)
    return {name: total / average(total) for name, total in found.items() if average(total) > 0}


def _backward_each(model: nn.Module, windows: Tensor, matrices: Sequence[Matrix], device: Any, seen: Seen) -> None:
    """One window at a time through the whole model and back; no weight gets a gradient of its own."""
    home = next(model.parameters()).device
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    for matrix in matrices:
        module = model.get_submodule(matrix.name) if matrix.expert is None else None
        if module is not None and linear_shape(module) is not None:
            hooks.append(module.register_forward_hook(_watching(matrix.name, seen)))
    try:
        with torch.enable_grad():
            for window in windows:
                ids = window[None].to(device)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.to(home)


def _watching(name: str, seen: Seen) -> Callable[..., None]:
    """A forward hook that waits for the gradient of the module's output."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        output.register_hook(lambda gradient: seen(name, rows, gradient.detach().reshape(len(rows), -1)))

    return hook
