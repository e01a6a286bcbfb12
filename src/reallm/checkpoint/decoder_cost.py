"""Cost of neural decoders at load: multiply-adds, plus seconds and memory measured on matrices of the artifact."""

from __future__ import annotations

import time
import weakref
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reallm.checkpoint.entropy_coding import decode_tensor
from reallm.checkpoint.ledger import Ledger
from reallm.checkpoint.manifest import StoredMatrix
from reallm.formats import Shape, Tensors, WeightFormat, collect_shared_decoders, to_spec, use_shared_decoders
from reallm.formats.shared_decoders import PREFIX


@dataclass(frozen=True)
class DecoderCost:
    """Decoding cost of all matrices of one format that has a neural decoder.

    `seconds` is the total on this machine; `peak_bytes` is the peak of tensor memory while one matrix is decoded.
    """

    fmt: WeightFormat
    matrices: int
    weights: int
    multiply_adds_per_weight: float
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**{k: v for k, v in asdict(self).items() if k != "fmt"}, "format": to_spec(self.fmt)}


def decoder_costs(folder: Path, ledger: Ledger) -> list[DecoderCost]:
    """Return the cost per format; one matrix of every shape is decoded from the bytes in the file to float32.

    A neural codebook runs its net once per matrix and is a look-up afterwards; with `decode_at_load`, the default, no
    net runs after loading.
    """
    groups: dict[WeightFormat, dict[Shape, list[StoredMatrix]]] = defaultdict(lambda: defaultdict(list))
    for matrix in ledger.compressed_matrices:
        if matrix.fmt.multiply_adds(matrix.shape):
            groups[matrix.fmt][matrix.shape].append(matrix)
    return [_measure_format(folder, ledger, fmt, by_shape) for fmt, by_shape in groups.items()]


def _measure_format(
    folder: Path, ledger: Ledger, fmt: WeightFormat, by_shape: dict[Shape, list[StoredMatrix]]
) -> DecoderCost:
    seconds, peak = 0.0, 0
    for matrices in by_shape.values():
        once, most = _measure_matrix(folder, ledger, matrices[0])
        seconds, peak = seconds + len(matrices) * once, max(peak, most)
    weights = sum(matrix.weights for matrices in by_shape.values() for matrix in matrices)
    products = sum(len(matrices) * fmt.multiply_adds(shape) for shape, matrices in by_shape.items())
    return DecoderCost(fmt, sum(map(len, by_shape.values())), weights, products / weights, seconds, peak)


@torch.no_grad()
def _measure_matrix(folder: Path, ledger: Ledger, matrix: StoredMatrix) -> tuple[float, int]:
    """Return (seconds, peak bytes of tensors) of decoding one matrix."""
    shared_decoders = {
        name: _read_tensors(folder, ledger, f"{PREFIX}.{name}", decoder.layout, ())
        for name, decoder in collect_shared_decoders([matrix.fmt]).items()
    }
    tensors = _read_tensors(folder, ledger, matrix.name, matrix.fmt.layout(matrix.shape), matrix.coded)
    with use_shared_decoders(shared_decoders):
        begun = time.perf_counter()
        matrix.fmt.decode(matrix.fmt.unpack(tensors, matrix.shape), matrix.shape)
        seconds = time.perf_counter() - begun
        with LiveBytes() as live:
            matrix.fmt.decode(matrix.fmt.unpack(tensors, matrix.shape), matrix.shape)
    return seconds, live.most


def _read_tensors(folder: Path, ledger: Ledger, owner: str, layout: Tensors, coded: tuple[str, ...]) -> Tensors:
    files = {row.name: row.file for row in ledger.rows}
    found = {}
    for local, like in layout.items():
        with safe_open(Path(folder) / files[f"{owner}.{local}"], framework="pt") as file:
            tensor = file.get_tensor(f"{owner}.{local}")
        found[local] = decode_tensor(tensor, like) if local in coded else tensor
    return found


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that operations inside the context create; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            self.now += nbytes
            self.most = max(self.most, self.now)
        self._holders[key] += 1
        weakref.finalize(tensor, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= nbytes
