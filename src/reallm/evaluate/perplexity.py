"""Perplexity of a model on a text, and KL divergence to a reference on the same windows."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import SourceError, TextError
from reallm.source.devices import module_device

# Log-probabilities are computed for so many values at a time (64 MiB in float32). The logits of one window
# are 2,048 × 49,152 values, 400 MB; a log-softmax of all of them at once would double that, KL would triple it.
CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation. All means are over the scored tokens."""

    perplexity: float  # exp(nll); inf if that overflows
    nll: float  # mean negative log-likelihood, nats per token
    tokens: int  # scored tokens: every token of a window except its first
    windows: int
    context: int  # tokens per window, a leading <bos> included
    kl: float | None = None  # mean KL(reference ‖ model), nats per token
    top1: float | None = None  # top-1 agreement: share of tokens where both models predict the same token


def windows(token_ids: Int[Tensor, " n"], context: int, bos: int | None = None) -> Int[Tensor, "windows context"]:
    """Cut a text into non-overlapping windows of `context` tokens; the remainder is dropped.

    With `bos` each window is that token and context - 1 tokens of the text. A text shorter than one
    window becomes one shorter window. Errors: TextError if nothing can be scored: fewer than 2 tokens.
    """
    if context < 2:
        raise TextError(f"context {context}: a window needs at least 2 tokens, one to read and one to predict")
    stride = context - (bos is not None)
    stride = min(stride, len(token_ids))
    if stride + (bos is not None) < 2:
        raise TextError(f"the text is too short to score: {len(token_ids)} tokens, and at least 2 are needed")
    cut = token_ids[: len(token_ids) // stride * stride].reshape(-1, stride)
    return cut if bos is None else torch.cat([cut.new_full((len(cut), 1), bos), cut], dim=1)


@torch.no_grad()
def evaluate(
    model: Any,
    token_ids: Int[Tensor, " n"],
    context: int = 2048,
    *,
    bos: int | None = None,
    max_windows: int | None = None,
    reference: Any = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a text in independent windows and return the metrics.

    `model` and `reference` are causal language models (called with input ids, returning `.logits`); each
    stays on its device. Only the first `max_windows` windows are scored, `batch_size` at once.
    `progress` is called with (windows done, windows in total). Log-probabilities are float32 in any
    compute dtype.

    Errors: TextError if the text or the context does not fit; SourceError if the two vocabularies differ.
    """
    _check_context(model, context)
    batches = windows(token_ids, context, bos)[:max_windows]
    if reference is not None:
        _check_vocabularies(_text_config(model).vocab_size, _text_config(reference).vocab_size)
    sums = torch.zeros(3, dtype=torch.float64)  # nll, KL, agreement
    done = 0
    with _eval_mode(model), _eval_mode(reference):
        for batch in batches.split(batch_size):
            sums += _score(model, reference, batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(batches))
    return _summary(sums, batches, reference is not None)


def _summary(sums: Float[Tensor, "3"], batches: Int[Tensor, "windows context"], compared: bool) -> Evaluation:
    count, context = batches.shape
    tokens = count * (context - 1)
    nll, kl, top1 = (sums / tokens).tolist()
    return Evaluation(
        perplexity=math.exp(nll) if nll < 709 else nll if math.isnan(nll) else math.inf,
        nll=nll,
        tokens=tokens,
        windows=count,
        context=context,
        kl=kl if compared else None,
        top1=top1 if compared else None,
    )


def _score(model: Any, reference: Any, batch: Int[Tensor, "batch context"]) -> Float[Tensor, "3"]:
    """Return sums over the scored tokens of a batch: negative log-likelihood, KL, top-1 agreement."""
    logits = _logits(model, batch)
    others = None if reference is None else _logits(reference, batch)
    targets = batch[:, 1:].flatten()
    rows = max(1, CHUNK_VALUES // logits.shape[-1])
    sums = torch.zeros(3, dtype=torch.float64)
    for part in _slices(len(targets), rows):
        sums += _score_rows(logits[part], targets[part], None if others is None else others[part])
    return sums


def _score_rows(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"], others: Float[Tensor, "n vocab"] | None
) -> Float[Tensor, "3"]:
    log_probs = _log_softmax(logits)
    nll = torch.nn.functional.nll_loss(log_probs, targets.to(log_probs.device), reduction="none")
    if others is None:
        return torch.tensor([nll.double().sum().item(), 0.0, 0.0], dtype=torch.float64)
    expected = _log_softmax(others.to(logits.device))
    kl = torch.nn.functional.kl_div(log_probs, expected, reduction="none", log_target=True).sum(dim=1)
    agree = log_probs.argmax(dim=1) == expected.argmax(dim=1)
    return torch.stack([nll.double().sum(), kl.double().sum(), agree.double().sum()]).cpu()


def _log_softmax(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    with torch.autocast(logits.device.type, enabled=False):
        return torch.log_softmax(logits.float(), dim=-1)


def _logits(model: Any, batch: Int[Tensor, "batch context"]) -> Float[Tensor, "n vocab"]:
    """Return the logits of all positions with a next token, windows concatenated."""
    logits = model(input_ids=batch.to(module_device(model)), use_cache=False).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Put the model into eval mode inside the context and restore its mode afterwards."""
    if model is None:
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _text_config(model: Any) -> Any:
    """Return the config of the language model, which is nested in that of a multimodal model."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _check_context(model: Any, context: int) -> None:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise TextError(f"context {context} is longer than the {limit} positions of this model: use --context {limit}")


def _check_vocabularies(size: int, reference_size: int) -> None:
    if size != reference_size:
        raise SourceError(
            f"the vocabularies differ ({size} tokens, {reference_size} in the reference): "
            "KL and agreement need two models over the same tokens"
        )
