"""What the end loss says of a model's matrices: squared gradients on calibration text, in the original model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.kernels import average
from reallm.model.walk import Matrix, linear_shape

# (module path, its inputs (tokens, in), gradients of its outputs (tokens, out)) of one window
Seen = Callable[[str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]


@dataclass(frozen=True)
class Guidance:
    """What the end loss says of a module's outputs: mean squared gradients by token and by channel, both of mean 1."""

    tokens: Float[Tensor, "windows context"]
    rows: Float[Tensor, " out"]


def guidance(
    model: nn.Module, windows: Int[Tensor, "windows context"], matrices: Sequence[Matrix], device: str | torch.device
) -> dict[str, Guidance]:
    """How much each token and each channel of each module's output matters, by the squared gradient of the loss.

    With `tokens` XᵀX becomes the end-loss-guided hessian of GuidedQuant (Kim et al., arXiv:2505.07004), all output
    channels in one group. Modules that no gradient reaches are left out.
    """
    tokens: dict[str, list[Tensor]] = {}
    rows: dict[str, Tensor] = {}

    def seen(name: str, inputs: Tensor, gradients: Tensor) -> None:
        squares = gradients.float().square()
        tokens.setdefault(name, []).append(squares.mean(1).cpu())
        rows[name] = rows[name] + squares.sum(0) if name in rows else squares.sum(0)

    _backward_each(model, windows, matrices, device, seen)
    weights = {name: torch.stack(parts) for name, parts in tokens.items() if len(parts) == len(windows)}
    return {
        name: Guidance(weight / average(weight), rows[name].cpu() / average(rows[name].cpu()))
        for name, weight in weights.items()
        if average(weight) > 0
    }


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


@dataclass(frozen=True)
class Curvature:
    """What the end loss is to a matrix: its second derivatives, inputs apart from outputs (K-FAC, arXiv:1503.05671).

    An error D of the weights costs about ½ Σ_i outputs_i · (D H Dᵀ)_ii nats a token, with H = `hessian`, in which
    tokens count by their gradients (GuidedQuant, arXiv:2505.07004).
    """

    outputs: Float[Tensor, " out"]  # mean over tokens of the squared gradient of the log-likelihood
    halves: Float[Tensor, "2 out"]  # in any unit, of the windows of `fed_back` and of those of `hessian`
    hessian: Float[Tensor, "in in"]  # Σ w x xᵀ / Σ w, w the token's mean squared gradient; float32
    fed_back: Float[Tensor, "in in"]  # what a fit would know: of other windows, w = 1 unless fits are guided too


def curvatures(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    matrices: Sequence[Matrix],
    device: str | torch.device,
    found: Callable[[str, Curvature], None],
    seed: int = 0,
    guided: bool = False,
) -> EndCurvature:
    """Curvature of each module, handed to `found` one by one, in a pass of the original model over the windows.

    Tokens to predict are drawn from the model's own distribution: then mean squared gradients are the second
    derivatives of the KL divergence to the original. `guided`: fits weigh tokens by gradients.
    Modules that no gradient reaches are left out. Several passes where the sums of one would take over _SUMS_BYTES.
    """
    ends = _Ends(model, windows)
    for number, part in enumerate(_parts(matrices)):
        sums = _Sums(guided, len(windows) == 1)
        _backward_each(model, windows, part, device, sums.add, seed, None if number else ends)
        for name in list(sums.hessians):
            found(name, sums.pop(name))
    return ends.result()


# Of second moments held at a time: all of a 135M model's are 1 GB, those of a 7B model come in several passes.
_SUMS_BYTES = 8_000_000_000


