"""Block-wise tuning: one decoder block after the other learns to answer as the original's does.

original    x0 ─▶ block 0 ─▶ x1 ─▶ block 1 ─▶ …      targets: these states, or the original block's answer to
compressed  x0'─▶ tuned 0 ─▶ x1'─▶ tuned 1 ─▶ …      the compressed stream's states

Both models lie on the CPU and one block at a time is on the device. What an error of a block's output costs:

loss     Σ_t w_t Σ_c r_c (answer - target)² / Σ_t w_t Σ_c r_c target², with w and r the squared gradients of the
         original's end loss by token and by channel. Fits that the end loss guided have put their errors where w and r
         are small; an error that counts all channels alike would have these taken back. Before the first block the
         original goes to the device as a whole, for a pass over the windows and back.
outputs  Σ_c (answer - target)² / Σ_c target², the mean over tokens: what follows a block is a norm, so that a token
         with huge states would otherwise drown all others. With w it does not: its gradients are as small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.artifact import read_kept, save_tensors
from reallm.errors import SourceError
from reallm.model.gradients import Guidance, block_guidance
from reallm.model.pieces import decoder_blocks
from reallm.model.stream import Stream
from reallm.tune.data import drawn
from reallm.tune.descent import Descent, Diverged, restore, snapshot
from reallm.tune.log import Log
from reallm.tune.losses import computing
from reallm.tune.processes import Processes
from reallm.tune.settings import COMPRESSED, OUTPUTS, Settings
from reallm.tune.trainables import Trainables


def tune_blocks(
    original: nn.Module,
    trainables: Trainables,
    training: Int[Tensor, "windows context"],
    validation: Int[Tensor, "checked context"],
    settings: Settings,
    work: Path,
    workers: Processes,
    log: Log,
) -> None:
    """Tune every block in turn; those whose file is in the work folder already are taken over.

    `training` windows fill whole batches, of which this process takes its share; validation it scores alone.
    Errors: SourceError if the two models have other blocks.
    """
    check_blocks(original, trainables.model)
    numbers = torch.cat([workers.share(batch) for batch in torch.arange(len(training)).split(settings.batch)])
    batch = settings.batch // workers.count
    learning = _Pair(original, trainables.model, training[numbers], batch, settings)
    checking = _Pair(original, trainables.model, validation, settings.batch, settings)
    guided, judged = _guidance(original, training, numbers, validation, settings, workers)
    for number, block in enumerate(learning.ours.blocks):
        parameters = trainables.within(block)
        file = work / f"block-{number:05d}.safetensors"
        # All processes have all windows to validate.
        goals, checks = learning.goals(guided[number], workers), checking.goals(judged[number], Processes())
        if file.is_file():
            restore(parameters, read_kept(file, parameters))
        elif parameters:
            _tune_block(_Block(number, parameters, learning, goals, checking, checks), settings, workers, log)
            if workers.first:
                save_tensors(snapshot(parameters), file)
            workers.wait()
        learning.advance()
        checking.advance()


def check_blocks(original: nn.Module, compressed: nn.Module) -> None:
    """Errors: SourceError unless both have as many blocks of the same width."""
    counts = [len(decoder_blocks(model)) for model in (original, compressed)]
    widths = [model.config.get_text_config(decoder=True).hidden_size for model in (original, compressed)]
    if counts[0] != counts[1] or widths[0] != widths[1]:
        raise SourceError(
            f"the original has {counts[0]} blocks of width {widths[0]}, the compressed model {counts[1]} of "
            f"{widths[1]}: block-wise tuning needs the model it was made of"
        )


def _guidance(
    original: nn.Module, training: Tensor, numbers: Tensor, validation: Tensor, settings: Settings, workers: Processes
) -> tuple[Sequence[Guidance | None], Sequence[Guidance | None]]:
    """What the end loss says of every block's output: on this process's windows, the `numbers` of `training`, and
    on those to validate; None for each block where it is not asked.

    Tokens to validate weigh by gradients of their own, as else one with huge states would decide; channels as in
    training, so that validation judges what training lowers.
    """
    if settings.block_error == OUTPUTS:
        nothing = [None] * len(decoder_blocks(original))
        return nothing, nothing

    def draws(windows: Sequence[int]) -> Iterator[torch.Generator]:
        """By a window's number, so that its draws are the same in whichever process."""
        return (torch.Generator().manual_seed(settings.seed * 1_000_003 + number) for number in windows)

    guided = block_guidance(
        original, training[numbers], settings.device, draws(numbers.tolist()), workers.add_up, settings.block_error
    )
    after = range(len(training), len(training) + len(validation))
    judged = block_guidance(original, validation, settings.device, draws(after), kind=settings.block_error)
    return guided, [
        Guidance(own.tokens, block.rows, block.directions, own.gradients)
        for own, block in zip(judged, guided, strict=True)
    ]


