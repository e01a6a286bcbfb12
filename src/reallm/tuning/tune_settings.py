"""What the user chose for tuning, and whether it can be."""

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
END_LOSS, OUTPUTS = "loss", "outputs"
BLOCK_ERRORS = (END_LOSS, OUTPUTS)
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

# The ledger's words for parts that can train, and kept tensors.
PARTS = ("residual", "scales", "gains", "codebooks", "decoders", "outliers", "dense")
UNQUANTIZED = ("norms", "biases")
# Whose parts, beside the block matrices'.
EMBEDDING_AND_HEAD = ("embedding", "head")
# AdamW's first step is ten times the rate, in float32, which ends at 3.4e38.
_LARGEST_RATE = 1e30
DEFAULT_TRAIN = ("residual", "scales", "gains", "codebooks", "norms")


@dataclass(frozen=True)
class Settings:
    """What the user chose. `reference` is the original; only cross-entropy alone does without.

    `learning_rate` and `block_learning_rate` are relative: each tensor's steps are in units of its own size.
    """

    text: tuple[str, ...]
    reference: str | None = None
    method: str = END_TO_END
    train: tuple[str, ...] = DEFAULT_TRAIN
    adapter: int | None = None  # rank of new residuals, which alone train end to end and are written by themselves
    loss: str = KL
    tokens: int | None = None  # end-to-end, in all; None: every window once
    context: int = 1024
    batch: int = 8  # windows per step
    micro_batch: int | None = None  # windows at once; None: the batch
    learning_rate: float = 3e-3
    warm_up: float = 0.05  # share of the steps
    clip: float = 1.0
    top_k: int = 0  # the original's top-k tokens kept on disk before training; 0: computed as needed
    validation: tuple[str, ...] = ()  # files; without, windows of the text
    validation_windows: int = 16
    validate_every: int | None = None  # steps; None: twenty times in all
    block_error: str = (
        END_LOSS  # what an error of a block's output costs: by the end-to-end loss, or the same everywhere
    )
    block_windows: int = 128
    block_epochs: int = 4
    block_patience: int = 1
    block_learning_rate: float = 1e-3
    save_memory: bool = False  # decode everything at every use, also what no trained part changes
    checkpointing: bool = True
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"

    @property
    def block_wise(self) -> bool:
        """Whether blocks are tuned one by one."""
        return self.method in (BLOCKWISE, BOTH) and self.adapter is None

    @property
    def end_to_end(self) -> bool:
        """Whether the whole model is tuned."""
        return self.method in (END_TO_END, BOTH)

    @property
    def needs_reference(self) -> bool:
        """Whether the original is asked."""
        return self.block_wise or self.loss != CE

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are computed in; parts and sums are float32."""
        wanted = DTYPES[self.dtype]
        if wanted is not None:
            return wanted
        cuda = torch.device(self.device).type == "cuda"
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32


def check_settings(settings: Settings) -> None:
    """Errors: RecipeError naming the option and its value."""
    _check_choice("--method", settings.method, METHODS)
    _check_choice("--loss", settings.loss, LOSSES)
    _check_choice("--block-error", settings.block_error, BLOCK_ERRORS)
    _check_choice("--dtype", settings.dtype, tuple(DTYPES))
    for word in settings.train:
        _check_choice("--train", word, PARTS + UNQUANTIZED + EMBEDDING_AND_HEAD)
    if settings.adapter is not None and settings.method == BLOCKWISE:
        raise RecipeError(f"--adapter {settings.adapter} trains end to end; leave --method blockwise out")
    if settings.adapter is not None and tuple(settings.train) != DEFAULT_TRAIN:
        words = ",".join(settings.train)
        raise RecipeError(f"--adapter {settings.adapter} trains new residuals alone; leave --train {words} out")
    if not set(settings.train) & set(PARTS + UNQUANTIZED):
        raise RecipeError(
            f"--train {','.join(settings.train)}: names no part; add one of {', '.join(PARTS + UNQUANTIZED)}"
        )
    if settings.method == BLOCKWISE and (
        outside_blocks := [word for word in settings.train if word in EMBEDDING_AND_HEAD]
    ):
        raise RecipeError(
            f"--method {BLOCKWISE} trains what lies in blocks: leave --train {','.join(outside_blocks)} out or take --method both"
        )
    if not settings.text:
        raise RecipeError("tuning needs text: give --text FILE")
    if settings.needs_reference and settings.reference is None:
        raise RecipeError(
            f"--method {settings.method} --loss {settings.loss} needs the original: give --reference MODEL, "
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
        if not 0 < value <= _LARGEST_RATE:
            raise RecipeError(f"--{option.replace('_', '-')} {value} is not a number above 0, at most {_LARGEST_RATE}")
    if not 0 <= settings.warm_up < 1:
        raise RecipeError(f"--warm-up {settings.warm_up} is not a share from 0 to below 1")
    check_device(settings.device)


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise RecipeError(f"{option} {value!r} is not one of {', '.join(allowed)}")


def _check_minimum(option: str, value: int, least: int) -> None:
    if value < least:
        raise RecipeError(f"--{option.replace('_', '-')} {value} is below {least}")
