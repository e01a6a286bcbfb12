"""Text for tuning: windows of tokens, which of them count, and in what order they come."""

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
    """Windows of token ids; a token is `loss_mask` if predicting it is part of the loss. The first never is."""

    ids: Int[Tensor, "windows context"]
    loss_mask: Bool[Tensor, "windows context"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Windows:
        return Windows(self.ids[rows], self.loss_mask[rows])


def load_windows(paths: Sequence[str | Path], tokenizer: Any, context: int, option: str = "--text") -> Windows:
    """All windows of files, which are joined by the end-of-text token; what is left at the end is dropped.

    Rows of task data (see `examples.py`) are one string each, of which the responses and the end-of-text token count;
    windows in which nothing does, inside long prompts, are left out. A tokenizer that begins texts with a token of its
    own begins every window with it.
    Errors: TextError if a file cannot be read, naming the `option` that asked for it, or does not fill two windows.
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
    # A step without a token that counts has neither a loss nor a gradient.
    some = cut_mask.any(1)
    if some.sum() < 2:
        names = ", ".join(str(path) for path in paths)
        raise TextError(
            f"{names}: {int(some.sum())} of {count} windows of {context} hold a token of a response; give longer "
            "responses or raise --context"
        )
    return Windows(cut_ids[some], cut_mask[some])


def split_windows(windows: Windows, validation: int, seed: int) -> tuple[Windows, Windows]:
    """(training, validation) windows, drawn; validation takes `validation`, but at most a quarter, at least one."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = max(1, min(validation, len(windows) // 4))
    return windows[order[count:]], windows[order[:count].sort().values]


def draw_batch(count: int, batch: int, step: int, seed: int) -> Int[Tensor, " batch"]:
    """The windows of a step: all in a drawn order, then all in another. It depends on nothing but these numbers."""
    places = range(step * batch, (step + 1) * batch)
    orders = {number: _order(count, seed, number) for number in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1))


def _documents(path: Path, tokenizer: Any, option: str) -> list[tuple[Tensor, Tensor]]:
    """(ids, counted) of each document, the end-of-text token at its end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if (examples := load_examples(path, tokenizer, option)) is None:
        ids = torch.cat([tokenize(tokenizer, load_text(path, option)), torch.tensor(end, dtype=torch.int64)])
        return [(ids, torch.ones(len(ids), dtype=torch.bool))]
    return [_tokens(example, tokenizer, end) for example in examples]


def _tokens(example: Example, tokenizer: Any, end: list[int]) -> tuple[Tensor, Tensor]:
    """(ids, counted); the end-of-text token that a chat template wrote is not put there again."""
    parts = [tokenize(tokenizer, [piece.text]) for piece in example]
    if end and end[0] not in parts[-1][-2:]:
        parts[-1] = torch.cat([parts[-1], torch.tensor(end, dtype=torch.int64)])
    loss_mask = [torch.full((len(ids),), piece.loss_mask) for piece, ids in zip(example, parts, strict=True)]
    return torch.cat(parts), torch.cat(loss_mask)