class _Pair:
    """The same windows on their way through the original and the compressed model."""

    def __init__(self, original: nn.Module, ours: nn.Module, windows: Tensor, batch: int, settings: Settings) -> None:
        self.theirs = Stream(original, windows, settings.device, batch)
        self.ours = Stream(ours, windows, settings.device, batch)
        self.on_compressed = settings.target == COMPRESSED

    def goals(self, guidance: Guidance | None, workers: Processes) -> _Goals:
        """What the present block should put out, and what errors cost; the original's states are carried on."""
        targets = self._targets()
        if guidance is None:
            return _Goals(targets)
        tokens = guidance.tokens.split([len(target) for target in targets])
        channels = guidance.rows if guidance.directions is None else guidance.directions
        drawn = () if guidance.gradients is None else guidance.gradients.split([len(target) for target in targets])
        goals = _Goals(targets, tokens, channels.to(self.ours.device), gradients=drawn)
        return replace(goals, size=goals.mean_size(self.ours.device, workers))

    def _targets(self) -> list[Float[Tensor, "batch context hidden"]]:
        """What the present block should put out, batch by batch; the original's states are carried on."""
        found = None
        if self.on_compressed:
            block = self.theirs.blocks[self.theirs.position]
            with torch.no_grad(), self.theirs.on_device(block):
                found = [self.theirs.through(block, state).to(state.device) for state in self.ours.states]
        else:
            self.theirs.advance()
            return list(self.theirs.states)
        self.theirs.advance()
        return found

    def advance(self) -> None:
        """Carry the compressed model's states on."""
        self.ours.advance()


@dataclass(frozen=True)
class _Goals:
    """What a block should answer, batch by batch, and what an error costs: with no weights, the same everywhere."""

    targets: Sequence[Float[Tensor, "batch context hidden"]]
    tokens: Sequence[Float[Tensor, "batch context"]] = ()
    channels: Float[Tensor, " hidden"] | Float[Tensor, "hidden hidden"] | None = None
    size: float = 1.0  # the mean over tokens of all windows of w_t times the mean over channels of r_c target²
    gradients: Sequence[Float[Tensor, "batch context hidden"]] = ()

    def error(self, number: int, answer: Float[Tensor, "batch context hidden"]) -> Float[Tensor, ""]:
        """Mean relative squared error of the answer to a batch."""
        target = self.targets[number].to(answer.device).float()
        if self.channels is None:
            return relative_error(answer, target)
        if self.gradients:
            drawn = self.gradients[number].to(answer.device).float()
            return (drawn * (answer - target)).sum(-1).square().mean() / answer.shape[-1] / self.size
        return weighted_square(answer - target, self.tokens[number].to(answer.device), self.channels) / self.size

    def mean_size(self, device: torch.device, workers: Processes) -> float:
        """Targets as `error` weighs errors, over all windows of all processes: batches are measured by one size."""
        assert self.channels is not None
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for target, tokens in zip(self.targets, self.tokens, strict=True):
            mean = weighted_square(target.to(device).float(), tokens.to(device), self.channels)
            total += torch.stack([mean.double() * len(target), mean.new_tensor(len(target), dtype=torch.float64)])
        workers.add_up([total])
        return max((total[0] / total[1]).item(), 1e-12)


