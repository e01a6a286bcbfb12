"""Block-wise tuning: one decoder block after the other learns to answer as the original's does.

compressed  x0'─▶ tuned 0 ─▶ x1'─▶ tuned 1 ─▶ …      target: the original block's output on the hidden states x' that
                                                     the compressed blocks before it put out

Of the original one block at a time is in memory. What an error d of a token's states costs:

loss     ½ (g · d)² nats, g the gradient of the original's end-to-end loss (see `calibrate/loss_gradients.py`): what the end-to-end loss does
         not see costs nothing. Before the first block the original is in memory as a whole, for a pass over the
         windows and back; what it finds lies on disk until the blocks are done.
outputs  |d|² / |target|², the mean over tokens: what follows a block is a norm, so that a token with huge states
         would otherwise drown all others.

The original's output on its own hidden states, as a target, makes a block undo the errors of those before it: at 2 bits
that is worse than no fine-tuning, with either error (docs/experiments/block-wise-errors-per-token.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reallm.calibrate.block_loader import BlockLoader
from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.calibrate.loss_gradients import block_gradients
from reallm.checkpoint import read_work_tensors, save_tensors
from reallm.errors import SourceError
from reallm.source import Source
from reallm.source.decoder_blocks import decoder_blocks
from reallm.tuning.data import Windows, draw_batch
from reallm.tuning.distributed import ProcessGroup
from reallm.tuning.gradient_files import Gradients, check_disk_space
from reallm.tuning.log import Log, Throughput
from reallm.tuning.losses import autocast_to_dtype
from reallm.tuning.optimizer import Diverged, Optimizer, restore, snapshot
from reallm.tuning.trainables import Trainables
from reallm.tuning.tune_settings import END_LOSS, Settings


def tune_blocks(
    source: Source,
    trainables: Trainables,
    training: Windows,
    validation: Windows,
    settings: Settings,
    work: Path,
    workers: ProcessGroup,
    log: Log,
) -> None:
    """Tune every block in turn; those whose file is in the work folder already are taken over.

    `training` windows fill whole batches, of which this process takes its share; validation it scores alone.
    Blocks that the model passes over on text stay as they are.
    Errors: SourceError if the two models have other blocks or theirs cannot be run one by one, RecipeError for a disk
    without room for the gradients.
    """
    block_loader = BlockLoader(source, torch.float32)
    check_blocks(block_loader.model, trainables.model)
    blocks = decoder_blocks(trainables.model)
    files = [work / f"block-{number:05d}.safetensors" for number in range(len(blocks))]
    left = [n for n, block in enumerate(blocks) if trainables.module_parameters(block) and not files[n].is_file()]
    learned, checked = _shards(training, validation, settings, work, workers)
    if settings.block_error == END_LOSS and left:
        # Hours of gradients end in no refusal: eight tokens go through the blocks before.
        _HiddenStates(trainables.model, dataclasses.replace(learned, windows=_beginning(learned.windows)), settings)
        _compute_gradients(source, (learned, checked), settings, workers, log)
    training_states, validation_states = (
        _HiddenStates(trainables.model, shard, settings) for shard in (learned, checked)
    )
    throughput = Throughput(len(left), 0, 0)
    for number, block in enumerate(blocks):
        parameters = trainables.module_parameters(block) if training_pair.student.is_reached else {}
        # The original's own states have to pass each block, the compressed model's only those that are tuned.
        tuned = number in left and training_pair.student.is_reached
        if tuned or settings.target != COMPRESSED:
            with _loaded_block(block_loader, number) as original:
                block_targets, checks = (
                    training_states.block_targets(number, original),
                    validation_states.block_targets(number, original),
                )
            seconds = throughput.rates(left.index(number))["eta_seconds"]
            present = _Block(number, parameters, training_states, block_targets, validation_states, checks, seconds)
            _tune_block(present, settings, workers, log)
            if workers.is_main_process:
                save_tensors(snapshot(parameters), files[number])
            workers.barrier()
        elif parameters:
            restore(parameters, read_work_tensors(files[number], parameters))
        training_states.student.advance()
        validation_states.student.advance()
    for shard in (learned, checked):
        shard.gradients.remove()


def check_blocks(original: nn.Module, compressed: nn.Module) -> None:
    """Errors: SourceError unless both have as many blocks of the same width."""
    counts = [len(decoder_blocks(model)) for model in (original, compressed)]
    widths = [_width(model) for model in (original, compressed)]
    if counts[0] != counts[1] or widths[0] != widths[1]:
        raise SourceError(
            f"the original has {counts[0]} blocks of width {widths[0]}, the compressed model {counts[1]} of "
            f"{widths[1]}: block-wise tuning needs the model it was made of"
        )


def _width(model: nn.Module) -> int:
    return model.config.get_text_config(decoder=True).hidden_size


@dataclass(frozen=True)
class _Shard:
    """Windows that this process learns from or validates on, so many at once."""

    windows: Windows
    numbers: Sequence[int]  # by which their draws go: the same in whichever process has a window
    batch: int
    gradients: Gradients


def _shards(
    training: Windows, validation: Windows, settings: Settings, work: Path, workers: ProcessGroup
) -> tuple[_Shard, _Shard]:
    """(training, validation): all processes have all windows to validate."""
    batches = torch.arange(len(training.ids)).split(settings.batch)
    learned = torch.cat([workers.shard(batch) for batch in batches]).tolist()
    checked = list(range(len(training.ids), len(training.ids) + len(validation.ids)))

    def gradients(numbers: Sequence[int]) -> Gradients:
        return Gradients([work / f"gradients-{workers.rank}-{number:05d}.safetensors" for number in numbers])

    return (
        _Shard(training[torch.tensor(learned)], learned, settings.batch // workers.count, gradients(learned)),
        _Shard(validation, checked, settings.batch, gradients(checked)),
    )


def _beginning(windows: Windows) -> Windows:
    """Eight tokens of a window."""
    return Windows(windows.ids[:1, :8], windows.loss_mask[:1, :8])


def _compute_gradients(
    source: Source, shares: Sequence[_Shard], settings: Settings, workers: ProcessGroup, log: Log
) -> None:
    """Have the gradients of all windows on disk; those that are there already stay."""
    missing_windows = [(shard, number) for shard in shares for number in shard.gradients.missing_windows()]
    if not missing_windows:
        return
    model = source.load(torch.float32, "cpu").eval().requires_grad_(False)
    context = shares[0].windows.ids.shape[1]
    nbytes = Gradients.nbytes(len(missing_windows), len(decoder_blocks(model)), context, _width(model))
    check_disk_space(missing_windows[0][0].gradients.files[0].parent, nbytes * workers.count)
    log.add(phase="gradients", window=0, windows=len(missing_windows), bytes=nbytes)
    throughput = Throughput(len(missing_windows), 0, context)

    def write_gradients(place: int, gradients: Float[Tensor, "blocks context hidden"]) -> None:
        shard, number = missing_windows[place]
        shard.gradients.write(number, gradients)
        if (place + 1) * 20 // len(missing_windows) != place * 20 // len(missing_windows):
            log.add(phase="gradients", window=place + 1, windows=len(missing_windows), **throughput.rates(place + 1))

    ids = torch.stack([shard.windows.ids[number] for shard, number in missing_windows])
    loss_mask = torch.stack([shard.windows.loss_mask[number] for shard, number in missing_windows])
    draws = (
        torch.Generator().manual_seed(settings.seed * 1_000_003 + s.numbers[number]) for s, number in missing_windows
    )
    block_gradients(model, ids, loss_mask, settings.device, draws, write_gradients)


@contextlib.contextmanager
def _loaded_block(block_loader: BlockLoader, number: int) -> Iterator[nn.Module]:
    """A block of the original, in memory in here."""
    block_loader.load_block(number)
    try:
        yield decoder_blocks(block_loader.model)[number]
    finally:
        block_loader.unload_block(number)


class _HiddenStates:
    """Windows on their way through the compressed model, and what the original blocks make of its states."""

    def __init__(self, student: nn.Module, shard: _Shard, settings: Settings) -> None:
        ids, batch = shard.windows.ids, shard.batch
        self.gradients = shard.gradients if settings.block_error == END_LOSS else None
        self.student = HiddenStateCache(student, ids, settings.device, batch)
        if self.gradients is not None and self.student.states[0].ndim != 3:
            shape = tuple(self.student.states[0].shape)
            raise SourceError(
                f"{type(student).__name__}: hidden states of {len(self.student.batches[0])} windows have the shape {shape}, "
                "more than one row per token, whose gradients are not taken; add --block-error outputs"
            )

    def block_targets(self, number: int, original: nn.Module) -> _BlockTargets:
        """What the present block should put out, batch by batch, and what errors cost."""
        with torch.no_grad(), self.student.on_device(original):
            states = enumerate(self.student.states)
            answers = [self.student.forward_block(original, batch).to(state.device) for batch, state in states]
        return _BlockTargets(number, answers, self._sizes, self.gradients)

    @property
    def _sizes(self) -> list[int]:
        return [len(batch) for batch in self.student.batches]


@dataclass(frozen=True)
class _BlockTargets:
    """What a block should answer, batch by batch, and what an error costs."""

    block: int
    targets: Sequence[Float[Tensor, "... hidden"]]  # the last batch may have fewer windows
    sizes: Sequence[int]  # windows of each batch
    gradients: Gradients | None = None

    def error(self, number: int, answer: Float[Tensor, "*states hidden"]) -> Float[Tensor, ""]:
        """Of the answer to a batch: nats per token, or the mean relative squared error."""
        target = self.targets[number].to(answer.device).float()
        if self.gradients is None:
            return relative_error(answer, target)
        first = sum(self.sizes[:number])
        gradients = self.gradients.read(self.block, slice(first, first + self.sizes[number]), answer.device)
        return cost(answer - target, gradients)


@dataclass(frozen=True)
class _Block:
    """A block to tune, its inputs (in the streams) and what it should answer."""

    number: int
    parameters: dict[str, nn.Parameter]
    training_states: _HiddenStates
    block_targets: _BlockTargets
    validation_states: _HiddenStates
    checks: _BlockTargets
    eta_seconds: float  # of this block and those after it

    def errors(
        self, pair: _HiddenStates, block_targets: _BlockTargets, order: Sequence[int], dtype: torch.dtype
    ) -> Iterator:
        """The error of each batch named, with its gradient."""
        stream = pair.student
        block = stream.blocks[stream.position]
        for number in order:
            with autocast_to_dtype(stream.device, dtype):
                answer = stream.forward_block(block, number).float()
            yield block_targets.error(number, answer)

    def validate(self, dtype: torch.dtype) -> float:
        """The error on the validation windows."""
        with torch.no_grad():
            sizes = self.checks.sizes
            errors = self.errors(self.validation_states, self.checks, range(len(sizes)), dtype)
            return sum(e.item() * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)


def relative_error(
    answer: Float[Tensor, "*states hidden"], target: Float[Tensor, "*states hidden"]
) -> Float[Tensor, ""]:
    """Squared error of each token relative to the target's size, the mean over tokens."""
    size = target.square().mean(-1).clamp(min=1e-12)
    return ((answer - target).square().mean(-1) / size).mean()