def _parts(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    parts: list[list[Matrix]] = [[]]
    size = 0
    for matrix in matrices:
        size += 8 * matrix.shape[1] ** 2
        if size > _SUMS_BYTES and parts[-1]:
            parts.append([])
            size = 8 * matrix.shape[1] ** 2
        parts[-1].append(matrix)
    return parts


class _Sums:
    """Sums over tokens of one pass: of every second window what fits will know, of the others what errors cost."""

    def __init__(self, guided: bool, single: bool) -> None:
        self.guided, self.single = guided, single
        self.hessians: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}
        self.weights: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}
        self.windows: dict[str, int] = {}

    def add(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        squares = gradients.float().square()
        if name not in self.hessians:
            size = inputs.shape[1]
            self.hessians[name] = [torch.zeros(size, size, device=inputs.device) for _ in range(2)]
            self.outputs[name] = squares.new_zeros(2, squares.shape[1])
            self.weights[name] = [squares.new_zeros(()) for _ in range(2)]
            self.tokens[name] = self.windows[name] = 0
        self.tokens[name] += len(squares)
        if self.single:
            middle = len(squares) // 2
            self._count(name, 0, inputs[:middle], squares[:middle])
            self._count(name, 1, inputs[middle:], squares[middle:])
        else:
            self._count(name, self.windows[name] % 2, inputs, squares)
        self.windows[name] += 1

    def _count(self, name: str, half: int, inputs: Tensor, squares: Tensor) -> None:
        self.outputs[name][half] += squares.sum(0)
        weights = squares.mean(1)
        if half == 0 and not self.guided:
            weights = torch.ones_like(weights)
        rows = inputs.float() * weights.sqrt()[:, None]
        self.hessians[name][half].addmm_(rows.T, rows)
        self.weights[name][half] += weights.sum()

    def pop(self, name: str) -> Curvature:
        tiny = torch.finfo(torch.float32).tiny
        pairs = zip(self.hessians.pop(name), self.weights[name], strict=True)
        fed_back, cost = (total / weight.clamp(min=tiny) for total, weight in pairs)
        halves = self.outputs.pop(name)
        return Curvature(halves.sum(0) / self.tokens[name], halves, cost, fed_back)


@dataclass(frozen=True)
class EndCurvature:
    """What errors of embedding and head cost: means over tokens.

    `inputs`: squared gradient of the embedding's output by dimension; `frequencies`: share of each token at the input;
    `states`: h_j² of the head's inputs by dimension; `outputs`: p (1 - p) by token, the curvature in its logit.
    """

    inputs: Float[Tensor, " hidden"]
    frequencies: Float[Tensor, " tokens"]
    states: Float[Tensor, " hidden"]
    outputs: Float[Tensor, " tokens"]


class _Ends:
    """Sums for embedding and head, both ends of the model."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        size = model.get_input_embeddings().weight.shape
        self.inputs, self.states = torch.zeros(size[1]), torch.zeros(model.get_output_embeddings().weight.shape[1])
        self.outputs, self.tokens = torch.zeros(model.get_output_embeddings().weight.shape[0]), 0
        self.frequencies = torch.bincount(windows.reshape(-1).cpu(), minlength=size[0]) / windows.numel()

    def hooks(self, model: nn.Module) -> list[Any]:
        def embedded(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: self._add_inputs(gradient.detach()))

        def headed(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].detach().float()
            self.states += states.square().reshape(-1, states.shape[-1]).sum(0).cpu()

        return [
            model.get_input_embeddings().register_forward_hook(embedded),
            model.get_output_embeddings().register_forward_pre_hook(headed),
        ]

    def _add_inputs(self, gradient: Tensor) -> None:
        self.inputs += gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0).cpu()

    def add_logits(self, logits: Float[Tensor, "tokens vocabulary"]) -> None:
        for part in logits.split(256):
            likely = part.softmax(1)
            self.outputs += (likely - likely.square()).sum(0).cpu()
        self.tokens += len(logits)

    def result(self) -> EndCurvature:
        count = max(self.tokens, 1)
        return EndCurvature(self.inputs / count, self.frequencies, self.states / count, self.outputs / count)


def _backward_each(
    model: nn.Module,
    windows: Tensor,
    matrices: Sequence[Matrix],
    device: Any,
    seen: Seen,
    seed: int | None = None,
    ends: _Ends | None = None,
) -> None:
    """One window at a time through the whole model and back; no weight gets a gradient of its own.

    With a `seed` every token is predicted to be one drawn from the model, without it to be the text's.
    """
    home = next(model.parameters()).device
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    hooks += ends.hooks(model) if ends else []
    for matrix in matrices:
        module = model.get_submodule(matrix.name) if matrix.expert is None else None
        if module is not None and linear_shape(module) is not None:
            hooks.append(module.register_forward_hook(_watching(matrix.name, seen)))
    draws = None if seed is None else torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad():
            for window in windows:
                ids = window[None].to(device)
                logits = model(input_ids=ids, use_cache=False).logits[0].float()
                if ends:
                    ends.add_logits(logits.detach())
                logits, targets = (logits[:-1], ids[0, 1:]) if draws is None else (logits, _drawn(logits, draws))
                torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.to(home)


def _drawn(logits: Float[Tensor, "tokens vocabulary"], draws: torch.Generator) -> Int[Tensor, " tokens"]:
    """A token for each row by its probabilities; the same on every device, up to rounding."""
    uniform = torch.rand(len(logits), 1, generator=draws).to(logits.device)
    cumulative = logits.detach().softmax(1).cumsum(1)
    places = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return places[:, 0].clamp(max=logits.shape[1] - 1)


def _watching(name: str, seen: Seen) -> Callable[..., None]:
    """A forward hook that waits for the gradient of the module's output."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        output.register_hook(lambda gradient: seen(name, rows, gradient.detach().reshape(len(rows), -1)))

    return hook
