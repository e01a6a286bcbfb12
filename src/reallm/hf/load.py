"""Load a model: a compressed artifact or an original model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from reallm.checkpoint.headers import read_headers, weight_files
from reallm.checkpoint.manifest import QUANT_METHOD, read_manifest
from reallm.checkpoint.validation import read_json, suffix_of
from reallm.errors import ArtifactError, SourceError
from reallm.hf.adapters import Adapters, check_base, read_adapter
from reallm.hf.modules import DECODE_AT_LOAD, check_mode
from reallm.source.limits import error_line, loading_limits
from reallm.source.model_source import device_options, open_source, read_config, refuse_adapter
from reallm.source.transformers_logging import silence_transformers


def load(
    path: str | Path,
    mode: str = DECODE_AT_LOAD,
    device: str | torch.device | int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    adapter: str | Path | None = None,
) -> nn.Module:
    """Return a model in eval mode: a compressed artifact in `mode`, or an original folder, hub id or GGUF file.

    `dtype` is the compute dtype, the model's own by default. `verify` compares an artifact with its checksums first.
    `adapter` is a folder with a LoRA adapter, written by reallm or PEFT, whose residuals are added to the outputs of
    the model's linears.
    Errors: ArtifactError, FormatError or SourceError, one line with the remedy.
    """
    check_mode(mode)
    factors = None if adapter is None else read_adapter(adapter)  # first: loading the model may take minutes
    if not is_artifact(path):
        if adapter is not None:
            check_base(adapter, None)
        model = open_source(path).load(dtype, device).eval()
    else:
        model = _load_artifact(Path(path).expanduser(), mode, device, dtype, verify).eval()
    if adapter is not None and factors is not None:
        adapters = Adapters(model)
        adapters.add("", adapter, factors)
        adapters.switch("")
    return model


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of an artifact or an original model.

    Errors: SourceError if there is none, or if it would run code from the folder.
    """
    from transformers import AutoTokenizer

    from reallm.source.gguf import require_gguf
    from reallm.source.gguf_tokenizer import gguf_tokenizer

    place = Path(path).expanduser()
    try:
        if suffix_of(place) == ".gguf" and place.is_file():
            require_gguf()
            return gguf_tokenizer(place)
        folder = place if place.is_dir() else open_source(path).folder
        refuse_adapter(folder)
        if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.bpe")):
            raise SourceError(f"{path}: has no tokenizer files; copy the tokenizer of the original model there")
        with silence_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except SourceError:
        raise
    except Exception as problem:  # tokenizers raise errors of any type on damaged files
        raise SourceError(f"{path}: the tokenizer cannot be read ({error_line(problem)})") from problem


def is_artifact(path: str | Path) -> bool:
    """Return whether a path is a folder that reallm wrote, by its config alone."""
    file = Path(path).expanduser() / "config.json"
    try:
        config = read_json(file)
    except ArtifactError:
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _load_artifact(folder: Path, mode: str, device: Any, dtype: torch.dtype | None, verify: bool) -> nn.Module:
    """Load an artifact; everything that the files tell is checked before transformers builds the model."""
    from transformers import AutoModelForCausalLM

    from reallm.hf.quantizer import register_with_transformers, replace_mode

    read_manifest(folder)
    headers = read_headers(weight_files(folder, ArtifactError), ArtifactError)
    options = device_options(device)
    register_with_transformers()
    config = read_config(folder, str(folder))
    config.quantization_config = replace_mode(config.quantization_config, mode, verify)
    with silence_transformers(), loading_limits(str(folder), ArtifactError, len(headers)):
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, **options
        )
