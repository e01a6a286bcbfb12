"""Cache fitted matrices for other runs, under a key of everything that a fit depends on.

The key is a hash of format, seed, weights, objective, kind of device and the code that fits, so a stale fit or a fit of
another model is never used. Without calibration, and always for embedding and lm_head, a fit is reused under any budget
that gives the matrix the same format. With calibration the objective includes the Hessian of the inputs, and these pass
through the blocks compressed before. The first matrix with another format therefore changes the Hessians of all
following blocks, which are fitted again: fitting each block to the outputs of its compressed predecessors requires it.
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

_PACKAGES = ("fit", "formats", "kernels")  # packages whose code determines the result of a fit
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class FitCache:
    """A folder of packed matrices, one file each; only the user removes them."""

    folder: Path

    def get(self, key: str, fmt: WeightFormat, shape: Shape) -> Tensors | None:
        """Return the packed tensors stored under a key; None if there are none or their checksum or layout is wrong."""
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
                intact = (file.metadata() or {}).get(_CHECKSUM) == _checksum(tensors)
        except (SafetensorError, FileNotFoundError):
            return None
        return tensors if intact and _signatures(tensors) == _signatures(fmt.layout(shape)) else None

    def store(self, key: str, tensors: Tensors) -> None:
        """Store packed tensors under a key. Errors: OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{key}.{os.getpid()}"  # several processes may store the same key
        save_tensors(tensors, partial, {_CHECKSUM: _checksum(tensors)})
        os.replace(partial, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def fit_key(fmt: WeightFormat, weight: Tensor, objective: Objective, seed: int) -> str:
    """Return the key of a fit: equal for equal inputs, kind of device and code."""
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    inputs = [to_spec(fmt), seed, device, torch.__version__, _code_sha256()]
    digest = hashlib.sha256(json.dumps(inputs).encode())
    for tensor in (weight, objective.importance, objective.hessian, objective.rows):
        _update(digest, tensor)
    return digest.hexdigest()[:32]


def _update(digest: Any, tensor: Tensor | None) -> None:
    if tensor is None:
        digest.update(b"none")
        return
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        _update(digest, tensors[name])
    return digest.hexdigest()


def _signatures(tensors: Tensors) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@functools.cache
def _code_sha256() -> str:
    """Return the sha256 of the source files in `_PACKAGES`."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