def cost(
    errors: Float[Tensor, "batch context hidden"], gradients: Float[Tensor, "batch context hidden"]
) -> Float[Tensor, ""]:
    """½ (g · d)² of errors d of tokens' states, the mean over tokens: nats per token, as if tokens erred alone."""
    return (gradients * errors).sum(-1).square().mean() / 2


def _tune_block(block: _Block, settings: Settings, workers: ProcessGroup, log: Log) -> None:
    """Train until the epochs are over or validation no longer falls; the best parameters stay."""
    dtype, batches = settings.compute_dtype, len(block.block_targets.targets)
    stream = block.training_states.student
    tokens = sum(batch.numel() for batch in stream.batches) * workers.count
    measure = {"unit": "relative" if block.block_targets.gradients is None else "nats"}
    with stream.on_device(stream.blocks[stream.position]):
        descent = Optimizer(
            block.parameters,
            settings.block_epochs * batches,
            settings.block_learning_rate,
            settings.warm_up,
            settings.clip,
            workers,
        )
        best, least = snapshot(block.parameters), block.validate(dtype)
        log.add(phase="block", block=block.number, epoch=0, validation=least, **measure, eta_seconds=block.eta_seconds)
        if not math.isfinite(least):
            raise SourceError(
                f"block {block.number}: its error is not finite before the first step; look for NaN or "
                f"infinite weights in the original ({settings.reference}) and in the compressed model"
            )
        bad = 0
        for epoch in range(settings.block_epochs):
            throughput = Throughput(1, 0, tokens)
            try:
                trained = _epoch(
                    block, descent, draw_batch(batches, batches, epoch, settings.seed).tolist(), dtype, workers
                )
            except Diverged:
                log.add(phase="block", block=block.number, epoch=epoch + 1, stopped="not finite")
                break
            speed = {"tokens_per_second": throughput.rates(1)["tokens_per_second"]}
            error = block.validate(dtype)
            log.add(
                phase="block", block=block.number, epoch=epoch + 1, loss=trained, validation=error, **measure, **speed
            )
            if error < least:
                best, least, bad = snapshot(block.parameters), error, 0
            else:
                bad += 1
            if bad > settings.block_patience or not math.isfinite(error):
                break
        restore(block.parameters, best)


def _epoch(block: _Block, descent: Optimizer, order: Sequence[int], dtype: torch.dtype, workers: ProcessGroup) -> float:
    """One step a batch; the mean error, over all processes."""
    total = torch.zeros(1, dtype=torch.float64)
    for error in block.errors(block.training_states, block.block_targets, order, dtype):
        (error / workers.count).backward()
        descent.step()
        total += error.item()
    total = total.to(block.training_states.student.device)
    workers.all_reduce([total])
    return total.item() / len(order) / workers.count
