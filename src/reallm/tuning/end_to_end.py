"""End-to-end tuning: distillation from the original model (KL), or fine-tuning on the text (cross-entropy).

With activation checkpointing each block runs again for its gradient and decodes its matrices inside: only one block's
decoded matrices and activations are in memory at a time.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reallm.checkpoint import read_work_tensors, save_tensors
from reallm.errors import SourceError
from reallm.formats import Tensors
from reallm.source.decoder_blocks import decoder_blocks
from reallm.tuning.data import Windows, draw_batch
from reallm.tuning.distributed import ProcessGroup
from reallm.tuning.log import Log, Throughput
from reallm.tuning.losses import SplitModel, Teacher, autocast_to_dtype, loss_sums, split_model, top_k_log_probs
from reallm.tuning.optimizer import Diverged, Optimizer, restore, snapshot
from reallm.tuning.trainables import Trainables
from reallm.tuning.tune_settings import CE, Settings

_SAVE_SECONDS = 60.0
STEP_FILE, BEST_FILE, TEACHER_FILE = "step.safetensors", "best.safetensors", "teacher.safetensors"
TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True)
class TrainingRun:
    """The models, windows, settings and work folder of an end-to-end run."""

    trainables: Trainables
    original: Callable[[], nn.Module] | None  # loads the teacher onto the CPU
    training: Windows
    validation: Windows
    settings: Settings
    work: Path
    workers: ProcessGroup
    log: Log

    @property
    def steps(self) -> int:
        """Return the total number of steps: `tokens` divided by the tokens per step, at least one."""
        batch, context = self.settings.batch, self.training.ids.shape[1]
        tokens = self.settings.tokens or len(self.training) * context
        return max(1, tokens // (batch * context))

    @property
    def top_k(self) -> dict[str, int]:
        """Return {"top_k": k} for events and results if the KL lumps all but the top-k tokens together, else {}."""
        return {"top_k": self.settings.top_k} if self.settings.top_k and self.original is not None else {}

    @property
    def interval(self) -> int:
        """Return the number of steps between two validations."""
        return self.settings.validate_every or max(1, self.steps // 20)


def tune_end_to_end(run: TrainingRun) -> dict[str, Any]:
    """Train, restore the parameters with the lowest validation loss, and return the figures of the run.

    Resumes from the state in the work folder if there is one.
    Errors: SourceError if the loss is not finite before the first step and no blocks were tuned before.
    """
    settings = run.settings
    model = run.trainables.model.to(settings.device)
    if settings.checkpointing:
        enable_checkpointing(model)
    teacher_cache = _TeacherCache(run)
    evaluator = _LossEvaluator(split_model(model), teacher_cache, settings)
    parameters = run.trainables.parameters
    optimizer = Optimizer(parameters, run.steps, settings.learning_rate, settings.warm_up, settings.clip, run.workers)
    best = _BestCheckpoint(run, evaluator)
    if (run.work / STEP_FILE).is_file():
        state = read_work_tensors(run.work / STEP_FILE, optimizer.layout() | best.layout())
        optimizer.load_state_dict(state)
        best.load_state_dict(state)
    else:
        best.consider(0)
    stopped = _train(run, optimizer, evaluator, best)
    restore(parameters, best.parameters)
    figures = {"steps": optimizer.done, "best_step": best.step, "before": best.first, "after": best.figures}
    return {**figures, **run.top_k, **stopped}


def _train(run: TrainingRun, optimizer: Optimizer, evaluator: _LossEvaluator, best: _BestCheckpoint) -> dict[str, Any]:
    """Take the remaining steps; return {"stopped": reason} if training ended early, else {}."""
    throughput = Throughput(run.steps, optimizer.done, run.settings.batch * run.training.ids.shape[1])
    saved = time.monotonic()
    while optimizer.done < run.steps:
        rate = optimizer.rate()
        try:
            figures = _step(run, optimizer, evaluator)
        except Diverged:
            run.log.add(phase="end-to-end", step=optimizer.done + 1, stopped="not finite")
            if optimizer.done == 0 and not run.settings.block_wise:
                original = f"the original model ({run.settings.reference}) and in " if run.original is not None else ""
                raise SourceError(
                    "the loss is not finite before the first step; nothing was trained; look for NaN or infinite "
                    f"weights in {original}the compressed model"
                ) from None
            return {"stopped": f"loss or gradient not finite at step {optimizer.done + 1}"}
        step = optimizer.done
        run.log.add(
            phase="end-to-end", step=step, steps=run.steps, rate=rate, **figures, **run.top_k, **throughput.rates(step)
        )
        validated = step % run.interval == 0 or step == run.steps
        if validated:
            best.consider(step)
        if run.workers.is_main_process and (validated or time.monotonic() - saved > _SAVE_SECONDS):
            save_tensors(optimizer.state_dict() | best.state_dict(), run.work / STEP_FILE)
            saved = time.monotonic()
    return {}


def _step(run: TrainingRun, optimizer: Optimizer, evaluator: _LossEvaluator) -> dict[str, float]:
    """Take one step over a batch, in micro-batches; return the mean loss, KL and cross-entropy over the loss mask."""
    settings = run.settings
    rows = draw_batch(len(run.training), settings.batch, optimizer.done, settings.seed)
    target_tokens = int(run.training[rows].loss_mask[:, 1:].sum())
    sums = torch.zeros(2, dtype=torch.float64)
    for part in run.workers.shard(rows).split(settings.micro_batch or settings.batch):
        with torch.enable_grad():
            loss, measured = evaluator.sums(run.training, part, TRAINING)
            (loss / max(target_tokens, 1)).backward()
        sums += measured.cpu()
    sums = sums.to(settings.device)
    run.workers.all_reduce([sums])
    norm = optimizer.step()
    kl, ce = (sums / max(target_tokens, 1)).tolist()
    return {"loss": _mix_losses(settings.loss, kl, ce), "kl": kl, "ce": ce, "norm": norm}


class _LossEvaluator:
    """Loss of windows under the current parameters."""

    def __init__(self, split: SplitModel, teacher_cache: _TeacherCache, settings: Settings) -> None:
        self.split, self.teacher_cache, self.settings = split, teacher_cache, settings

    def sums(self, windows: Windows, rows: Tensor, kind: str) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
        """Return `loss_sums` over the loss mask of the windows `rows`; `kind` is TRAINING or VALIDATION."""
        windows = windows[rows]
        device = torch.device(self.settings.device)
        ids = windows.ids.to(device)
        positions = windows.loss_mask[:, 1:].reshape(-1).nonzero()[:, 0].to(device)
        with autocast_to_dtype(device, self.settings.compute_dtype):
            no_teacher = self.settings.loss == CE and kind == TRAINING
            names = [f"{kind}/{row}" for row in rows.tolist()]
            teacher = None if no_teacher else self.teacher_cache.get(ids, positions, names)
            states = self.split.body(ids)[:, :-1].flatten(0, 1)[positions]
            targets = ids[:, 1:].flatten()[positions]
            return loss_sums(self.split.head, states, targets, teacher, self.settings.loss, self.split.vocabulary)

    @torch.no_grad()
    def means(self, windows: Windows) -> dict[str, float]:
        """Return KL (nan without a teacher), cross-entropy (nats per token) and perplexity of validation windows."""
        sums = torch.zeros(2, dtype=torch.float64)
        size = self.settings.micro_batch or self.settings.batch
        for part in torch.arange(len(windows)).split(size):
            sums += self.sums(windows, part, VALIDATION)[1].cpu()
        kl, ce = (sums / windows.loss_mask[:, 1:].sum()).tolist()
        return {"kl": kl, "ce": ce, "perplexity": math.exp(min(ce, 700.0))}


class _BestCheckpoint:
    """The parameters with the lowest validation loss so far."""

    def __init__(self, run: TrainingRun, evaluator: _LossEvaluator) -> None:
        self.run, self.evaluator = run, evaluator
        self.step, self.least = 0, math.inf
        self.figures: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.parameters: dict[str, Tensor] = {}

    def consider(self, step: int) -> None:
        """Validate, and save the parameters if they are the best so far."""
        figures = self.evaluator.means(self.run.validation)
        self.run.log.add(phase="validation", step=step, **figures, **self.run.top_k)
        loss = _mix_losses(self.run.settings.loss, figures["kl"], figures["ce"])
        self.first = self.first or figures
        if loss < self.least or not self.parameters:
            self.step, self.least, self.figures = step, loss, figures
            self.parameters = snapshot(self.run.trainables.parameters)
            if self.run.workers.is_main_process:
                save_tensors(self.parameters, self.run.work / BEST_FILE)

    def state_dict(self) -> Tensors:
        """Return what `load_state_dict` needs in addition to BEST_FILE."""
        figures = [[f[key] for key in ("kl", "ce", "perplexity")] for f in (self.first, self.figures)]
        return {
            "best/step": torch.tensor([self.step]),
            "best/least": torch.tensor([self.least], dtype=torch.float64),
            "best/figures": torch.tensor(figures, dtype=torch.float64),
        }

    def load_state_dict(self, state: Tensors) -> None:
        """Restore from `state_dict` and BEST_FILE.

        BEST_FILE may be newer than the state: the next steps then compute the same parameters again.
        """
        self.step, self.least = int(state["best/step"]), float(state["best/least"])
        first, last = state["best/figures"].tolist()
        self.first, self.figures = (dict(zip(("kl", "ce", "perplexity"), f, strict=True)) for f in (first, last))
        self.parameters = read_work_tensors(self.run.work / BEST_FILE, self.run.trainables.parameters)

    @staticmethod
    def layout() -> Tensors:
        """Return names, shapes and dtypes of `state_dict`, on the meta device."""
        sizes = {"step": ((1,), torch.int64), "least": ((1,), torch.float64), "figures": ((2, 3), torch.float64)}
        return {f"best/{key}": torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in sizes.items()}


class _TeacherCache:
    """Teacher outputs of windows: computed at every step, or (top-k) once before training and read from disk."""

    def __init__(self, run: TrainingRun) -> None:
        self.settings, self.split, self.file = run.settings, None, None
        if run.original is None:
            return
        path = run.work / TEACHER_FILE
        if not self.settings.top_k:
            self.split = split_model(run.original().to(self.settings.device))
            return
        missing = not path.is_file()
        run.workers.barrier()  # every process has looked for the file before one writes it
        if missing and run.workers.is_main_process:
            self.split = split_model(run.original().to(self.settings.device))
            save_tensors(self._top_k_outputs(run), path)
        run.workers.barrier()
        self.split, self.file = None, safe_open(path, framework="pt")  # frees the teacher

    def get(self, ids: Int[Tensor, "windows context"], positions: Int[Tensor, " targets"], keys: list[str]) -> Any:
        """Return teacher outputs at `positions`; `keys` name the windows in the file. None without a teacher."""
        if self.file is not None:
            token_ids, log_probs = (
                torch.cat([self.file.get_tensor(f"{kind}/{name}") for name in keys]).to(ids.device)[positions]
                for kind in ("words", "log_probs")
            )
            return Teacher(token_ids=token_ids, log_probs=log_probs)
        if self.split is None:
            return None
        with torch.no_grad():
            return Teacher(head=self.split.head, states=self.split.body(ids)[:, :-1].flatten(0, 1)[positions])

    @torch.no_grad()
    def _top_k_outputs(self, run: TrainingRun) -> Tensors:
        """Return the teacher's top-k tokens and log-probabilities of every training and validation window."""
        assert self.split is not None
        found: Tensors = {}
        for kind, windows in ((TRAINING, run.training), (VALIDATION, run.validation)):
            for number, ids in enumerate(windows.ids):
                with autocast_to_dtype(self.settings.device, self.settings.compute_dtype):
                    states = self.split.body(ids[None].to(self.settings.device))[0, :-1]
                    chunks = [
                        top_k_log_probs(self.split.head(chunk), self.settings.top_k) for chunk in states.split(256)
                    ]
                found[f"words/{kind}/{number}"] = torch.cat([token_ids for token_ids, _ in chunks]).cpu()
                found[f"log_probs/{kind}/{number}"] = torch.cat([values for _, values in chunks]).cpu()
        return found


def enable_checkpointing(model: nn.Module) -> None:
    """Enable activation checkpointing for every decoder block: it runs again for the gradient."""
    for block in decoder_blocks(model):
        block.forward = functools.partial(_checkpointed_forward, block.forward)


def _checkpointed_forward(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def _mix_losses(loss: str, kl: float, ce: float) -> float:
    return {"kl": kl, "ce": ce}.get(loss, (kl + ce) / 2)
