"""Adapters in a loaded model: LoRA residuals in PEFT's format, read from a folder and added by forward hooks.

adapter_config.json         rank, alpha and target modules; the scale is alpha / rank
adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (rank, in) and lora_B.weight (out, rank)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reallm.checkpoint.headers import Header, read_headers, read_tensor
from reallm.checkpoint.validation import read_json
from reallm.errors import ArtifactError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Values of init_lora_weights for which PEFT subtracts the initial factors from the weights of its base.
RESIDUAL_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Prefix of the base artifact's `source_sha256` in the field `revision` of CONFIG, which PEFT preserves. Metadata of
# WEIGHTS would be written in any order, so that equal adapters had different bytes.
REVISION = "sha256:"


@dataclass(frozen=True)
class Factors:
    """Low-rank factors; left · rightᵀ is added to a weight."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]


def read_adapter(folder: str | Path) -> dict[str, Factors]:
    """Return an adapter's factors by module path, in float32, the left ones multiplied by the scale.

    Errors: ArtifactError if it is not a LoRA adapter, is damaged, or has more than two factors per module.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder}: is no adapter: it lacks {CONFIG} or {WEIGHTS}")
    config = read_json(folder / CONFIG, ArtifactError)
    headers = read_headers([folder / WEIGHTS], ArtifactError)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ArtifactError(f"{folder}: only plain LoRA adapters can be read")
    if str(init := config.get("init_lora_weights")).startswith(RESIDUAL_INITS):
        raise ArtifactError(
            f"{folder}: init_lora_weights={init!r} took its first factors out of the weights of its base, "
            "but a compressed model still contains them; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    paths = [name.removesuffix(".lora_A.weight") for name in headers if name.endswith(".lora_A.weight")]
    if len(headers) != 2 * len(paths) or not all(f"{path}.lora_B.weight" in headers for path in paths):
        raise ArtifactError(f"{folder}: contains tensors other than pairs of lora_A and lora_B; only these can be read")
    for path in paths:
        down, up = (headers[f"{path}.lora_{side}.weight"] for side in "AB")
        ranks = {down.shape[0], up.shape[-1]} if len(down.shape) == len(up.shape) == 2 else set()
        if len(ranks) != 1 or 0 in (*down.shape, *up.shape) or not _are_floats(down, up):
            raise ArtifactError(
                f"{folder}: {path} has factors of shapes {down.shape} and {up.shape}; they do not match"
            )
        _check_rank(folder, path, down.shape[0], config)
    try:
        pairs = {path: _pair(folder, headers, path, config) for path in paths}
    except (ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise ArtifactError(f"{folder}: {CONFIG} has an invalid scale ({problem})") from problem
    for path, pair in pairs.items():
        if not (torch.isfinite(pair.left).all() and torch.isfinite(pair.right).all()):
            raise ArtifactError(f"{folder}: {path} has factors that are not finite; damaged")
    return {path.removeprefix(PREFIX): pair for path, pair in pairs.items()}


def check_base(folder: str | Path, provenance: Mapping[str, Any] | None) -> None:
    """Raise ArtifactError if an adapter was trained over an artifact of another source model.

    `provenance` is the artifact's, None for a model that is not compressed. Without a recorded base it passes.
    """
    revision = read_json(Path(folder) / CONFIG, ArtifactError).get("revision")
    if not isinstance(revision, str) or not revision.startswith(REVISION):
        return
    if provenance is None:
        raise ArtifactError(
            f"{folder}: was trained over a compressed model, whose errors it makes up for, and this one is not "
            "compressed; give the folder that reallm compress wrote"
        )
    trained, here = revision.removeprefix(REVISION), provenance.get("source_sha256")
    if isinstance(here, str) and trained != here:
        raise ArtifactError(
            f"{folder}: was trained over a compressed model of source {trained:.12}…, but this model's source is "
            f"{here:.12}… (sha256 of the source weights); it is of another base"
        )


class Adapters:
    """Adapters in a loaded model, compressed or not; none, one or several are active.

    >>> adapters = Adapters(reallm.load("OUT"))
    >>> adapters.load("french", "FRENCH"); adapters.switch("french"); adapters.switch()
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._loaded: dict[str, dict[str, Factors]] = {}
        self._hooks: list[Any] = []
        self.active: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Return the names of the loaded adapters."""
        return list(self._loaded)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter; `switch` activates it. If an adapter of this name is active, it is replaced at once.

        Errors: ArtifactError if it does not fit this model.
        """
        self.add(name, folder, read_adapter(folder))

    def add(self, name: str, folder: str | Path, factors: dict[str, Factors]) -> None:
        """Add an adapter whose factors have been read; otherwise as `load`."""
        check_base(folder, _provenance(self.model))
        modules = dict(self.model.named_modules())
        for path, pair in factors.items():
            module, shape = modules.get(path), (pair.left.shape[0], pair.right.shape[0])
            if (getattr(module, "out_features", None), getattr(module, "in_features", None)) != shape:
                raise ArtifactError(
                    f"{folder}: {path} of shape {shape} is no linear of this model; the adapter belongs to another"
                )
        self._loaded[name] = factors
        if name in self.active:
            self.switch(*self.active)

    def switch(self, *names: str) -> None:
        """Activate exactly the named adapters, whose residuals are added up; without names none is active.

        Errors: ArtifactError for a name that is not loaded.
        """
        for name in names:
            if name not in self._loaded:
                raise ArtifactError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names) or 'none'}")
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self.model.get_submodule(path).register_forward_hook(_residual_hook(pair))
            for name in names
            for path, pair in self._loaded[name].items()
        ]
        self.active = names


