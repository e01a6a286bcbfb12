"""Block-wise tuning: train decoder blocks one at a time to reproduce the original block's output.

compressed  x0'─▶ tuned 0 ─▶ x1'─▶ tuned 1 ─▶ …      target: the original block's output on the hidden states x' from
                                                     the compressed blocks before it

One block of the original model is in memory at a time. The cost of an error d in a token's hidden state:

loss     ½ (g · d)² nats, g the gradient of the original model's end-to-end loss (`calibrate/loss_gradients.py`):
         errors that do not change the loss cost nothing. Before the first block, the whole original model is loaded for
         one forward and backward pass over the windows; the gradients stay on disk until the blocks are done.
outputs  |d|² / |target|², the mean over tokens: a norm follows each block, so without the division a token with huge
         states would dominate all others.

The original block's output on its own hidden states, as a target, makes a block undo the errors of the blocks before
it: at 2 bits that is worse than no tuning, with either cost (docs/experiments/block-wise-errors-per-token.md).
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
from reallm.tuning.tune_settings import END_TO_END_LOSS, Settings


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
    """Tune every block in turn; blocks with a file in the work folder are loaded from it.

    `training` windows fill whole batches, and this process takes its shard of each; every process scores all validation
    windows. Blocks that the model skips on text stay unchanged.
    Errors: SourceError if the blocks of the two models differ or cannot run one at a time, RecipeError if the disk
    lacks space for the gradients.
    """
    block_loader = BlockLoader(source, torch.float32)
    check_blocks(block_loader.model, trainables.model)
    blocks = decoder_blocks(trainables.model)
    files = [work / f"block-{number:05d}.safetensors" for number in range(len(blocks))]
    remaining = [n for n, block in enumerate(blocks) if trainables.module_parameters(block) and not files[n].is_file()]
    train_shard, val_shard = _shards(training, validation, settings, work, workers)
    if settings.block_error == END_TO_END_LOSS and remaining:
        # Check with eight tokens that the model can be tuned, before hours of gradients.
        probe = dataclasses.replace(train_shard, windows=_first_tokens(train_shard.windows))
        _HiddenStates(trainables.model, probe, settings)
        _compute_gradients(source, (train_shard, val_shard), settings, workers, log)
    training_states, validation_states = (
        _HiddenStates(trainables.model, shard, settings) for shard in (train_shard, val_shard)
    )
    throughput = Throughput(len(remaining), 0, 0)
    for number, block in enumerate(blocks):
        parameters = trainables.module_parameters(block) if training_states.student.is_reached else {}
        tuned = number in remaining and training_states.student.is_reached
        if tuned:
            with _loaded_block(block_loader, number) as original:
                block_targets, validation_targets = (
                    training_states.block_targets(number, original),
                    validation_states.block_targets(number, original),
                )
            seconds = throughput.rates(remaining.index(number))["eta_seconds"]
            present = _Block(
                number, parameters, training_states, block_targets, validation_states, validation_targets, seconds
            )
            _tune_block(present, settings, workers, log)
            if workers.is_main_process:
                save_tensors(snapshot(parameters), files[number])
            workers.barrier()
        elif parameters:
            restore(parameters, read_work_tensors(files[number], parameters))
        training_states.student.advance()
        validation_states.student.advance()
    for shard in (train_shard, val_shard):
        shard.gradients.remove()


def check_blocks(original: nn.Module, compressed: nn.Module) -> None:
    """Raise SourceError unless both models have the same number of blocks and the same hidden size."""
    counts = [len(decoder_blocks(model)) for model in (original, compressed)]
    widths = [_width(model) for model in (original, compressed)]
    if counts[0] != counts[1] or widths[0] != widths[1]:
        raise SourceError(
            f"the original model has {counts[0]} blocks of width {widths[0]}, the compressed model {counts[1]} of "
            f"width {widths[1]}: block-wise tuning needs the model that was compressed"
        )


def _width(model: nn.Module) -> int:
    return model.config.get_text_config(decoder=True).hidden_size


@dataclass(frozen=True)
class _Shard:
    """Windows that this process trains or validates on, `batch` at a time."""

    windows: Windows
    numbers: Sequence[int]  # seeds of the windows: the same in whichever process has a window
    batch: int
    gradients: Gradients


def _shards(
    training: Windows, validation: Windows, settings: Settings, work: Path, workers: ProcessGroup
) -> tuple[_Shard, _Shard]:
    """Return (training, validation) shards; every process validates on all validation windows."""
    batches = torch.arange(len(training.ids)).split(settings.batch)
    train_rows = torch.cat([workers.shard(batch) for batch in batches]).tolist()
    val_numbers = list(range(len(training.ids), len(training.ids) + len(validation.ids)))

    def gradients(numbers: Sequence[int]) -> Gradients:
        return Gradients([work / f"gradients-{workers.rank}-{number:05d}.safetensors" for number in numbers])

    return (
        _Shard(training[torch.tensor(train_rows)], train_rows, settings.batch // workers.count, gradients(train_rows)),
        _Shard(validation, val_numbers, settings.batch, gradients(val_numbers)),
    )


def _first_tokens(windows: Windows) -> Windows:
    """Return the first eight tokens of one window."""
    return Windows(windows.ids[:1, :8], windows.loss_mask[:1, :8])


def _compute_gradients(
    source: Source, shards: Sequence[_Shard], settings: Settings, workers: ProcessGroup, log: Log
) -> None:
    """Compute the gradients of all windows that have no file yet, and write them to disk."""
    missing_windows = [(shard, number) for shard in shards for number in shard.gradients.missing_windows()]
    if not missing_windows:
        return
    model = source.load(torch.float32, "cpu").eval().requires_grad_(False)
    context = shards[0].windows.ids.shape[1]
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
    generators = (
        torch.Generator().manual_seed(settings.seed * 1_000_003 + s.numbers[number]) for s, number in missing_windows
    )
    block_gradients(model, ids, loss_mask, settings.device, generators, write_gradients)


@contextlib.contextmanager
def _loaded_block(block_loader: BlockLoader, number: int) -> Iterator[nn.Module]:
    """Load a block of the original model for the duration of the context."""
    block_loader.load_block(number)
    try:
        yield decoder_blocks(block_loader.model)[number]
    finally:
        block_loader.unload_block(number)


class _HiddenStates:
    """Hidden states of windows in the compressed model, and what the original blocks make of them."""

    def __init__(self, student: nn.Module, shard: _Shard, settings: Settings) -> None:
        ids, batch = shard.windows.ids, shard.batch
        self.gradients = shard.gradients if settings.block_error == END_TO_END_LOSS else None
        self.student = HiddenStateCache(student, ids, settings.device, batch)
        if self.gradients is not None and self.student.states[0].ndim != 3:
            shape = tuple(self.student.states[0].shape)
            raise SourceError(
                f"{type(student).__name__}: hidden states of {len(self.student.batches[0])} windows have the shape "
                f"{shape}, more than one row per token, which gradients do not support; add --block-error outputs"
            )

    def block_targets(self, number: int, original: nn.Module) -> _BlockTargets:
        """Return the target outputs of the current block per batch, with the cost of errors."""
        with torch.no_grad(), self.student.on_device(original):
            states = enumerate(self.student.states)
            targets = [self.student.forward_block(original, batch).to(state.device) for batch, state in states]
        return _BlockTargets(number, targets, self._sizes, self.gradients)

    @property
    def _sizes(self) -> list[int]:
        return [len(batch) for batch in self.student.batches]


@dataclass(frozen=True)
class _BlockTargets:
    """Target outputs of a block, one tensor per batch, and the cost of an error."""

    block: int
    targets: Sequence[Float[Tensor, "... hidden"]]  # one per batch; the last batch may have fewer windows
    sizes: Sequence[int]  # windows of each batch
    gradients: Gradients | None = None

    def error(self, number: int, output: Float[Tensor, "*states hidden"]) -> Float[Tensor, ""]:
        """Return the error of the output for a batch: nats per token, or the mean relative squared error."""
        target = self.targets[number].to(output.device).float()
        if self.gradients is None:
            return relative_error(output, target)
        first = sum(self.sizes[:number])
        gradients = self.gradients.read(self.block, slice(first, first + self.sizes[number]), output.device)
        return cost(output - target, gradients)


@dataclass(frozen=True)
class _Block:
    """A block to tune, with its inputs (in the pairs) and its target outputs."""

    number: int
    parameters: dict[str, nn.Parameter]
    training_states: _HiddenStates
    block_targets: _BlockTargets
    validation_states: _HiddenStates
    validation_targets: _BlockTargets
    eta_seconds: float  # for this block and those after it

    def errors(
        self, pair: _HiddenStates, block_targets: _BlockTargets, order: Sequence[int], dtype: torch.dtype
    ) -> Iterator:
        """Yield the error of each batch in `order`, differentiable."""
        states = pair.student
        block = states.blocks[states.position]
        for number in order:
            with autocast_to_dtype(states.device, dtype):
                output = states.forward_block(block, number).float()
            yield block_targets.error(number, output)

    def validate(self, dtype: torch.dtype) -> float:
        """Return the mean error on the validation windows."""
        with torch.no_grad():
            sizes = self.validation_targets.sizes
            errors = self.errors(self.validation_states, self.validation_targets, range(len(sizes)), dtype)
            return sum(e.item() * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)


def relative_error(
    output: Float[Tensor, "*states hidden"], target: Float[Tensor, "*states hidden"]
) -> Float[Tensor, ""]:
    """Return the squared error of each token divided by the target's squared norm, averaged over tokens."""
    size = target.square().mean(-1).clamp(min=1e-12)
    return ((output - target).square().mean(-1) / size).mean()


