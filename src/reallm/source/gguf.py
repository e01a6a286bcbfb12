"""Read GGUF files with transformers' conversions, one tensor at a time and faster."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reallm.checkpoint.headers import Header, fill_buffer
from reallm.errors import SourceError
from reallm.source.limits import error_line
from reallm.source.transformers_logging import silence_transformers

# With these processors, transformers' result for a parameter depends only on the tensors of that parameter.
_SUPPORTED_PROCESSORS = (
    "TensorProcessor",
    "LlamaTensorProcessor",  # interleaves the rotary halves of q and k
    "Qwen2MoeTensorProcessor",  # fuses gate and up
    "BloomTensorProcessor",
    "GPT2TensorProcessor",  # transposes Conv1D
    "MambaTensorProcessor",
    "NemotronTensorProcessor",
    "Gemma2TensorProcessor",  # stores norms + 1
)


def require_gguf() -> None:
    """Raise SourceError with the pip command if a package that reading GGUF needs is not installed."""
    import importlib.util

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise SourceError(f"reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that read a GGUF file into dense weights."""
    import transformers

    arguments: dict[str, Any] = {"gguf_file": path.name}
    # Later versions of transformers keep the quantized blocks if a kernel for them is installed.
    if (config := getattr(transformers, "GgufConfig", None)) is not None:
        arguments["quantization_config"] = config(dequantize=True)
    return arguments


@dataclass(frozen=True)
class _GGUFTensor:
    """A tensor as stored in a GGUF file: rows of numbers, or of bytes if quantized."""

    file: Path
    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: Any  # a numpy dtype
    start: int

    def read(self, index: int | None = None) -> Any:
        """Return the dequantized numbers in float32, or one slice of the first axis.

        The file is not memory-mapped, unlike in the gguf package: truncating a mapped file kills the process.
        """
        import gguf
        import numpy as np

        shape = self.shape if index is None else (1, *self.shape[1:])
        stored = np.empty(shape, self.dtype)
        if stored.nbytes:
            fill_buffer(
                self.file, self.start + (index or 0) * stored.nbytes, memoryview(stored.reshape(-1).view(np.uint8))
            )
        return gguf.dequantize(stored, self.kind)


