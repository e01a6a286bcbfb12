"""Adapters: residuals for a task over one frozen compressed model, each a small folder in the form that PEFT reads.

    adapter_config.json         rank, and which modules; the scale is 1
    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (rank, in) and lora_B.weight (out, rank)

weight + left · rightᵀ: `lora_B` is the left factor and `lora_A` the right one, transposed. So an adapter is a residual
of the format `low_rank_plus`, and the one becomes the other: `merge` and `split`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reallm.artifact import StoredMatrix, check_output, read_manifest, save_tensors, work_folder
from reallm.artifact.checks import read_json
from reallm.errors import ArtifactError, FormatError
from reallm.formats import Tensors
from reallm.formats.low_rank_plus import BFLOAT16, LowRankPlus
from reallm.formats.waist import inner, under
from reallm.model.headers import Header, read_headers, read_tensor
from reallm.tune.writing import write_changed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """left · rightᵀ is added to a weight."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]


def save_adapter(factors: dict[str, Factors], folder: Path, base: str) -> None:
    """Write an adapter, by module path, into the existing folder; factors are stored as bfloat16.

    `base` is the name of the model that it belongs to.
    """
    tensors: Tensors = {}
    for path, pair in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = pair.right.T.to(torch.bfloat16)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = pair.left.to(torch.bfloat16)
    ranks = {path: pair.left.shape[1] for path, pair in factors.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    try:
        pairs = {path: _pair(folder, headers, path, config) for path in paths}
    except (ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise ArtifactError(f"{folder}: {CONFIG} holds what is no scale of an adapter ({problem})") from problem
    for path, pair in pairs.items():
        if not (torch.isfinite(pair.left).all() and torch.isfinite(pair.right).all()):
            raise ArtifactError(f"{folder}: {path} has factors that are not finite; damaged")
    return {path.removeprefix(_PREFIX): pair for path, pair in pairs.items()}


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
        """Read an adapter; it is at work once switched to.

        Errors: ArtifactError if it does not fit this model.
        """
        factors = read_adapter(folder)
        modules = dict(self.model.named_modules())
        for path, pair in factors.items():
            module, shape = modules.get(path), (pair.left.shape[0], pair.right.shape[0])
            if (getattr(module, "out_features", None), getattr(module, "in_features", None)) != shape:
                raise ArtifactError(f"{folder}: {path} of shape {shape} is no linear of this model; it is of another")
        self._loaded[name] = factors

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


def merge(artifact: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the artifact with the adapter in it, as a bfloat16 residual around each format; bits count it.

    Errors: ArtifactError if the adapter is of another model or `out` is in the way.
    """
    source, factors = Path(artifact), read_adapter(adapter)
    names = {matrix.name for matrix in read_manifest(source).matrices}
    if unknown := sorted(set(factors) - names):
        raise ArtifactError(f"{adapter}: {unknown[0]} is no compressed matrix of {artifact}; it is of another model")

    def change(matrix: StoredMatrix, stored: Tensors) -> tuple[StoredMatrix, Tensors]:
        pair = factors.get(matrix.name)
        if pair is None:
            return matrix, stored
        if (pair.left.shape[0], pair.right.shape[0]) != matrix.shape:
            raise ArtifactError(f"{adapter}: {matrix.name} has another shape than in {artifact}")
        fmt = LowRankPlus(matrix.fmt, pair.left.shape[1])
        try:
            fmt.check(matrix.shape)
        except FormatError as error:
            raise ArtifactError(f"{adapter}: {matrix.name}: {error}") from error
        packed = fmt.pack_factor("left", pair.left) | fmt.pack_factor("right", pair.right)
        coded = tuple(f"base.{name}" for name in matrix.coded)
        return replace(matrix, fmt=fmt, coded=coded), packed | under("base", stored)

    _written(Path(out), lambda folder: write_changed(source, folder, change, {"adapter": "merged"}))


def split(artifact: str | Path, base: str | Path, adapter: str | Path) -> None:
    """The inverse of `merge`: the artifact without the residuals that lie outermost, and these as an adapter.

    Errors: ArtifactError if there are none, or a folder to write is in the way.
    """
    source, base, adapter = Path(artifact), Path(base), Path(adapter)
    check_output(adapter)
    factors: dict[str, Factors] = {}

    def change(matrix: StoredMatrix, stored: Tensors) -> tuple[StoredMatrix, Tensors]:
        fmt = matrix.fmt
        if not isinstance(fmt, LowRankPlus) or fmt.factors != BFLOAT16:
            return matrix, stored
        if {"left", "right"} & set(matrix.coded):
            raise ArtifactError(f"{artifact}: {matrix.name} has an entropy-coded residual; reallm.unpack it first")
        factors[matrix.name] = Factors(*(fmt.unpack_factor(side, stored) for side in ("left", "right")))
        coded = tuple(name.removeprefix("base.") for name in matrix.coded)
        return replace(matrix, fmt=fmt.base, coded=coded), inner("base", stored)

    def write(folder: Path) -> None:
        write_changed(source, folder, change, {"adapter": "split off"})
        if not factors:
            raise ArtifactError(f"{artifact}: no format of it is low_rank_plus with bfloat16 factors; nothing to split")

    _written(base, write)
    _written(adapter, lambda folder: save_adapter(factors, folder, base.name))


def _written(out: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written beside its place, and put it there by one rename."""
    check_output(out)
    work = work_folder(out)
    work.mkdir()
    try:
        write(work)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pair(folder: Path, headers: dict[str, Header], path: str, config: dict[str, Any]) -> Factors:
    """The factors of one module; both keys of a pattern are looked up as PEFT does, by the end of the path."""
    down, up = (read_tensor(headers[f"{path}.lora_{side}.weight"]).to(torch.float32) for side in "AB")
    alpha = _of_pattern(config.get("alpha_pattern"), path, float(config.get("lora_alpha", down.shape[0])))
    rank = math.sqrt(down.shape[0]) if config.get("use_rslora") else down.shape[0]
    return Factors(up * (alpha / rank), down.T.contiguous())


def _are_floats(*headers: Header) -> bool:
    return all(header.dtype.is_floating_point for header in headers)


def _of_pattern(pattern: Any, path: str, usual: float) -> float:
    found = [value for key, value in (pattern or {}).items() if path == key or path.endswith(f".{key}")]
    return float(found[0] if found else usual)


def _adding(pair: Factors) -> Callable[..., Tensor]:
    """A forward hook that adds what the residual makes of the inputs."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        right, left = (factor.to(x.device, x.dtype) for factor in (pair.right, pair.left))
        return output + (x @ right) @ left.T

    return hook
