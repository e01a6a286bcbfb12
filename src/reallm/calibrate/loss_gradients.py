"""Gradients of the end-to-end loss by the outputs of matrices and blocks, in the original model on a text."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reallm.calibrate.block_loader import decoder_blocks
from reallm.errors import SourceError
from reallm.kernels import average
from reallm.source.walk import Matrix, linear_shape

OnProgress = Callable[[int, int], None]  # (windows done, windows in total)
# (module path, inputs (tokens, in), gradients of the outputs (tokens, out)) of one window
GradientSink = Callable[[str, Float[Tensor, "tokens in"], Float[Tensor, "tokens out"]], None]


@dataclass(frozen=True)
class Guidance:
    """Mean squared gradients of the end-to-end loss by a module's outputs, per token and per channel, of mean 1."""

    tokens: Float[Tensor, "windows context"]
    rows: Float[Tensor, " out"]


def guidance(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    matrices: Sequence[Matrix],
    device: str | torch.device,
    on_progress: OnProgress | None = None,
) -> dict[str, Guidance]:
    """Return the importance of each token and each output channel of each module: squared gradients of the loss.

    XᵀX weighted by `tokens` is the end-to-end-loss-guided Hessian of GuidedQuant (Kim et al., arXiv:2505.07004), with
    all output channels in one group. Omitted are modules without a gradient in some window (the indexer of sparse
    attention passes none on), modules that get other tokens than the window's (experts), and modules whose gradients
    are not finite.
    Errors: SourceError for a model whose logits are not finite.
    """
    squares = _SquareSums()
    _backward_each(model, windows, _linears(model, matrices), device, squares.add, on_progress=on_progress)
    found: dict[str, Guidance] = {}
    for name, parts in squares.tokens.items():
        if len(parts) != len(windows) or any(len(part) != windows.shape[1] for part in parts):
            continue
        weight, rows = torch.stack(parts), squares.rows[name].cpu()
        if _is_usable(average(weight)) and _is_usable(average(rows)):
            found[name] = Guidance(weight / average(weight), rows / average(rows))
    return found


def block_gradients(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    loss_mask: Bool[Tensor, "windows context"],
    device: str | torch.device,
    draws: Iterable[torch.Generator],
    on_result: Callable[[int, Float[Tensor, "blocks context hidden"]], None],
) -> None:
    """Compute the gradients of the end-to-end loss by the output hidden states of every block, window by window.

    `on_result` gets the window's number and its gradients, in float32 on the device; zeros where none arrive. Targets
    are sampled from the model, for each window by its own generator in `draws`, at the tokens where `loss_mask` is
    true. So an error d of a token's states costs ½ (g · d)² nats of KL divergence to the model, to second order, in the
    mean over draws, and under the assumption that errors of tokens are independent (see `curvatures`).
    The whole model and the activations of one window must fit on the device.
    Gradients that are not finite are replaced by zeros.
    Errors: SourceError for a model without a list of decoder blocks, or whose logits are not finite.
    """
    blocks = {str(number): block for number, block in enumerate(decoder_blocks(model))}
    sink: dict[str, Tensor] = {}

    def keep(name: str, inputs: Tensor, gradients: Tensor) -> None:
        sink[name] = gradients.float().nan_to_num(0.0, 0.0, 0.0)

    def on_progress(done: int, _: int) -> None:
        size = windows.shape[1], model.config.get_text_config(decoder=True).hidden_size
        nothing = torch.zeros(size, device=device)
        on_result(done - 1, torch.stack([sink.get(name, nothing) for name in blocks]))
        sink.clear()

    _backward_each(model, windows, blocks, device, keep, draws, on_progress=on_progress, loss_mask=loss_mask)


