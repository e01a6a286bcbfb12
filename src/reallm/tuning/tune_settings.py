"""Settings of a tuning run and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reallm.errors import RecipeError
from reallm.source.devices import check_device

BLOCKWISE, END_TO_END, BOTH = "blockwise", "end-to-end", "both"
METHODS = (BLOCKWISE, END_TO_END, BOTH)
KL, CE, MIX = "kl", "ce", "mix"
LOSSES = (KL, CE, MIX)
END_TO_END_LOSS, OUTPUTS = "loss", "outputs"
BLOCK_ERRORS = (END_TO_END_LOSS, OUTPUTS)
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

# Parameter groups that can train, by the ledger's roles: tensors of compressed matrices, then unquantized tensors.
PARAMETER_GROUPS = ("residual", "scales", "gains", "codebooks", "decoders", "outliers", "dense")
UNQUANTIZED_GROUPS = ("norms", "biases")
# Matrices outside the blocks whose tensors train if named.
EMBEDDING_AND_HEAD = ("embedding", "head")
# AdamW's first step is ten times the rate, in float32, whose largest value is 3.4e38.
_MAX_RATE = 1e30
DEFAULT_TRAIN = ("residual", "scales", "gains", "codebooks", "norms")


@dataclass(frozen=True)
class Settings:
    """Settings of a tuning run. `reference` is the original model; only end-to-end cross-entropy runs without it.

    `learning_rate` and `block_learning_rate` are relative to the root mean square of each trained tensor.
    """

    text: tuple[str, ...]
    reference: str | None = None
    method: str = END_TO_END
    train: tuple[str, ...] = DEFAULT_TRAIN
    adapter: int | None = None  # rank of new residuals: only they train, end to end, and only they are written
    loss: str = KL
    tokens: int | None = None  # end-to-end, in total; None: every window once
    context: int = 1024
    batch: int = 8  # windows per step
    micro_batch: int | None = None  # windows per forward pass; None: the batch
    learning_rate: float = 3e-3
    warm_up: float = 0.05  # share of the steps
    clip: float = 1.0
    top_k: int = 0  # teacher log-probabilities cached on disk before training; 0: full logits at every step
    validation: tuple[str, ...] = ()  # files; (): windows held out from the text
    validation_windows: int = 16
    validate_every: int | None = None  # steps; None: twenty validations in total
    block_error: str = END_TO_END_LOSS  # cost of an output error: end-to-end loss, or relative error
    block_windows: int = 128
    block_epochs: int = 4
    block_patience: int = 1
    block_learning_rate: float = 1e-3
    save_memory: bool = False  # decode everything at every use, also constants
    checkpointing: bool = True
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"

    @property
    def block_wise(self) -> bool:
        """Return whether blocks are tuned one at a time."""
        return self.method in (BLOCKWISE, BOTH) and self.adapter is None

    @property
    def end_to_end(self) -> bool:
        """Return whether the whole model is tuned."""
        return self.method in (END_TO_END, BOTH)

    @property
    def needs_reference(self) -> bool:
        """Return whether the original model is needed."""
        return self.block_wise or self.loss != CE

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of matrix products; trained tensors and sums are float32."""
        wanted = DTYPES[self.dtype]
        if wanted is not None:
            return wanted
        cuda = torch.device(self.device).type == "cuda"
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32


def check_settings(settings: Settings) -> None:
    """Raise RecipeError naming the option and its value if a setting is invalid."""
    _check_choice("--method", settings.method, METHODS)
    _check_choice("--loss", settings.loss, LOSSES)
    _check_choice("--block-error", settings.block_error, BLOCK_ERRORS)
    _check_choice("--dtype", settings.dtype, tuple(DTYPES))
    for group in settings.train:
        _check_choice("--train", group, PARAMETER_GROUPS + UNQUANTIZED_GROUPS + EMBEDDING_AND_HEAD)
    if settings.adapter is not None and settings.method == BLOCKWISE:
        raise RecipeError(f"--adapter {settings.adapter} trains end to end; remove --method blockwise")
    if settings.adapter is not None and tuple(settings.train) != DEFAULT_TRAIN:
        train = ",".join(settings.train)
        raise RecipeError(f"--adapter {settings.adapter} trains only new residuals; remove --train {train}")
    if not set(settings.train) & set(groups := PARAMETER_GROUPS + UNQUANTIZED_GROUPS):
        raise RecipeError(
            f"--train {','.join(settings.train)}: names no parameter group; add one of {', '.join(groups)}"
        )
    if settings.method == BLOCKWISE and (
        outside_blocks := [group for group in settings.train if group in EMBEDDING_AND_HEAD]
    ):
        raise RecipeError(
            f"--method {BLOCKWISE} trains only decoder blocks: remove --train {','.join(outside_blocks)} or use "
            "--method both"
        )
    if not settings.text:
        raise RecipeError("tuning needs text: give --text FILE")
    if settings.needs_reference and settings.reference is None:
        raise RecipeError(
            f"--method {settings.method} --loss {settings.loss} needs the original model: give --reference MODEL, "
            "or --method end-to-end --loss ce"
        )
    for option in ("batch", "validation_windows", "block_windows", "block_epochs"):
        _check_minimum(option, getattr(settings, option), 1)
    _check_minimum("context", settings.context, 2)
    for option in ("tokens", "micro_batch", "validate_every", "adapter"):
        if getattr(settings, option) is not None:
            _check_minimum(option, getattr(settings, option), 1)
    for option in ("top_k", "block_patience"):
        _check_minimum(option, getattr(settings, option), 0)
    for option in ("learning_rate", "block_learning_rate", "clip"):
        value = getattr(settings, option)
        if not 0 < value <= _MAX_RATE:
            raise RecipeError(f"--{option.replace('_', '-')} {value} is not above 0 and at most {_MAX_RATE}")
    if not 0 <= settings.warm_up < 1:
        raise RecipeError(f"--warm-up {settings.warm_up} is not a fraction from 0 to below 1")
    check_device(settings.device)


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise RecipeError(f"{option} {value!r} is not one of {', '.join(allowed)}")


def _check_minimum(option: str, value: int, least: int) -> None:
    if value < least:
        raise RecipeError(f"--{option.replace('_', '-')} {value} is below {least}")
