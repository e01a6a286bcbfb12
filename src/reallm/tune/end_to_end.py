"""End-to-end tuning: the whole model learns to predict as the original does, or the text itself.

Each block is run once more for its gradient (checkpointing), and decodes its matrices inside: only one block's
decoded matrices and activations live at a time.
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

from reallm.artifact import read_kept, save_tensors
from reallm.errors import SourceError
from reallm.formats import Tensors
from reallm.model.decoder import decoder_blocks
from reallm.tune.data import Windows, drawn
from reallm.tune.descent import Descent, Diverged, restore, snapshot
from reallm.tune.log import Log, Pace
from reallm.tune.losses import Split, Teacher, computing, likeliest, loss_sums, split_model
from reallm.tune.processes import Processes
from reallm.tune.settings import CE, Settings
from reallm.tune.trainables import Trainables

_SAVE_SECONDS = 60.0
STEP_FILE, BEST_FILE, TEACHER_FILE = "step.safetensors", "best.safetensors", "teacher.safetensors"
TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True)
class Course:
    """What end-to-end tuning works on: models, text, and where its state is kept."""

    trainables: Trainables
    original: Callable[[], nn.Module] | None  # loads it onto the CPU
    training: Windows
    validation: Windows
    settings: Settings
    work: Path
    workers: Processes
    log: Log

    @property
    def steps(self) -> int:
        """Steps in all: those that `tokens` fill, at least one."""
        batch, context = self.settings.batch, self.training.ids.shape[1]
        tokens = self.settings.tokens or len(self.training) * context
        return max(1, tokens // (batch * context))

    @property
    def top_k(self) -> dict[str, int]:
        """For events and figures: where it is, all but the `top_k` likeliest tokens count as one in the KL."""
        return {"top_k": self.settings.top_k} if self.settings.top_k and self.original is not None else {}

    @property
    def interval(self) -> int:
        """Steps between two validations."""
        return self.settings.validate_every or max(1, self.steps // 20)


def tune_whole(course: Course) -> dict[str, Any]:
    """Train, keep the parameters that were best on the validation windows, and say how it went.

    Goes on from the state in the work folder if there is one.
    Errors: SourceError if the loss is not finite before the first step, and no block has learned anything either.
    """
    settings = course.settings
    model = course.trainables.model.to(settings.device)
    if settings.checkpointing:
        checkpointed(model)
    teaching = _Teaching(course)
    scored = _Scored(split_model(model), teaching, settings)
    parameters = course.trainables.parameters
    descent = Descent(parameters, course.steps, settings.learning_rate, settings.warm_up, settings.clip, course.workers)
    best = _Best(course, scored)
    if (course.work / STEP_FILE).is_file():
        state = read_kept(course.work / STEP_FILE, descent.layout() | best.layout())
        descent.go_on_from(state)
        best.go_on_from(state)
    else:
        best.consider(0)
    stopped = _train(course, descent, scored, best)
    restore(parameters, best.parameters)
    figures = {"steps": descent.done, "best_step": best.step, "before": best.first, "after": best.figures}
    return {**figures, **course.top_k, **stopped}


def _train(course: Course, descent: Descent, scored: _Scored, best: _Best) -> dict[str, Any]:
    """The steps that are left; says why they ended early if they did."""
    pace = Pace(course.steps, descent.done, course.settings.batch * course.training.ids.shape[1])
    saved = time.monotonic()
    while descent.done < course.steps:
        rate = descent.rate()
        try:
            figures = _step(course, descent, scored)
        except Diverged:
            course.log.add(phase="end-to-end", step=descent.done + 1, stopped="not finite")
            if descent.done == 0 and not course.settings.block_wise:
                original = f"the original ({course.settings.reference}) and in " if course.original is not None else ""
                raise SourceError(
                    "the loss is not finite before the first step; nothing was learned; look for NaN or infinite "
                    f"weights in {original}the compressed model"
                ) from None
            return {"stopped": f"loss or gradient not finite at step {descent.done + 1}"}
        step = descent.done
        course.log.add(
            phase="end-to-end", step=step, steps=course.steps, rate=rate, **figures, **course.top_k, **pace.after(step)
        )
        validated = step % course.interval == 0 or step == course.steps
        if validated:
            best.consider(step)
        if course.workers.first and (validated or time.monotonic() - saved > _SAVE_SECONDS):
            save_tensors(descent.state() | best.state(), course.work / STEP_FILE)
            saved = time.monotonic()
    return {}


def _step(course: Course, descent: Descent, scored: _Scored) -> dict[str, float]:
    """One step over a batch, in micro-batches; loss, KL and cross-entropy are means over its counted tokens."""
    settings = course.settings
    rows = drawn(len(course.training), settings.batch, descent.done, settings.seed)
    counted = int(course.training[rows].counted[:, 1:].sum())
    sums = torch.zeros(2, dtype=torch.float64)
    for part in course.workers.share(rows).split(settings.micro_batch or settings.batch):
        with torch.enable_grad():
            loss, measured = scored.sums(course.training, part, TRAINING)
            (loss / max(counted, 1)).backward()
        sums += measured.cpu()
    sums = sums.to(settings.device)
    course.workers.add_up([sums])
    norm = descent.step()
    kl, ce = (sums / max(counted, 1)).tolist()
    return {"loss": _mixed(settings.loss, kl, ce), "kl": kl, "ce": ce, "norm": norm}


class _Scored:
    """The loss of windows under the model as it is."""

    def __init__(self, split: Split, teaching: _Teaching, settings: Settings) -> None:
        self.split, self.teaching, self.settings = split, teaching, settings

    def sums(self, windows: Windows, rows: Tensor, kind: str) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
        """As `loss_sums`, over the counted tokens of the windows of these numbers; `kind` is TRAINING or VALIDATION."""
        windows = windows[rows]
        device = torch.device(self.settings.device)
        ids = windows.ids.to(device)
        place = windows.counted[:, 1:].reshape(-1).nonzero()[:, 0].to(device)
        with computing(device, self.settings.compute_dtype):
            silent = self.settings.loss == CE and kind == TRAINING
            names = [f"{kind}/{row}" for row in rows.tolist()]
            teacher = None if silent else self.teaching.of(ids, place, names)
            states = self.split.body(ids)[:, :-1].flatten(0, 1)[place]
            targets = ids[:, 1:].flatten()[place]
            return loss_sums(self.split.head, states, targets, teacher, self.settings.loss, self.split.vocabulary)

    @torch.no_grad()
    def means(self, windows: Windows) -> dict[str, float]:
        """KL (nan without original) and cross-entropy of validation windows, nats a token."""
        sums = torch.zeros(2, dtype=torch.float64)
        size = self.settings.micro_batch or self.settings.batch
        for part in torch.arange(len(windows)).split(size):
            sums += self.sums(windows, part, VALIDATION)[1].cpu()
        kl, ce = (sums / windows.counted[:, 1:].sum()).tolist()
        return {"kl": kl, "ce": ce, "perplexity": math.exp(min(ce, 700.0))}


class _Best:
    """The parameters of the lowest validation loss so far."""

    def __init__(self, course: Course, scored: _Scored) -> None:
        self.course, self.scored = course, scored
        self.step, self.least = 0, math.inf
        self.figures: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.parameters: dict[str, Tensor] = {}

    def consider(self, step: int) -> None:
        """Validate, and keep the parameters if they are the best."""
        figures = self.scored.means(self.course.validation)
        self.course.log.add(phase="validation", step=step, **figures, **self.course.top_k)
        loss = _mixed(self.course.settings.loss, figures["kl"], figures["ce"])
        self.first = self.first or figures
        if loss < self.least or not self.parameters:
            self.step, self.least, self.figures = step, loss, figures
            self.parameters = snapshot(self.course.trainables.parameters)
            if self.course.workers.first:
                save_tensors(self.parameters, self.course.work / BEST_FILE)

    def state(self) -> Tensors:
        """What `go_on_from` needs beside the file of the best parameters."""
        figures = [[f[key] for key in ("kl", "ce", "perplexity")] for f in (self.first, self.figures)]
        return {
            "best/step": torch.tensor([self.step]),
            "best/least": torch.tensor([self.least], dtype=torch.float64),
            "best/figures": torch.tensor(figures, dtype=torch.float64),
        }

    def go_on_from(self, state: Tensors) -> None:
        """The inverse of `state`.

        The file may be newer than the state: then the steps that come bring the same parameters again.
        """
        self.step, self.least = int(state["best/step"]), float(state["best/least"])
        first, last = state["best/figures"].tolist()
        self.first, self.figures = (dict(zip(("kl", "ce", "perplexity"), f, strict=True)) for f in (first, last))
        self.parameters = read_kept(self.course.work / BEST_FILE, self.course.trainables.parameters)

    @staticmethod
    def layout() -> Tensors:
        """What `state` gives, on the meta device."""
        sizes = {"step": ((1,), torch.int64), "least": ((1,), torch.float64), "figures": ((2, 3), torch.float64)}
        return {f"best/{key}": torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in sizes.items()}


class _Teaching:
    """What the original says of windows: asked as needed, or once before training and kept on disk."""

    def __init__(self, course: Course) -> None:
        self.settings, self.split, self.file = course.settings, None, None
        if course.original is None:
            return
        path = course.work / TEACHER_FILE
        if not self.settings.top_k:
            self.split = split_model(course.original().to(self.settings.device))
            return
        wanted = not path.is_file()
        course.workers.wait()  # all have looked for the file before one writes it
        if wanted and course.workers.first:
            self.split = split_model(course.original().to(self.settings.device))
            save_tensors(self._likeliest(course), path)
        course.workers.wait()
        self.split, self.file = None, safe_open(path, framework="pt")  # the original is forgotten

    def of(self, ids: Int[Tensor, "windows context"], place: Int[Tensor, " counted"], known_as: list[str]) -> Any:
        """The teacher of the counted tokens of windows, which the file knows by these names; None without original."""
        if self.file is not None:
            words, log_probs = (
                torch.cat([self.file.get_tensor(f"{kind}/{name}") for name in known_as]).to(ids.device)[place]
                for kind in ("words", "log_probs")
            )
            return Teacher(words=words, log_probs=log_probs)
        if self.split is None:
            return None
        with torch.no_grad():
            return Teacher(head=self.split.head, states=self.split.body(ids)[:, :-1].flatten(0, 1)[place])

    @torch.no_grad()
    def _likeliest(self, course: Course) -> Tensors:
        """Of every window, training and validation, the likeliest tokens."""
        assert self.split is not None
        found: Tensors = {}
        for kind, windows in ((TRAINING, course.training), (VALIDATION, course.validation)):
            for number, ids in enumerate(windows.ids):
                with computing(self.settings.device, self.settings.compute_dtype):
                    states = self.split.body(ids[None].to(self.settings.device))[0, :-1]
                    kept = [likeliest(self.split.head(part), self.settings.top_k) for part in states.split(256)]
                found[f"words/{kind}/{number}"] = torch.cat([words for words, _ in kept]).cpu()
                found[f"log_probs/{kind}/{number}"] = torch.cat([values for _, values in kept]).cpu()
        return found


def checkpointed(model: nn.Module) -> None:
    """Have every decoder block forget its activations and be run once more for the gradient."""
    for block in decoder_blocks(model):
        block.forward = functools.partial(_again, block.forward)


def _again(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def _mixed(loss: str, kl: float, ce: float) -> float:
    return {"kl": kl, "ce": ce}.get(loss, (kl + ce) / 2)
