"""Pack any state dict into one file under a hard byte limit, as contests for small artifacts require. Needs no model.

    "RLM1" │ uint32 length of header │ uint32 crc32 of the rest │ header, JSON by zlib │ tensors │ code files

The solver of the other budgets chooses formats, without data: the relative error per weight has equal importance in
every matrix. docs/artifact.md documents the file format; `reallm.checkpoint.unpack` reads it with numpy alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reallm.allocate import MatrixInfo, Plan
from reallm.allocate.options import LEAST_SHARE, Option, find_option, matrix_options, solve_plan
from reallm.checkpoint import encode_tensor
from reallm.checkpoint import unpack as decoder
from reallm.checkpoint.validation import PICKLES, suffix_of
from reallm.errors import ArtifactError, RecipeError, SourceError
from reallm.fit import Objective, fit
from reallm.formats import Shape, Tensors, WeightFormat, to_spec
from reallm.formats.codebook import Codebook
from reallm.formats.dense import Dense
from reallm.formats.entropy_coded import EntropyCoded
from reallm.formats.normal_float import NormalFloat
from reallm.formats.uniform import Uniform
from reallm.pipeline.loss_analysis import measure_format

_MIN_WEIGHTS = 2048  # smaller tensors (norms, biases, gates) stay unquantized
_SAMPLE = 1 << 16  # weights of a tensor on which candidates are measured: 46 of them take 2 s
_ROUNDS, _GUESSES = 10, 6
_SWAP_PENALTY = 0.1  # for changing the format of a fitted matrix, in units of the mean loss of a matrix
_DTYPE_NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


@dataclass(frozen=True)
class PackReport:
    """Result of `pack`: bytes of the file and of the limit, and errors measured by reading the file back."""

    nbytes: int
    max_bytes: int
    decoder_nbytes: int  # of the decoder's source file, raw and compressed by zlib
    decoder_zlib_nbytes: int
    parameters: int
    relative_error: float  # Σ (difference)² / Σ weight², over all floating tensors
    worst: tuple[str, float]  # the tensor with the largest relative error
    exact: int  # tensors that are restored bit for bit
    tied: dict[str, str]  # tensors equal to another tensor, which is stored once
    rows: tuple[dict[str, Any], ...]  # name, format, bytes, relative error

    @property
    def margin(self) -> int:
        """Return the bytes below the limit."""
        return self.max_bytes - self.nbytes


@dataclass(frozen=True)
class _StateDict:
    """A state dict, split by how its tensors are stored."""

    matrices: dict[str, Tensor]  # stored in formats, reshaped to two axes
    exact: dict[str, Tensor]
    tied: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]


def pack(
    state: str | Path,
    out: str | Path,
    max_bytes: int,
    extra_files: Sequence[str | Path] = (),
    seed: int = 0,
    device: str = "cpu",
) -> PackReport:
    """Pack a safetensors state dict and code files into one file of at most `max_bytes` bytes, and read it back.

    Errors: SourceError for a state dict that cannot be read or is not finite; RecipeError naming the smallest possible
    limit; ArtifactError if `out` exists.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ArtifactError(f"{out} exists; give another --output or remove it")
    original = _load(Path(state))
    split = _classify_tensors(original)
    code = {
        Path(file).name: lzma.compress(_read_file(Path(file)), preset=9 | lzma.PRESET_EXTREME) for file in extra_files
    }
    infos = [MatrixInfo(n, (t.shape[0], t.shape[1]), "other", "block") for n, t in split.matrices.items()]
    packer = _Packer(split, code, seed, device)
    data = _solve(packer, infos, max_bytes)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(data)
    report = _verify_file(partial, original, split, packer, max_bytes)
    os.replace(partial, out)
    return report


class _Packer:
    """Fits matrices and renders files; a matrix is fitted once in each format that is tried."""

    def __init__(self, split: _StateDict, code: dict[str, bytes], seed: int, device: str) -> None:
        self.split, self.code, self.seed, self.device = split, code, seed, device
        self.fitted: dict[tuple[str, WeightFormat], list[tuple[str, Tensor, Tensor | None]]] = {}
        self.exact = {name: _encode_tensors({"values": tensor}) for name, tensor in split.exact.items()}
        self.plan = Plan((), "pack")

    def fit(self, name: str, fmt: WeightFormat) -> list[tuple[str, Tensor, Tensor | None]]:
        """Return (local name, raw tensor, coded tensor or None) of a matrix; fit it if it has not been fitted."""
        if (name, fmt) not in self.fitted:
            weight = self.split.matrices[name].to(self.device, torch.float32)
            shape = (weight.shape[0], weight.shape[1])
            with torch.no_grad():
                tensors = fmt.pack(fit(fmt, weight, Objective.relative_columns(weight), self.seed), shape)
            self.fitted[name, fmt] = _encode_tensors(tensors)
        return self.fitted[name, fmt]

    def nbytes(self, name: str, fmt: WeightFormat) -> int:
        """Return the stored bytes of a fitted matrix."""
        return sum(_stored_tensor(raw, coded).nbytes for _, raw, coded in self.fitted[name, fmt])

    def render(self, plan: Plan) -> bytes:
        """Return the contents of the file."""
        self.plan = plan
        formats = {entry.matrix.name: entry.fmt for entry in plan.entries}
        entries, blobs = [], []
        for name in self.split.shapes:
            if name in self.split.tied:
                continue
            fmt = formats.get(name)
            stored = self.exact[name] if fmt is None else self.fit(name, fmt)
            entries.append(_entry(name, self.split, fmt, stored))
            blobs += [_tensor_bytes(_stored_tensor(raw, coded)) for _, raw, coded in stored]
        header = {
            "tensors": entries,
            "same": self.split.tied,
            "files": [[name, len(data)] for name, data in self.code.items()],
        }
        text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        body = b"".join([text, *blobs, *self.code.values()])
        return decoder.MAGIC + len(text).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