class _SquareSums:
    """Squared gradients by module: means over channels per token, one tensor per window, and sums over tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[Tensor]] = {}
        self.rows: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        squares = gradients.float().square()
        self.tokens.setdefault(name, []).append(squares.mean(1).cpu())
        self.rows[name] = self.rows[name] + squares.sum(0) if name in self.rows else squares.sum(0)


@dataclass(frozen=True)
class Curvature:
    """Second derivatives of the end-to-end loss by a matrix, inputs apart from outputs (K-FAC, arXiv:1503.05671).

    An error D of the weights costs about ½ Σ_i outputs_i · (D H Dᵀ)_ii nats per token, with H = `hessian`, in which
    tokens count by their gradients (GuidedQuant, arXiv:2505.07004).
    """

    outputs: Float[Tensor, " out"]  # mean over tokens of the squared gradient of the log-likelihood
    halves: Float[Tensor, "2 out"]  # row 0: windows of `feedback_hessian`, row 1: of `hessian`; sums, not means
    hessian: Float[Tensor, "in in"]  # Σ w x xᵀ / Σ w, w the token's mean squared gradient; float32
    # The Hessian available to a fit: from the other windows, w = 1 unless fits are guided too.
    feedback_hessian: Float[Tensor, "in in"]


def curvatures(
    model: nn.Module,
    windows: Int[Tensor, "windows context"],
    matrices: Sequence[Matrix],
    device: str | torch.device,
    on_result: Callable[[str, Curvature], None],
    seed: int = 0,
    guided: bool = False,
    on_progress: OnProgress | None = None,
) -> EmbeddingHeadCurvature:
    """Compute the curvature of each module in a pass of the original model over the windows; call `on_result` for each.

    Targets are sampled from the model's own distribution: then mean squared gradients are the second derivatives of
    the KL divergence to the original. `guided`: fits weight tokens by gradients.
    Modules without a gradient, or whose gradients are not finite, are omitted. If the sums would take more than
    _MAX_SUMS_BYTES, several passes are run.
    Errors: SourceError for a model whose logits are not finite.
    """
    embedding_head = _EmbeddingHeadSums(model, windows)
    parts, count = _split_by_memory(matrices), len(windows)
    for number, part in enumerate(parts):

        def report_progress(done: int, _: int, before: int = number * count) -> None:
            if on_progress:
                on_progress(before + done, count * len(parts))

        sums = _CurvatureSums(guided, len(windows) == 1)
        draws = itertools.repeat(torch.Generator().manual_seed(seed))
        _backward_each(
            model,
            windows,
            _linears(model, part),
            device,
            sums.add,
            draws,
            None if number else embedding_head,
            report_progress,
        )
        for name in list(sums.hessians):
            if (curvature := sums.pop(name)) is not None:
                on_result(name, curvature)
    return embedding_head.result()


# Most bytes of second moments in memory: a 135M model needs 1 GB in total, a 7B model takes several passes.
_MAX_SUMS_BYTES = 8_000_000_000


def _split_by_memory(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    parts: list[list[Matrix]] = [[]]
    size = 0
    for matrix in matrices:
        size += 8 * matrix.shape[1] ** 2
        if size > _MAX_SUMS_BYTES and parts[-1]:
            parts.append([])
            size = 8 * matrix.shape[1] ** 2
        parts[-1].append(matrix)
    return parts


class _CurvatureSums:
    """Sums over tokens of one pass: even windows give the Hessian available to fits, odd ones the cost of errors."""

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
        _add_lower(self.hessians[name][half], rows)
        self.weights[name][half] += weights.sum()

    def pop(self, name: str) -> Curvature | None:
        """Remove and return a module's curvature; None if half of the windows has no finite gradient."""
        hessians, halves = self.hessians.pop(name), self.outputs.pop(name)
        weights = self.weights.pop(name)
        if not all(map(_is_usable, [*weights, *halves.sum(1)])):
            return None
        feedback_hessian, cost = (_symmetric(total) / weight for total, weight in zip(hessians, weights, strict=True))
        return Curvature(halves.sum(0) / self.tokens[name], halves, cost, feedback_hessian)


def _is_usable(mean: Float[Tensor, ""]) -> bool:
    """Whether non-negative weights with this mean can be used: not all 0, not NaN, not infinite."""
    return 0 < mean.item() < math.inf