class GGUFTensors:
    """The tensors of a GGUF file under their names in a transformers model, each dequantized when read.

    Names and conversions (permuted q and k of LLaMA, transposed weights of GPT-2) are those of transformers.
    """

    def __init__(self, path: Path, skeleton: nn.Module) -> None:
        """Read the file's header; `skeleton` is the model on the meta device.

        Errors: LookupError with the reason if the file can only be read as a whole.
        """
        from transformers import modeling_gguf_pytorch_utils as legacy

        with silence_transformers(), fast_reader() as readers:
            config = legacy.load_gguf_checkpoint(str(path))["config"]
            reader = readers[-1]
            family = str(legacy.read_field(reader, "general.architecture")[0])
            kind = legacy.TENSOR_PROCESSORS.get(family, legacy.TensorProcessor)
            if kind.__name__ not in _SUPPORTED_PROCESSORS or _uses_new_conversion(family) or reader.byte_order != "I":
                raise LookupError(f"the conversion of single tensors of {family} in GGUF files is not known")
            self._processor = kind(config=config)
            self._names = legacy.get_gguf_hf_weights_map(skeleton, self._processor)
        self._stored: dict[str, list[_GGUFTensor]] = {}
        self.unmatched: dict[str, Header] = {}  # tensors that the model has no place for, by name in the file
        self._unmatched_tensors: dict[str, _GGUFTensor] = {}
        for tensor in reader.tensors:
            array = tensor.data
            file = reader.file_of[tensor.name]
            stored = _GGUFTensor(
                file, tensor.name, tensor.tensor_type, array.shape, array.dtype, int(tensor.data_offset)
            )
            if (name := self._names.get(tensor.name, self._names.get(tensor.name.removesuffix(".weight")))) is not None:
                self._stored.setdefault(name, []).append(stored)
            else:
                shape, nbytes = tuple(int(size) for size in reversed(tensor.shape)), int(tensor.n_bytes)
                self.unmatched[tensor.name] = Header(file, torch.float32, shape, nbytes, stored.start)
                self._unmatched_tensors[tensor.name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def guess_name(self, tensor: str) -> str:
        """Return the likely name in the model of an unmatched tensor, derived from the names of its neighbours."""
        module, _, leaf = tensor.rpartition(".")
        for known, name in self._names.items():
            if known in (module, f"{module}.weight"):
                return f"{name.rpartition('.')[0]}.{leaf}"
        block = re.match(r"blk\.(\d+)\.(.+)", tensor)
        inside = next((name for known, name in self._names.items() if known.startswith("blk.0.")), None)
        if block is None or inside is None or (place := re.search(r"(?<=\.)0(?=\.)", inside)) is None:
            return tensor
        return f"{inside[: place.start()]}{block[1]}.{block[2]}"

    def is_zero(self, tensor: str) -> bool:
        """Return whether an unmatched tensor is all zeros."""
        return not self._unmatched_tensors[tensor].read().any()

    def differ(self, one: str, other: str) -> bool:
        """Return whether the file stores two tensors separately and with different values."""
        if one not in self or other not in self or self._stored[one] == self._stored[other]:
            return False
        return not torch.equal(self.read(one), self.read(other))

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor in float32; `index` selects one slice of its first axis."""
        stored = self._stored[name]
        slices = index if all(len(one.shape) == 3 for one in stored) else None
        found: dict[str, Tensor] = {}
        for one in stored:
            result = self._processor.process(
                weights=one.read(slices),
                name=one.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": found},
            )
            if result.name in self._names:
                found[name] = torch.from_numpy(result.weights.copy())
        tensor = found[name]
        return tensor if index is None else tensor[0 if slices is not None else index]


def _uses_new_conversion(family: str) -> bool:
    """Return whether transformers (5.18 and later) reads this architecture by its new conversion tables."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return is_gguf_arch_supported(family)


@contextlib.contextmanager
def fast_reader() -> Iterator[list[Any]]:
    """Patch gguf to parse from a plain array and without a progress bar; yield the readers it creates.

    Every string of the vocabulary is a slice of the file, and each slice of a memmap runs Python code: a vocabulary of
    49,152 takes 1.1 s instead of 5.0 s. The map of tensor names, 20 ms, is cached instead of built once per module.
    Config, tokenizer and weights each open the file: it is parsed once, with the tensors of all files of a split model.
    Errors: SourceError for files that cannot be read, and for split files that are missing or do not match.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as legacy

    original = gguf.GGUFReader
    readers: list[Any] = []

    class PlainArrayReader(original):  # type: ignore[misc, valid-type]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if type(self.data) is not np.ndarray:
                self.data = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    def parse(path: Any, *more: Any) -> Any:
        readers.append(_cached_reader(PlainArrayReader, path, *more))
        return readers[-1]

    bar = getattr(legacy, "tqdm", None)  # transformers cannot switch this progress bar off
    names = gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = parse, functools.lru_cache(names)
    legacy.tqdm = lambda items, **_: items
    try:
        yield readers
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, legacy.tqdm = original, names, bar


def open_reader(path: Path) -> Any:
    """Return gguf's reader of a file; for a split model with the tensors of all files, and the file of each.

    Errors: SourceError, as `fast_reader`'s.
    """
    import gguf

    with fast_reader():
        return gguf.GGUFReader(str(path))


def gguf_files(path: Path) -> list[Path]:
    """Return the files of a GGUF model: one, or its split files in order. Errors: as `open_reader`."""
    return list(dict.fromkeys([path, *open_reader(path).file_of.values()]))


_last: tuple[str, dict[str, tuple[int, int]], Any] | None = None


def _cached_reader(reader: Any, path: Any, *more: Any) -> Any:
    """Return the reader of a GGUF file: the last one created, if its files have not changed."""
    global _last
    if more:  # opened for writing
        return reader(path, *more)
    real = os.path.realpath(path)
    if _last is None or _last[0] != real or _last[1] != _file_states(_last[1]):
        _last = None
        found = _parse_file(reader, path)
        _join_parts(found, reader, Path(path))
        _last = (real, _file_states([path, *found.file_of.values()]), found)
    return _last[2]


def _parse_file(reader: Any, path: Any) -> Any:
    """Parse one file. Errors: SourceError naming it."""
    try:
        return reader(path)
    except Exception as problem:  # gguf trusts damaged lengths, and can raise anything
        raise SourceError(
            f"{path}: cannot be read as GGUF ({error_line(problem)}); copy or download the file again"
        ) from problem


def _file_states(files: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Return size and modification time by file; deleted files are left out."""
    real = {os.path.realpath(file) for file in files}
    return {file: (os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in real if os.path.exists(file)}


# File names of llama-gguf-split.
_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE)
_MERGE = "or merge the parts with llama-gguf-split --merge"


def _join_parts(reader: Any, reader_class: Any, path: Path) -> None:
    """Add the tensors of the other split files to the first file's reader, and `file_of`, the file of each tensor.

    Errors: SourceError for a part that is not the first (naming the first), is missing, or belongs to another model.
    """
    reader.file_of = {tensor.name: path for tensor in reader.tensors}
    number, count = _part_number(reader)
    if count == 1:
        return
    name = _PART.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[4])) != (number, count):
        raise SourceError(
            f"{path}: is part {number} of {count} of a GGUF model, but its name differs; "
            f"name it NAME-{number:05d}-of-{count:05d}.gguf, {_MERGE}"
        )
    files = [path.with_name(f"{name[1]}{part:05d}{name[3]}{name[4]}{name[5]}") for part in range(1, count + 1)]
    if number != 1:
        raise SourceError(f"{path}: is part {number} of {count} of a GGUF model; give the first, {files[0]}, {_MERGE}")
    for part, file in enumerate(files[1:], start=2):
        if not file.is_file():
            raise SourceError(f"{file}: part {part} of {count} of a GGUF model is missing; copy it there")
        other = _parse_file(reader_class, file)
        if _part_number(other) != (part, count) or any(tensor.name in reader.file_of for tensor in other.tensors):
            raise SourceError(f"{file}: is not part {part} of {count} of the model of {path.name}; copy it again")
        reader.tensors += other.tensors
        reader.file_of |= {tensor.name: file for tensor in other.tensors}
    stated_count = reader.fields.get("split.tensors.count")
    if stated_count is not None and int(stated_count.contents()) != len(reader.tensors):
        expected = stated_count.contents()
        raise SourceError(
            f"{path}: its {count} parts hold {len(reader.tensors)} tensors, not {expected}; copy them again"
        )
    family = str(reader.fields["general.architecture"].contents()) if "general.architecture" in reader.fields else ""
    if _uses_new_conversion(family):
        raise SourceError(
            f"{path}: transformers cannot read split GGUF files of {family}; merge the parts with "
            "llama-gguf-split --merge"
        )


def _part_number(reader: Any) -> tuple[int, int]:
    """Return (number from 1, count) of a split file; (1, 1) for a model in one file."""
    number, count = (reader.fields.get(f"split.{key}") for key in ("no", "count"))
    if count is None or int(count.contents()) <= 1:
        return 1, 1
    return (0 if number is None else int(number.contents())) + 1, int(count.contents())
