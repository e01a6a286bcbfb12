"""Implement `reallm eval`: from paths to metrics with their provenance."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reallm
from reallm import hf
from reallm.calibrate import text as texts
from reallm.errors import ReallmError, SourceError
from reallm.evaluate.load_options import load_options
from reallm.evaluate.perplexity import evaluate


def measure(
    model: str,
    text: str | Path,
    *,
    context: int = 2048,
    max_windows: int | None = None,
    reference: str | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    mode: str = hf.DECODE_AT_LOAD,
    verify: bool = True,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the model at a path or hub id on a text file; model and reference are on `device` in `dtype`.

    `adapter` is a folder with an adapter for the model, not for the reference. Returns a dict for JSON: the fields of
    `Evaluation`, the paths of model and text, package versions, and `seconds`, the time of scoring without loading.
    Errors: those of `evaluate`, `reallm.load` and `load_text`.
    """
    loading = load_options(device, dtype) | {"mode": mode, "verify": verify}
    documents = texts.load_text(text)  # first: it is cheap, and the most frequent error
    tokenizer = hf.load_tokenizer(model)
    token_ids = texts.tokenize(tokenizer, documents)
    if reference is not None:
        _check_tokenizers(tokenizer, reference)
    loaded = hf.load(model, adapter=adapter, **loading)
    other = None if reference is None else hf.load(reference, **loading)
    start = time.perf_counter()
    figures = evaluate(
        loaded,
        token_ids,
        context,
        bos=texts.leading_bos(tokenizer),
        max_windows=max_windows,
        reference=other,
        batch_size=batch_size,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    return dataclasses.asdict(figures) | {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "reference": reference,
        "text": str(text),
        "text_sha256": texts.text_sha256(text),
        "dtype": str(getattr(loaded, "dtype", "unknown")).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result may depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"reallm": reallm.__version__, "python": platform.python_version(), **packages}


def to_json(result: dict[str, Any]) -> str:
    """Return JSON text; infinity and NaN, which JSON does not have, become null."""
    return json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_tokenizers(tokenizer: Any, reference: str) -> None:
    """Raise SourceError if the reference has another tokenizer. Equal sizes are no proof: many have 32,000 tokens."""
    try:
        other = hf.load_tokenizer(reference)
    except ReallmError:
        return  # a reference may lack a tokenizer; vocabulary sizes are still compared
    if tokenizer.get_vocab() != other.get_vocab():
        raise SourceError(f"{reference}: its tokenizer is not the model's: KL and agreement need the same tokens")