def _add_lower(total: Float[Tensor, "in in"], rows: Float[Tensor, "tokens in"]) -> None:
    """Add the lower triangle of rowsᵀ · rows, panel by panel, in five eighths of the time of the whole product."""
    width = max(_LEAST_PANEL, 16 * math.ceil(len(total) / 64))
    for start in range(0, len(total), width):
        panel = slice(start, start + width)
        total[start:, panel].addmm_(rows[:, start:].T, rows[:, panel])


_LEAST_PANEL = 192  # columns; narrower products are no faster


def _symmetric(lower: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return the symmetric matrix of a lower triangle."""
    lower = lower.tril()
    return lower + lower.tril(-1).T


@dataclass(frozen=True)
class EmbeddingHeadCurvature:
    """Curvature of the end-to-end loss by embedding and lm_head: means over tokens.

    `inputs`: squared gradient of the embedding's output per dimension; `frequencies`: share of each token in the text;
    `states`: h_j² of the inputs of lm_head per dimension; `outputs`: p (1 - p) per token, the curvature of its logit.
    """

    inputs: Float[Tensor, " hidden"]
    frequencies: Float[Tensor, " tokens"]
    states: Float[Tensor, " hidden"]
    outputs: Float[Tensor, " tokens"]


class _EmbeddingHeadSums:
    """Sums over tokens for embedding and lm_head."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        size = model.get_input_embeddings().weight.shape
        self.inputs, self.states = torch.zeros(size[1]), torch.zeros(model.get_output_embeddings().weight.shape[1])
        self.outputs, self.tokens = torch.zeros(model.get_output_embeddings().weight.shape[0]), 0
        self.frequencies = torch.bincount(windows.reshape(-1).cpu(), minlength=size[0]) / windows.numel()

    def hooks(self, model: nn.Module) -> list[Any]:
        def embedding_hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: self._add_inputs(gradient.detach()))

        def head_hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].detach().float()
            self.states += states.square().reshape(-1, states.shape[-1]).sum(0).cpu()

        return [
            model.get_input_embeddings().register_forward_hook(embedding_hook),
            model.get_output_embeddings().register_forward_pre_hook(head_hook),
        ]

    def _add_inputs(self, gradient: Tensor) -> None:
        self.inputs += gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0).cpu()

    def add_probabilities(self, probabilities: Float[Tensor, "tokens vocabulary"]) -> None:
        """Add the predicted probabilities at some positions."""
        self.outputs += (probabilities.sum(0) - probabilities.square().sum(0)).cpu()
        self.tokens += len(probabilities)

    def result(self) -> EmbeddingHeadCurvature:
        count = max(self.tokens, 1)
        return EmbeddingHeadCurvature(self.inputs / count, self.frequencies, self.states / count, self.outputs / count)


def _linears(model: nn.Module, matrices: Sequence[Matrix]) -> dict[str, nn.Module]:
    """Return the linear modules among those of the matrices, by path."""
    modules = {matrix.name: model.get_submodule(matrix.name) for matrix in matrices if matrix.expert is None}
    return {name: module for name, module in modules.items() if linear_shape(module) is not None}


