"""Adapters in a loaded model: residuals of the form that PEFT's LoRA has, read from a folder and added by hooks.

adapter_config.json         rank, and which modules; the scale is alpha / rank
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

from reallm.artifact.checks import read_json
from reallm.errors import ArtifactError
from reallm.model.headers import Header, read_headers, read_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Kinds of first factors that PEFT subtracts from the base's weights, which it changes for that.
TAKEN_OUT = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Before `source_sha256` of the artifact that it was trained over, as the base's `revision` in CONFIG: a field of PEFT,
# which keeps it. Metadata of WEIGHTS come in any order, so that equal adapters had other bytes.
REVISION = "sha256:"


@dataclass(frozen=True)
class Factors:
    """left · rightᵀ is added to a weight."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]


def read_adapter(folder: str | Path) -> dict[str, Factors]:
    """An adapter's factors by module path, float32, the scale put into the left ones.

    Errors: ArtifactError if it is not a LoRA adapter, damaged, or of a kind that is more than two factors.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder}: is no adapter: it lacks {CONFIG} or {WEIGHTS}")
    config = read_json(folder / CONFIG, ArtifactError)
    headers = read_headers([folder / WEIGHTS], ArtifactError)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ArtifactError(f"{folder}: only plain LoRA adapters can be read")
    if str(begun := config.get("init_lora_weights")).startswith(TAKEN_OUT):
        raise ArtifactError(
            f"{folder}: init_lora_weights={begun!r} took its first factors out of the weights of its base, "
            "which a compressed one still has; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    paths = [name.removesuffix(".lora_A.weight") for name in headers if name.endswith(".lora_A.weight")]
    if len(headers) != 2 * len(paths) or not all(f"{path}.lora_B.weight" in headers for path in paths):
        raise ArtifactError(f"{folder}: holds other tensors than pairs of lora_A and lora_B; only these can be read")
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
        raise ArtifactError(f"{folder}: {CONFIG} holds what is no scale of an adapter ({problem})") from problem
    for path, pair in pairs.items():
        if not (torch.isfinite(pair.left).all() and torch.isfinite(pair.right).all()):
            raise ArtifactError(f"{folder}: {path} has factors that are not finite; damaged")
    return {path.removeprefix(PREFIX): pair for path, pair in pairs.items()}


def check_base(folder: str | Path, provenance: Mapping[str, Any] | None) -> None:
    """Whether an adapter was trained over an artifact of the same original, as far as both say so.

    `provenance` is the artifact's; None for a model that is none.
    Errors: ArtifactError naming both.
    """
    revision = read_json(Path(folder) / CONFIG, ArtifactError).get("revision")
    if not isinstance(revision, str) or not revision.startswith(REVISION):
        return
    if provenance is None:
        raise ArtifactError(
            f"{folder}: was trained over a compressed model, whose errors it makes up for, and this one is not "
            "compressed; name the folder that reallm compress wrote"
        )
    trained, here = revision.removeprefix(REVISION), provenance.get("source_sha256")
    if isinstance(here, str) and trained != here:
        raise ArtifactError(
            f"{folder}: was trained over a model made of {trained:.12}…, and this one is made of {here:.12}… (sha256 "
            "of the originals' weights); it is of another base"
        )


class Adapters:
    """Adapters in a loaded model, compressed or not, of which one, several or none are at work.

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
        """Those that are loaded."""
        return list(self._loaded)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter; it is at work once switched to, at once in place of one of its name that is.

        Errors: ArtifactError if it does not fit this model.
        """
        self.take(name, folder, read_adapter(folder))

    def take(self, name: str, folder: str | Path, factors: dict[str, Factors]) -> None:
        """`load` of a folder whose factors have been read."""
        check_base(folder, _provenance(self.model))
        modules = dict(self.model.named_modules())
        for path, pair in factors.items():
            module, shape = modules.get(path), (pair.left.shape[0], pair.right.shape[0])
            if (getattr(module, "out_features", None), getattr(module, "in_features", None)) != shape:
                raise ArtifactError(f"{folder}: {path} of shape {shape} is no linear of this model; it is of another")
        self._loaded[name] = factors
        if name in self.active:
            self.switch(*self.active)

    def switch(self, *names: str) -> None:
        """Only the adapters named are at work from now on, added up; none without a name.

        Errors: ArtifactError for a name that is not loaded.
        """
        for name in names:
            if name not in self._loaded:
                raise ArtifactError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names) or 'none'}")
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self.model.get_submodule(path).register_forward_hook(_adding(pair))
            for name in names
            for path, pair in self._loaded[name].items()
        ]
        self.active = names


def _provenance(model: nn.Module) -> Mapping[str, Any] | None:
    """That of the artifact which a model was loaded from; None for others."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(quantization, "provenance", None)


def _pair(folder: Path, headers: dict[str, Header], path: str, config: dict[str, Any]) -> Factors:
    """The factors of one module; both keys of a pattern are looked up as PEFT does, by the end of the path."""
    down, up = (read_tensor(headers[f"{path}.lora_{side}.weight"]).to(torch.float32) for side in "AB")
    alpha = float(_of_pattern(config.get("alpha_pattern"), path, float(config.get("lora_alpha", down.shape[0]))))
    rank = math.sqrt(down.shape[0]) if config.get("use_rslora") else down.shape[0]
    return Factors(up * (alpha / rank), down.T.contiguous())


def _check_rank(folder: Path, path: str, rank: int, config: dict[str, Any]) -> None:
    """Errors: ArtifactError if the config says another rank than a module's factors have; PEFT could not read them."""
    said, pattern = config.get("r"), config.get("rank_pattern")
    if isinstance(pattern, dict) and pattern:
        # PEFT also takes expressions for keys: what none of the plain ones names is left to the factors.
        said = _of_pattern(pattern, path, None)
    if type(said) is int and said != rank:
        raise ArtifactError(f"{folder}: {path} has factors of rank {rank}, {CONFIG} says {said}; they do not match")


def _are_floats(*headers: Header) -> bool:
    return all(header.dtype.is_floating_point for header in headers)


def _of_pattern(pattern: Any, path: str, usual: Any) -> Any:
    """The value of the first key that ends the path, as PEFT looks it up."""
    found = [value for key, value in (pattern or {}).items() if path == key or path.endswith(f".{key}")]
    return found[0] if found else usual


def _adding(pair: Factors) -> Callable[..., Tensor]:
    """A forward hook that adds what the residual makes of the inputs."""

    right, left = pair.right, pair.left

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal right, left
        x = inputs[0]
        if (right.device, right.dtype) != (x.device, x.dtype):  # once, not at every token
            right, left = (factor.to(x.device, x.dtype) for factor in (pair.right, pair.left))
        return output + (x @ right) @ left.T

    return hook
