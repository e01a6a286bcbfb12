"""Windows of text that a model is calibrated on: from files, or written by the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from reallm.calibrate.text import leading_bos, load_text, tokenize
from reallm.errors import TextError
from reallm.source.transformers_logging import silence_transformers

SELF = "self"
GENERATION_BATCH = 16  # sequences: their key-value caches are what a small machine has to hold


def windows_from_files(
    paths: Sequence[str | Path], tokenizer: Any, windows: int, context: int
) -> Int[Tensor, "windows context"]:
    """The first `windows` windows of `context` tokens: documents joined by the end-of-text token, then cut.

    A tokenizer that begins texts with a token of its own begins every window with it. A text that is too
    short gives fewer windows.
    Errors: TextError if it does not fill one.
    """
    bos = leading_bos(tokenizer)
    body = context - (bos is not None)
    documents = [document for path in paths for document in load_text(path, "--calibration")]
    ids = tokenize(tokenizer, documents, enough=windows * body)
    count = min(windows, len(ids) // body)
    if count == 0:
        names = ", ".join(str(path) for path in paths)
        raise TextError(f"{names}: {len(ids)} tokens do not fill one window of {body}; lower --calibration-context")
    cut = ids[: count * body].view(count, body)
    return cut if bos is None else torch.cat([torch.full((count, 1), bos), cut], 1)


def generate_windows(
    model: nn.Module,
    tokenizer: Any,
    windows: int,
    context: int,
    seed: int,
    device: str | torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "windows context"]:
    """Text that the model writes itself: sampled at temperature 1 from its begin-of-text token, or end-of-text.

    The idea of LLM-QAT (Liu et al., arXiv:2305.17888): what a model writes is what it was trained on. `on_progress` after
    every step (tokens written, in all).
    Errors: TextError for a tokenizer that has neither token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise TextError("--calibration self: the tokenizer has no token that begins a text; give --calibration FILE")
    home = next(model.parameters()).device
    model.to(device)
    written = []
    with torch.no_grad(), torch.random.fork_rng(), silence_transformers():
        torch.manual_seed(seed)
        for start in range(0, windows, GENERATION_BATCH):

            def step(ids: Tensor, scores: Tensor, start: int = start) -> Tensor:
                if on_progress:
                    on_progress(start * context + len(ids) * (ids.shape[1] + 1), windows * context)
                return scores

            prompt = torch.full((min(GENERATION_BATCH, windows - start), 1), first, device=device)
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
            lengths = {"min_new_tokens": context - 1, "max_new_tokens": context - 1}
            mask = torch.ones_like(prompt)
            options |= {"attention_mask": mask, "pad_token_id": first, "logits_processor": [step]}
            written.append(model.generate(prompt, **options, **lengths).cpu())
    model.to(home)
    return torch.cat(written)


def seconds_per_step(blocks: int, device: str | torch.device, tokens: int = 24) -> float:
    """Seconds that a net of so many blocks of 64 numbers takes to write a token of each of `GENERATION_BATCH` texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **sizes)).eval()
    tokenizer = SimpleNamespace(bos_token_id=0)
    generate_windows(model, tokenizer, 1, 2, 0, device)  # what is loaded at the first step only
    begun = time.perf_counter()
    generate_windows(model, tokenizer, GENERATION_BATCH, tokens, 0, device)
    return (time.perf_counter() - begun) / tokens