def _provenance(model: nn.Module) -> Mapping[str, Any] | None:
    """Return the provenance of the artifact that a model was loaded from; None for other models."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(quantization, "provenance", None)


def _pair(folder: Path, headers: dict[str, Header], path: str, config: dict[str, Any]) -> Factors:
    """Return the scaled factors of one module; keys of `alpha_pattern` match the end of the path, as in PEFT."""
    down, up = (read_tensor(headers[f"{path}.lora_{side}.weight"]).to(torch.float32) for side in "AB")
    alpha = float(_match_pattern(config.get("alpha_pattern"), path, float(config.get("lora_alpha", down.shape[0]))))
    rank = math.sqrt(down.shape[0]) if config.get("use_rslora") else down.shape[0]
    return Factors(up * (alpha / rank), down.T.contiguous())


def _check_rank(folder: Path, path: str, rank: int, config: dict[str, Any]) -> None:
    """Raise ArtifactError if the config's rank is not the rank of a module's factors; PEFT could not read them."""
    stated, pattern = config.get("r"), config.get("rank_pattern")
    if isinstance(pattern, dict) and pattern:
        # PEFT also accepts regular expressions as keys: without a plain key that matches, the rank is not checked.
        stated = _match_pattern(pattern, path, None)
    if type(stated) is int and stated != rank:
        raise ArtifactError(f"{folder}: {path} has factors of rank {rank}, {CONFIG} says {stated}; they do not match")


def _are_floats(*headers: Header) -> bool:
    return all(header.dtype.is_floating_point for header in headers)


def _match_pattern(pattern: Any, path: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of the path, as PEFT does; else `default`."""
    found = [value for key, value in (pattern or {}).items() if path == key or path.endswith(f".{key}")]
    return found[0] if found else default


def _residual_hook(pair: Factors) -> Callable[..., Tensor]:
    """Return a forward hook that adds the residual's product with the inputs."""

    right, left = pair.right, pair.left

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal right, left
        x = inputs[0]
        if (right.device, right.dtype) != (x.device, x.dtype):  # once, not for every token
            right, left = (factor.to(x.device, x.dtype) for factor in (pair.right, pair.left))
        return output + (x @ right) @ left.T

    return hook
