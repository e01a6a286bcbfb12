"""What the end loss says of a model's matrices and blocks: squared gradients on a text, in the original model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.kernels import average
from reallm.model.pieces import decoder_blocks
from reallm.model.walk import Matrix, linear_shape

Told = Callable[[int, int], None]  # (windows done, of how many)
# (module path, its inputs (tokens, in), gradients of its outputs (tokens, out)) of one window
Seen = Callable[[str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]


@dataclass(frozen=True)
class Guidance:
    """What the end loss says of a module's outputs: mean squared gradients by token and by channel, both of mean 1."""

    tokens: Float[Tensor, "windows context"]
    rows: Float[Tensor, " out"]


def guidance(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    matrices: Sequence[Matrix],
    device: str | torch.device,
    told: Told | None = None,
) -> dict[str, Guidance]:
    """How much each token and each channel of each module's output matters, by the squared gradient of the loss.

    With `tokens` XᵀX becomes the end-loss-guided hessian of GuidedQuant (Kim et al., arXiv:2505.07004), all output
    channels in one group. Modules that no gradient reaches are left out.
    """
    squares = _Squares()
    _backward_each(model, windows, _linears(model, matrices), device, squares.add, told=told)
    weights = {name: torch.stack(parts) for name, parts in squares.tokens.items() if len(parts) == len(windows)}
    return {
        name: Guidance(weight / average(weight), squares.rows[name].cpu() / average(squares.rows[name].cpu()))
        for name, weight in weights.items()
        if average(weight) > 0
    }


def block_guidance(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    device: str | torch.device,
    draws: Iterable[torch.Generator],
    add_up: Callable[[list[Tensor]], None] = lambda _: None,
) -> list[Guidance]:
    """How much each token and each channel of the hidden states that each decoder block puts out matters.

    Tokens to predict are drawn from the model, for each window by a generator of its own in `draws`: so squared
    gradients are the curvature of the KL divergence to the model (see `curvatures`). Where several processes have
    windows, `add_up` makes tensors on the device their sums over all: means are of all windows, channels the same.
    Takes the memory of the whole model on the device, of one window's activations there, and, for each block, a number
    a token and a number a channel. Where no gradient arrives all weigh nothing.
    Errors: SourceError for a model whose blocks cannot be told apart.
    """
    blocks = {str(number): block for number, block in enumerate(decoder_blocks(model))}
    squares = _Squares()
    _backward_each(model, windows, blocks, device, squares.add, draws)
    tiny = torch.finfo(torch.float32).tiny
    found = []
    for name in blocks:
        tokens, rows = torch.stack(squares.tokens[name]), squares.rows[name]
        count = rows.new_tensor([tokens.numel()])
        add_up([rows, count])
        total = average(rows).clamp(min=tiny)
        found.append(Guidance(tokens / (total / count).clamp(min=tiny).cpu(), (rows / total).cpu()))
    return found


class _Squares:
    """Squared gradients by module: the mean over channels of each token, window by window, and sums over tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[Tensor]] = {}
        self.rows: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        squares = gradients.float().square()
        self.tokens.setdefault(name, []).append(squares.mean(1).cpu())
        self.rows[name] = self.rows[name] + squares.sum(0) if name in self.rows else squares.sum(0)


def fisher(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    matrices: Sequence[Matrix],
    device: str | torch.device,
    told: Told | None = None,
) -> dict[str, Float[Tensor, "out in"]]:
    """The diagonal of the Fisher information of every weight, tokens taken as independent: Σ_t g_ti² x_tj², mean 1."""
    found: dict[str, Tensor] = {}

    def seen(name: str, inputs: Tensor, gradients: Tensor) -> None:
        update = gradients.float().square().T @ inputs.float().square()
        found[name] = found[name] + update.cpu() if name in found else update.cpu()

    _backward_each(model, windows, _linears(model, matrices), device, seen, told=told)
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
    told: Told | None = None,
) -> EndCurvature:
    """Curvature of each module, handed to `found` one by one, in a pass of the original model over the windows.

    Tokens to predict are drawn from the model's own distribution: then mean squared gradients are the second
    derivatives of the KL divergence to the original. `guided`: fits weigh tokens by gradients.
    Modules that no gradient reaches are left out. Several passes where the sums of one would take over _SUMS_BYTES.
    """
    ends = _Ends(model, windows)
    parts, count = _parts(matrices), len(windows)
    for number, part in enumerate(parts):

        def passed(done: int, _: int, before: int = number * count) -> None:
            if told:
                told(before + done, count * len(parts))

        sums = _Sums(guided, len(windows) == 1)
        draws = itertools.repeat(torch.Generator().manual_seed(seed))
        _backward_each(model, windows, _linears(model, part), device, sums.add, draws, None if number else ends, passed)
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


def _linears(model: nn.Module, matrices: Sequence[Matrix]) -> dict[str, nn.Module]:
    """The modules of those matrices that are a linear's."""
    modules = {matrix.name: model.get_submodule(matrix.name) for matrix in matrices if matrix.expert is None}
    return {name: module for name, module in modules.items() if linear_shape(module) is not None}


def _backward_each(
    model: nn.Module,
    windows: Tensor,
    modules: dict[str, nn.Module],
    device: Any,
    seen: Seen,
    draws: Iterable[torch.Generator] | None = None,
    ends: _Ends | None = None,
    told: Told | None = None,
) -> None:
    """One window at a time through the whole model and back; no weight gets a gradient of its own.

    With `draws`, one for each window, every token is predicted to be one drawn from the model, without them to be the
    text's.
    """
    home = next(model.parameters()).device
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    hooks += ends.hooks(model) if ends else []
    hooks += [module.register_forward_hook(_watching(name, seen)) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            pairs = zip(windows, itertools.repeat(None) if draws is None else draws, strict=False)
            for number, (window, draw) in enumerate(pairs, start=1):
                ids = window[None].to(device)
                logits = model(input_ids=ids, use_cache=False).logits[0].float()
                if ends:
                    ends.add_logits(logits.detach())
                logits, targets = (logits[:-1], ids[0, 1:]) if draw is None else (logits, _drawn(logits, draw))
                torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
                if told:
                    told(number, len(windows))
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
    """A forward hook that waits for the gradient of the module's output, of a tuple's first."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        states = output if isinstance(output, Tensor) else output[0]
        states.register_hook(lambda gradient: seen(name, rows, gradient.detach().reshape(len(rows), -1)))

    return hook