def cost(
    errors: Float[Tensor, "batch context hidden"], gradients: Float[Tensor, "batch context hidden"]
) -> Float[Tensor, ""]:
    """Return ½ (g · d)² of the errors d of hidden states, averaged over tokens: nats per token if errors add up."""
    return (gradients * errors).sum(-1).square().mean() / 2


def _tune_block(block: _Block, settings: Settings, workers: ProcessGroup, log: Log) -> None:
    """Train until the epochs are over or the validation error stops falling; keep the best parameters."""
    dtype, batches = settings.compute_dtype, len(block.block_targets.targets)
    states = block.training_states.student
    tokens = sum(batch.numel() for batch in states.batches) * workers.count
    measure = {"unit": "relative" if block.block_targets.gradients is None else "nats"}
    with states.on_device(states.blocks[states.position]):
        optimizer = Optimizer(
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
                f"infinite weights in the original model ({settings.reference}) and in the compressed model"
            )
        epochs_without_gain = 0
        for epoch in range(settings.block_epochs):
            throughput = Throughput(1, 0, tokens)
            try:
                trained = _epoch(
                    block, optimizer, draw_batch(batches, batches, epoch, settings.seed).tolist(), dtype, workers
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
                best, least, epochs_without_gain = snapshot(block.parameters), error, 0
            else:
                epochs_without_gain += 1
            if epochs_without_gain > settings.block_patience or not math.isfinite(error):
                break
        restore(block.parameters, best)


def _epoch(
    block: _Block, optimizer: Optimizer, order: Sequence[int], dtype: torch.dtype, workers: ProcessGroup
) -> float:
    """Take one step per batch; return the mean error over all processes."""
    total = torch.zeros(1, dtype=torch.float64)
    for error in block.errors(block.training_states, block.block_targets, order, dtype):
        (error / workers.count).backward()
        optimizer.step()
        total += error.item()
    total = total.to(block.training_states.student.device)
    workers.all_reduce([total])
    return total.item() / len(order) / workers.count