@dataclass(frozen=True)
class _Block:
    """A block to tune, its inputs (in the streams) and what it should answer."""

    number: int
    parameters: dict[str, nn.Parameter]
    learning: _Pair
    goals: _Goals
    checking: _Pair
    checks: _Goals

    def errors(self, pair: _Pair, goals: _Goals, order: Sequence[int], dtype: torch.dtype) -> Iterator:
        """Mean relative squared error of each batch named, with its gradient."""
        stream = pair.ours
        block = stream.blocks[stream.position]
        for number in order:
            with computing(stream.device, dtype):
                answer = stream.through(block, stream.states[number]).float()
            yield goals.error(number, answer)

    def validated(self, dtype: torch.dtype) -> float:
        """The error on the validation windows."""
        with torch.no_grad():
            sizes = [len(target) for target in self.checks.targets]
            errors = self.errors(self.checking, self.checks, range(len(sizes)), dtype)
            return sum(e.item() * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)


def relative_error(
    answer: Float[Tensor, "batch context hidden"], target: Float[Tensor, "batch context hidden"]
) -> Float[Tensor, ""]:
    """Squared error of each token relative to the target's size, the mean over tokens."""
    size = target.square().mean(-1).clamp(min=1e-12)
    return ((answer - target).square().mean(-1) / size).mean()


def weighted_square(
    states: Float[Tensor, "batch context hidden"],
    tokens: Float[Tensor, "batch context"],
    channels: Float[Tensor, " hidden"] | Float[Tensor, "hidden hidden"],
) -> Float[Tensor, ""]:
    """Squares of states weighted by token and by channel, the mean over both."""
    if channels.ndim == 2:
        return (((states @ channels) * states).mean(-1) * tokens).mean()
    return ((states.square() * channels).mean(-1) * tokens).mean()


def _tune_block(block: _Block, settings: Settings, workers: Processes, log: Log) -> None:
    """Train until the epochs are over or validation no longer falls; the best parameters stay."""
    dtype, batches = settings.compute_dtype, len(block.goals.targets)
    stream = block.learning.ours
    with stream.on_device(stream.blocks[stream.position]):
        descent = Descent(
            block.parameters,
            settings.block_epochs * batches,
            settings.block_learning_rate,
            settings.warm_up,
            settings.clip,
            workers,
        )
        best, least = snapshot(block.parameters), block.validated(dtype)
        log.add(phase="block", block=block.number, epoch=0, validation=least)
        bad = 0
        for epoch in range(settings.block_epochs):
            try:
                trained = _epoch(block, descent, drawn(batches, batches, epoch, settings.seed).tolist(), dtype, workers)
            except Diverged:
                log.add(phase="block", block=block.number, epoch=epoch + 1, stopped="not finite")
                break
            error = block.validated(dtype)
            log.add(phase="block", block=block.number, epoch=epoch + 1, loss=trained, validation=error)
            if error < least:
                best, least, bad = snapshot(block.parameters), error, 0
            else:
                bad += 1
            if bad > settings.block_patience or not math.isfinite(error):
                break
        restore(block.parameters, best)


def _epoch(block: _Block, descent: Descent, order: Sequence[int], dtype: torch.dtype, workers: Processes) -> float:
    """One step a batch; the mean error, over all processes."""
    total = torch.zeros(1, dtype=torch.float64)
    for error in block.errors(block.learning, block.goals, order, dtype):
        (error / workers.count).backward()
        descent.step()
        total += error.item()
    total = total.to(block.learning.ours.device)
    workers.add_up([total])
    return total.item() / len(order) / workers.count