def _backward_each(
    model: nn.Module,
    windows: Tensor,
    modules: dict[str, nn.Module],
    device: Any,
    sink: GradientSink,
    draws: Iterable[torch.Generator] | None = None,
    embedding_head: _EmbeddingHeadSums | None = None,
    on_progress: OnProgress | None = None,
    loss_mask: Bool[Tensor, "windows context"] | None = None,
) -> None:
    """Run the whole model forwards and backwards on one window at a time; no parameter gets a gradient.

    With `draws`, one generator per window, targets are sampled from the model, otherwise they are the text's tokens.
    With `loss_mask` only the tokens where it is true are predicted.
    Errors: SourceError for a model without gradients, or whose logits are not finite.
    """
    home = next(model.parameters()).device
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    hooks += embedding_head.hooks(model) if embedding_head else []
    hooks += [module.register_forward_hook(_gradient_hook(name, sink)) for name, module in modules.items()]
    try:
        with torch.enable_grad(), fast_products(device):
            pairs = zip(windows, itertools.repeat(None) if draws is None else draws, strict=False)
            for number, (window, draw) in enumerate(pairs, start=1):
                ids = window[None].to(device)
                own_mask = None if loss_mask is None else loss_mask[number - 1].to(device)
                logits = model(input_ids=ids, use_cache=False).logits
                if not logits.requires_grad:
                    raise SourceError(
                        f"{type(model).__name__} passes no gradient on; use --objective outputs, and no budget"
                    )
                logits.backward(_logit_gradient(logits.detach()[0], ids[0], draw, embedding_head, own_mask)[None])
                if on_progress:
                    on_progress(number, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.to(home)


# Rows of logits at a time: 50 MB of float32 for a vocabulary of 49,152.
_ROWS = 256


def _logit_gradient(
    logits: Float[Tensor, "tokens vocabulary"],
    ids: Int[Tensor, " tokens"],
    draw: torch.Generator | None,
    embedding_head: _EmbeddingHeadSums | None,
    loss_mask: Bool[Tensor, " tokens"] | None,
) -> Float[Tensor, "tokens vocabulary"]:
    """Return the gradient of the negative log-likelihood by the logits: probabilities, minus 1 at the target.

    One softmax serves the gradient, the sampling and the sums for embedding and lm_head.
    Errors: SourceError for logits that are not finite.
    """
    rows = torch.arange(len(ids), device=ids.device)
    if loss_mask is not None:
        rows = rows[:-1][loss_mask[1:]]
    elif draw is None:
        rows = rows[:-1]
    uniform = None if draw is None else torch.rand(len(rows), 1, generator=draw).to(ids.device)
    gradient = torch.zeros_like(logits)
    for start in range(0, len(rows), _ROWS):
        own = rows[start : start + _ROWS]
        probabilities = logits[own].float().softmax(1)
        if not torch.isfinite(probabilities.sum()):
            raise SourceError(
                f"the original model's logits are NaN or infinite in {logits.dtype} on this text: it is damaged, or "
                "its activations overflow; compress without --calibration, fine-tune with --block-error outputs"
            )
        if embedding_head:
            embedding_head.add_probabilities(probabilities)
        targets = ids[own + 1] if uniform is None else _sample_targets(probabilities, uniform[start : start + _ROWS])
        probabilities.scatter_add_(1, targets[:, None], probabilities.new_full((len(own), 1), -1.0))
        gradient[own] = probabilities.to(gradient.dtype)
    return gradient


_CHUNK = 256  # probabilities per partial sum of the inverse-CDF search


def _sample_targets(
    probabilities: Float[Tensor, "tokens vocabulary"], uniform: Float[Tensor, "tokens 1"]
) -> Int[Tensor, " tokens"]:
    """Sample a token for each row by inverse CDF; the result is the same on every device, up to rounding.

    Search sums of `_CHUNK` probabilities first: cumulative sums of a whole vocabulary took a twentieth of a pass.
    """
    parts = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % _CHUNK)).view(len(probabilities), -1, _CHUNK)
    sums = parts.sum(2).cumsum(1)
    aim = uniform * sums[:, -1:]
    part = torch.searchsorted(sums, aim).clamp(max=sums.shape[1] - 1)
    before = torch.where(part > 0, sums.gather(1, (part - 1).clamp(min=0)), 0.0)
    inside = parts.gather(1, part[:, :, None].expand(-1, -1, _CHUNK))[:, 0].cumsum(1)
    place = torch.searchsorted(inside, aim - before).clamp(max=_CHUNK - 1)
    return (part * _CHUNK + place)[:, 0].clamp(max=probabilities.shape[1] - 1)


@contextlib.contextmanager
def fast_products(device: str | torch.device) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on a CPU inside the context, in bfloat16 if the processor has AMX.

    Without AMX products stay float32, 2.2 times as fast as by the BLAS on a non-Intel processor with AVX-512
    (240 against 107 GFLOPS per thread). On a GPU nothing changes.
    """
    if torch.device(device).type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gradient_hook(name: str, sink: GradientSink) -> Callable[..., None]:
    """Return a forward hook that passes the gradient of the output (a tuple's first item), if any, to `sink`."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        if not inputs or not states.requires_grad:
            return
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        states.register_hook(lambda gradient: sink(name, rows, gradient.detach().reshape(len(rows), -1)))

    return hook
