"""Block-wise tuning: one decoder block after the other learns to answer as the original's does.

original    x0 ─▶ block 0 ─▶ x1 ─▶ block 1 ─▶ …      targets: these states, or the original block's answer to
compressed  x0'─▶ tuned 0 ─▶ x1'─▶ tuned 1 ─▶ …      the compressed stream's states

Both models lie on the CPU and one block at a time is on the device. The error is relative, token by token: what follows
a block is a norm, so that a token with huge states would otherwise drown all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.artifact import read_kept, save_tensors
from reallm.errors import SourceError
from reallm.model.pieces import decoder_blocks
from reallm.model.stream import Stream
from reallm.tune.data import drawn
from reallm.tune.descent import Descent, Diverged, restore, snapshot
from reallm.tune.log import Log
from reallm.tune.losses import computing
from reallm.tune.processes import Processes
from reallm.tune.settings import COMPRESSED, Settings
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
    mine = torch.cat([workers.share(batch) for batch in training.split(settings.batch)])
    batch = settings.batch // workers.count
    learning = _Pair(original, trainables.model, mine, batch, settings)
    checking = _Pair(original, trainables.model, validation, settings.batch, settings)
    for number, block in enumerate(learning.ours.blocks):
        parameters = trainables.within(block)
        file = work / f"block-{number:05d}.safetensors"
        targets, goals = learning.targets(), checking.targets()
        if file.is_file():
            restore(parameters, read_kept(file, parameters))
        elif parameters:
            _tune_block(_Block(number, parameters, learning, targets, checking, goals), settings, workers, log)
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


class _Pair:
    """The same windows on their way through the original and the compressed model."""

    def __init__(self, original: nn.Module, ours: nn.Module, windows: Tensor, batch: int, settings: Settings) -> None:
        self.theirs = Stream(original, windows, settings.device, batch)
        self.ours = Stream(ours, windows, settings.device, batch)
        self.on_compressed = settings.target == COMPRESSED

    def targets(self) -> list[Float[Tensor, "batch context hidden"]]:
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
class _Block:
    """A block to tune, its inputs (in the streams) and what it should answer."""

    number: int
    parameters: dict[str, nn.Parameter]
    learning: _Pair
    targets: Sequence[Tensor]
    checking: _Pair
    goals: Sequence[Tensor]

    def errors(self, pair: _Pair, targets: Sequence[Tensor], order: Sequence[int], dtype: torch.dtype) -> Iterator:
        """Mean relative squared error of each batch named, with its gradient."""
        stream = pair.ours
        block = stream.blocks[stream.position]
        for number in order:
            with computing(stream.device, dtype):
                answer = stream.through(block, stream.states[number]).float()
            yield relative_error(answer, targets[number].to(stream.device).float())

    def validated(self, dtype: torch.dtype) -> float:
        """The error on the validation windows."""
        with torch.no_grad():
            errors = self.errors(self.checking, self.goals, range(len(self.goals)), dtype)
            sizes = [len(goal) for goal in self.goals]
            return sum(e.item() * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)


def relative_error(
    answer: Float[Tensor, "batch context hidden"], target: Float[Tensor, "batch context hidden"]
) -> Float[Tensor, ""]:
    """Squared error of each token relative to the target's size, the mean over tokens."""
    size = target.square().mean(-1).clamp(min=1e-12)
    return ((answer - target).square().mean(-1) / size).mean()


def _tune_block(block: _Block, settings: Settings, workers: Processes, log: Log) -> None:
    """Train until the epochs are over or validation no longer falls; the best parameters stay."""
    dtype, batches = settings.compute_dtype, len(block.targets)
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
    for error in block.errors(block.learning, block.targets, order, dtype):
        (error / workers.count).backward()
        descent.step()
        total += error.item()
    total = total.to(block.learning.ours.device)
    workers.add_up([total])
    return total.item() / len(order) / workers.count