def _solve(packer: _Packer, infos: Sequence[MatrixInfo], max_bytes: int) -> bytes:
    """Return the file with the least error within the limit: chosen by samples, corrected by bytes of real fits."""
    weights = sum(info.weights for info in infos)
    samples = {info.name: {} for info in infos}

    def sample(info: MatrixInfo, fmt: WeightFormat) -> Any:
        measured = samples[info.name]
        if fmt not in measured:
            weight = packer.split.matrices[info.name].to(packer.device, torch.float32)
            measured[fmt] = measure_format(fmt, weight, packer.seed, max(8, _SAMPLE // weight.shape[1]))
        return measured[fmt]

    options = matrix_options(
        infos,
        lambda info: pack_candidates(packer.split.dtypes[info.name]),
        lambda info, fmt: sample(info, fmt).error * info.weights / weights,
        lambda info, fmt: sample(info, fmt).share,
    )
    smallest = Plan(tuple(_extreme_entries(infos, options)), "pack")
    least = len(packer.render(smallest))
    if least > max_bytes:
        code = sum(map(len, packer.code.values()))
        raise RecipeError(
            f"--max-bytes {max_bytes:,} is too small: the smallest possible file is {least:,} bytes "
            f"({code:,} of code files)"
        )
    # Headers differ by a few bytes per matrix between formats, so the overhead is measured after every round.
    overhead = least - sum(packer.nbytes(entry.matrix.name, entry.fmt) for entry in smallest.entries)
    plan = solve_plan(infos, options, max(max_bytes, overhead + _min_nbytes(options)), overhead=overhead)
    best = smallest
    for number in range(_ROUNDS):
        data = packer.render(plan)
        if len(data) <= max_bytes:
            if _loss(plan, options) < _loss(best, options):
                best = plan
            if len(data) >= LEAST_SHARE * max_bytes:
                break
        overhead = len(data) - sum(packer.nbytes(entry.matrix.name, entry.fmt) for entry in plan.entries)
        nbytes_fn = _option_nbytes(packer, guess=number < _GUESSES)
        penalty = _SWAP_PENALTY * _loss(plan, options) / max(len(plan.entries), 1)
        try:
            changed = solve_plan(
                infos, options, max_bytes, overhead=overhead, base=plan, nbytes_fn=nbytes_fn, swap_penalty=penalty
            )
        except RecipeError:
            break
        if changed == plan:
            break
        plan = changed
    return packer.render(best)


def _option_nbytes(packer: _Packer, guess: bool) -> Callable[[MatrixInfo, Option], int]:
    """Return a function for the bytes of an option: measured if fitted, else predicted (`guess`) or before coding."""

    def nbytes(info: MatrixInfo, option: Option) -> int:
        if (info.name, option.fmt) in packer.fitted:
            return packer.nbytes(info.name, option.fmt)
        return option.nbytes if guess else option.fmt.nbytes(info.shape)

    return nbytes


def pack_candidates(dtype: torch.dtype) -> list[WeightFormat]:
    """Return the formats that the numpy decoder supports."""
    uniform = [Uniform(bits=b, group_size=g, symmetric=True, scales=s) for b in range(2, 9) for g, s in _GROUPS]
    floats = [NormalFloat(bits=b) for b in (3, 4, 5)]
    vectors = [Codebook(index_bits=i, vector_dim=2) for i in (4, 6, 8)]
    dense = [Dense(dtype="float16" if dtype == torch.float16 else "bfloat16")]
    lattice = []
    if importlib.util.find_spec("constriction") is not None:
        lattice = [EntropyCoded(bits=q / 4, largest=31 if q < 16 else 127) for q in range(4, 29)]
    return [*uniform, *floats, *vectors, *lattice, *dense]


_GROUPS = ((0, "float16"), (64, "two_level"))


def _extreme_entries(infos: Sequence[MatrixInfo], options: Any) -> list[Any]:
    from reallm.allocate import PlanEntry

    return [PlanEntry(info, min(options[info.name], key=lambda o: (o.nbytes, o.loss)).fmt) for info in infos]


def _min_nbytes(options: Any) -> int:
    return sum(min(option.nbytes for option in candidates) for candidates in options.values())


def _loss(plan: Plan, options: Any) -> float:
    return sum(find_option(entry, options).loss for entry in plan.entries)


def _load(path: Path) -> dict[str, Tensor]:
    if suffix_of(path) in PICKLES:
        raise SourceError(
            f"{path}: a pickle can run code when it is read; save the state dict with safetensors and pass that file"
        )
    if not path.is_file():
        raise SourceError(f"{path}: no such file; pass a state dict saved with safetensors")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: not a safetensors file ({error})") from error
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise SourceError(f"{path}: {name} has dtype {tensor.dtype}, which cannot be packed")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SourceError(f"{path}: {name} has weights that are NaN or infinite")
    return state


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def _classify_tensors(state: dict[str, Tensor]) -> _StateDict:
    """Split a state dict into matrices, exact tensors, and tensors equal to another one bit for bit."""
    owners: dict[bytes, str] = {}
    matrices, exact, tied = {}, {}, {}
    for name, tensor in state.items():
        identity = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        owner = owners.setdefault(hashlib.sha256(identity + _tensor_bytes(tensor)).digest(), name)
        if owner != name:
            tied[name] = owner
        elif tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() >= _MIN_WEIGHTS:
            matrices[name] = tensor.reshape(tensor.shape[0], -1)
        else:
            exact[name] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _StateDict(matrices, exact, tied, shapes, {name: tensor.dtype for name, tensor in state.items()})


def _encode_tensors(tensors: Tensors) -> list[tuple[str, Tensor, Tensor | None]]:
    return [(name, tensor.cpu().contiguous(), encode_tensor(tensor)) for name, tensor in tensors.items()]


def _stored_tensor(raw: Tensor, coded: Tensor | None) -> Tensor:
    return raw if coded is None else coded


def _entry(
    name: str, split: _StateDict, fmt: WeightFormat | None, stored: list[tuple[str, Tensor, Tensor | None]]
) -> dict[str, Any]:
    matrix: Shape | None = None
    if fmt is not None:
        matrix = (split.matrices[name].shape[0], split.matrices[name].shape[1])
    return {
        "name": name,
        "dtype": _DTYPE_NAMES[split.dtypes[name]],
        "shape": list(split.shapes[name]),
        "matrix": matrix,
        "format": None if fmt is None else to_spec(fmt),
        "stored": [
            [local, _DTYPE_NAMES[raw.dtype], list(raw.shape), _stored_tensor(raw, coded).nbytes, coded is not None]
            for local, raw, coded in stored
        ],
    }


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _verify_file(
    path: Path, original: dict[str, Tensor], split: _StateDict, packer: _Packer, max_bytes: int
) -> PackReport:
    """Read the file back with the numpy decoder, compare it with the original, and return the report."""
    found = decoder.unpack(path)
    formats = {entry.matrix.name: entry.fmt for entry in packer.plan.entries}
    error = energy = 0.0
    rows, exact = [], 0
    for name, tensor in original.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype, (
            f"{name}: wrong shape or dtype after unpacking"
        )
        squared_error = (
            np.square(expected.astype(np.float64) - found[name]).sum() if tensor.is_floating_point() else 0.0
        )
        squared_norm = np.square(expected.astype(np.float64)).sum() if tensor.is_floating_point() else 0.0
        exact += int(np.array_equal(expected, found[name]))
        assert name in formats or name in split.tied or np.array_equal(expected, found[name]), (
            f"{name}: not restored exactly"
        )
        error, energy = error + squared_error, energy + squared_norm
        if name in formats:
            fmt = formats[name]
            nbytes = packer.nbytes(name, fmt)
            rows.append(
                {
                    "name": name,
                    "format": to_spec(fmt),
                    "nbytes": nbytes,
                    "error": float(squared_error / (squared_norm or 1.0)),
                }
            )
    worst = max(rows, key=lambda row: row["error"], default={"name": "", "error": 0.0})
    text = Path(decoder.__file__).read_bytes()
    return PackReport(
        nbytes=path.stat().st_size,
        max_bytes=max_bytes,
        decoder_nbytes=len(text),
        decoder_zlib_nbytes=len(zlib.compress(text, 9)),
        parameters=sum(math.prod(shape) for name, shape in split.shapes.items() if name not in split.tied),
        relative_error=float(error / (energy or 1.0)),
        worst=(worst["name"], worst["error"]),
        exact=exact,
        tied=split.tied,
        rows=tuple(rows),
    )
