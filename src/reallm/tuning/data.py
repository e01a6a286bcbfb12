"""Text for tuning: windows of tokens, their loss masks, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reallm.calibrate.text import leading_bos, load_text, tokenize
from reallm.errors import TextError
from reallm.tuning.examples import Example, load_examples


@dataclass(frozen=True)
class Windows:
    """Windows of token ids; `loss_mask` is True for tokens whose prediction is in the loss, never for the first."""

    ids: Int[Tensor, "windows context"]
    loss_mask: Bool[Tensor, "windows context"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Windows:
        return Windows(self.ids[rows], self.loss_mask[rows])


def load_windows(paths: Sequence[str | Path], tokenizer: Any, context: int, option: str = "--text") -> Windows:
    """Return all windows of the files, joined by the end-of-text token; an incomplete last window is dropped.

    A row of task data (see `examples.py`) is one string; its loss mask covers the responses and the end-of-text token.
    Windows with an empty loss mask, inside long prompts, are dropped. If the tokenizer adds a BOS token, every window
    begins with it.
    Errors: TextError naming `option` if a file cannot be read, or if the text does not fill two windows.
    """
    bos = leading_bos(tokenizer)
    body = context - (bos is not None)
    ids, loss_mask = [], []
    for path in paths:
        for new_ids, new_mask in _documents(Path(path), tokenizer, option):
            ids.append(new_ids)
            loss_mask.append(new_mask)
    all_ids, all_masks = torch.cat(ids), torch.cat(loss_mask)
    count = len(all_ids) // body
    if count < 2:
        names = ", ".join(str(path) for path in paths)
        raise TextError(f"{names}: {len(all_ids)} tokens do not fill two windows of {body}; lower --context")
    cut_ids, cut_mask = (tensor[: count * body].view(count, body) for tensor in (all_ids, all_masks))
    if bos is not None:
        cut_ids = torch.cat([torch.full((count, 1), bos), cut_ids], 1)
        cut_mask = torch.cat([torch.zeros(count, 1, dtype=torch.bool), cut_mask], 1)
    cut_mask = cut_mask.clone()
    cut_mask[:, 0] = False
    # A step whose loss mask is empty has neither a loss nor a gradient.
    has_loss = cut_mask.any(1)
    if has_loss.sum() < 2:
        names = ", ".join(str(path) for path in paths)
        raise TextError(
            f"{names}: {int(has_loss.sum())} of {count} windows of {context} contain a token of a response; give "
            "longer responses or raise --context"
        )
    return Windows(cut_ids[has_loss], cut_mask[has_loss])


def split_windows(windows: Windows, validation: int, seed: int) -> tuple[Windows, Windows]:
    """Split at random into (training, validation); `validation` windows, at least one and at most a quarter of all."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = max(1, min(validation, len(windows) // 4))
    return windows[order[count:]], windows[order[:count].sort().values]


def draw_batch(count: int, batch: int, step: int, seed: int) -> Int[Tensor, " batch"]:
    """Return the window indices of a step: epochs in random orders that depend only on these arguments."""
    places = range(step * batch, (step + 1) * batch)
    orders = {number: _order(count, seed, number) for number in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1))


def _documents(path: Path, tokenizer: Any, option: str) -> list[tuple[Tensor, Tensor]]:
    """Return (ids, loss mask) of each document, which ends with the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if (examples := load_examples(path, tokenizer, option)) is None:
        ids = torch.cat([tokenize(tokenizer, load_text(path, option)), torch.tensor(end, dtype=torch.int64)])
        return [(ids, torch.ones(len(ids), dtype=torch.bool))]
    return [_tokens(example, tokenizer, end) for example in examples]


def _tokens(example: Example, tokenizer: Any, end: list[int]) -> tuple[Tensor, Tensor]:
    """Return (ids, loss mask); an end-of-text token that the chat template wrote is not added again."""
    segments = [tokenize(tokenizer, [segment.text]) for segment in example]
    if end and end[0] not in segments[-1][-2:]:
        segments[-1] = torch.cat([segments[-1], torch.tensor(end, dtype=torch.int64)])
    loss_mask = [torch.full((len(ids),), segment.loss_mask) for segment, ids in zip(example, segments, strict=True)]
    return torch.cat(segments), torch.cat(loss_mask)
