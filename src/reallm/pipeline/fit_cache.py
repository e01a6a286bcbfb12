"""Fitted matrices kept for other runs, found again by all that a fit depends on.

The key is a hash of format, seed, weights and objective, of the device's kind and of the code that fits, so that
nothing stale and nothing of another model is ever taken. Without calibration, and for embedding and head always, a
matrix is found again under any budget that gives it the same format. With calibration the objective holds the second moments
of the inputs, which come through the blocks compressed before: the first matrix in another format gives all blocks
behind it other second moments, and they are fitted again. That is what fitting along the stream is for, and no key could
spare it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reallm.checkpoint import save_tensors
from reallm.fit import Objective
from reallm.formats import Shape, Tensors, WeightFormat, to_spec

_PACKAGES = ("fit", "formats", "kernels")  # whose code decides what a fit gives
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class FitCache:
    """A folder of packed matrices, one file each; nobody but the user removes them."""

    folder: Path

    def get(self, key: str, fmt: WeightFormat, shape: Shape) -> Tensors | None:
        """The packed tensors under a key; None if they are not there, or not as they were put there."""
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
                whole = (file.metadata() or {}).get(_CHECKSUM) == _checksum(tensors)
        except (SafetensorError, FileNotFoundError):
            return None
        return tensors if whole and _kinds(tensors) == _kinds(fmt.layout(shape)) else None

    def put(self, key: str, tensors: Tensors) -> None:
        """Put packed tensors under a key. Errors: OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{key}.{os.getpid()}"  # several processes may find the same
        save_tensors(tensors, own, {_CHECKSUM: _checksum(tensors)})
        os.replace(own, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def fit_key(fmt: WeightFormat, weight: Tensor, objective: Objective, seed: int) -> str:
    """Name of a fit: equal for equal inputs, on one kind of device, by the same code."""
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    facts = [to_spec(fmt), seed, device, torch.__version__, _code()]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for tensor in (weight, objective.importance, objective.hessian, objective.rows):
        _add(digest, tensor)
    return digest.hexdigest()[:32]


def _add(digest: Any, tensor: Tensor | None) -> None:
    if tensor is None:
        digest.update(b"none")
        return
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        _add(digest, tensors[name])
    return digest.hexdigest()


def _kinds(tensors: Tensors) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@functools.cache
def _code() -> str:
    """sha256 of the sources that fits come from."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
