"""Reading GGUF files as transformers does, one tensor at a time and at a bearable speed."""

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

# What transformers makes of a tensor of these kinds of file depends on that tensor alone, or on those of one parameter.
_SUPPORTED_PROCESSORS = (
    "TensorProcessor",
    "LlamaTensorProcessor",  # q and k have their rotary halves side by side
    "Qwen2MoeTensorProcessor",  # gate and up are one parameter
    "BloomTensorProcessor",
    "GPT2TensorProcessor",  # Conv1D is transposed
    "MambaTensorProcessor",
    "NemotronTensorProcessor",
    "Gemma2TensorProcessor",  # norms are stored + 1
)


def require_gguf() -> None:
    """Errors: SourceError with the pip command if a package that reading GGUF needs is not installed."""
    import importlib.util

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise SourceError(f"reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` that read a GGUF file into dense weights."""
    import transformers

    arguments: dict[str, Any] = {"gguf_file": path.name}
    # Later transformers would keep the blocks of the file where a kernel for them is installed.
    if (config := getattr(transformers, "GgufConfig", None)) is not None:
        arguments["quantization_config"] = config(dequantize=True)
    return arguments


@dataclass(frozen=True)
class _GGUFTensor:
    """A tensor as it lies in a GGUF file: rows of numbers, or of bytes where it is quantized."""

    file: Path
    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: Any  # of numpy
    start: int

    def read(self, index: int | None = None) -> Any:
        """The numbers in float32, or those of one slice of the first axis.

        Not mapped, as the gguf package does it: a file that becomes shorter under a mapping ends the process.
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
    """The tensors of a GGUF file under their names in a transformers model, each decoded when it is asked for.

    Names, and what becomes of a tensor (permuted q and k of LLaMA, transposed weights of GPT-2), are transformers' own.
    """

    def __init__(self, path: Path, skeleton: nn.Module) -> None:
        """Reads the file's header; `skeleton` is the model on the meta device.

        Errors: LookupError with the reason if the file can only be read as a whole.
        """
        from transformers import modeling_gguf_pytorch_utils as legacy

        with silence_transformers(), fast_reader() as readers:
            config = legacy.load_gguf_checkpoint(str(path))["config"]
            reader = readers[-1]
            family = str(legacy.read_field(reader, "general.architecture")[0])
            kind = legacy.TENSOR_PROCESSORS.get(family, legacy.TensorProcessor)
            if kind.__name__ not in _SUPPORTED_PROCESSORS or _is_converted(family) or reader.byte_order != "I":
                raise LookupError(
                    f"of tensors of {family} in GGUF files we do not know one by one what becomes of them"
                )
            self._processor = kind(config=config)
            self._names = legacy.get_gguf_hf_weights_map(skeleton, self._processor)
        self._stored: dict[str, list[_GGUFTensor]] = {}
        self.left: dict[str, Header] = {}  # what the model has no place for, by name in the file
        self._unread: dict[str, _GGUFTensor] = {}
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
                self.left[tensor.name] = Header(file, torch.float32, shape, nbytes, stored.start)
                self._unread[tensor.name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def name_of(self, left: str) -> str:
        """Return what a tensor that has no place would be called in the model, as far as its neighbours tell."""
        module, _, leaf = left.rpartition(".")
        for known, name in self._names.items():
            if known in (module, f"{module}.weight"):
                return f"{name.rpartition('.')[0]}.{leaf}"
        block = re.match(r"blk\.(\d+)\.(.+)", left)
        inside = next((name for known, name in self._names.items() if known.startswith("blk.0.")), None)
        if block is None or inside is None or (place := re.search(r"(?<=\.)0(?=\.)", inside)) is None:
            return left
        return f"{inside[: place.start()]}{block[1]}.{block[2]}"

    def is_zero(self, left: str) -> bool:
        """Return whether a tensor that has no place is all zeros."""
        return not self._unread[left].read().any()

    def differ(self, one: str, other: str) -> bool:
        """Return whether the file holds two tensors apart and with other values."""
        if one not in self or other not in self or self._stored[one] == self._stored[other]:
            return False
        return not torch.equal(self.read(one), self.read(other))

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in float32; `index` takes one slice of its first axis."""
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


def _is_converted(family: str) -> bool:
    """Whether transformers (5.18 and later) reads this kind of file in another way, from tables of its own."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return is_gguf_arch_supported(family)


@contextlib.contextmanager
def fast_reader() -> Iterator[list[Any]]:
    """Make gguf parse from a plain array, and without a bar of its own, while we use it.

    Every string of the vocabulary is a slice of the file; slices of a memmap run Python code each.
    A vocabulary of 49,152: 5.0 s before, 1.1 s after. And the map of tensor names, 20 ms, is asked for
    once a module instead of once. Config, tokenizer and weights each open the file again: it is parsed once, with the
    tensors of the other parts of a model in parts. Gives the readers that are asked for meanwhile.
    Errors: SourceError for files that cannot be read, or parts that are missing or do not belong together.
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

    bar = getattr(legacy, "tqdm", None)  # not one of those that transformers can switch off
    names = gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = parse, functools.lru_cache(names)
    legacy.tqdm = lambda items, **_: items
    try:
        yield readers
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, legacy.tqdm = original, names, bar


def open_reader(path: Path) -> Any:
    """Return gguf's reader of a file, with the tensors of all parts of a model in parts and the file of each.

    Errors: SourceError, as `fast_reader`'s.
    """
    import gguf

    with fast_reader():
        return gguf.GGUFReader(str(path))


def gguf_files(path: Path) -> list[Path]:
    """Return the files that a GGUF model lies in: one, or its parts in order. Errors: as `open_reader`."""
    return list(dict.fromkeys([path, *open_reader(path).file_of.values()]))


_last: tuple[str, dict[str, tuple[int, int]], Any] | None = None


def _cached_reader(reader: Any, path: Any, *more: Any) -> Any:
    """The reader of a GGUF file: the one made last, if its files are still the same."""
    global _last
    if more:  # to write into
        return reader(path, *more)
    real = os.path.realpath(path)
    if _last is None or _last[0] != real or _last[1] != _states(_last[1]):
        _last = None
        found = _read_whole(reader, path)
        _join_parts(found, reader, Path(path))
        _last = (real, _states([path, *found.file_of.values()]), found)
    return _last[2]


def _read_whole(reader: Any, path: Any) -> Any:
    """Errors: SourceError naming the file."""
    try:
        return reader(path)
    except Exception as problem:  # gguf reads damaged lengths as they are, and fails on them in any way
        raise SourceError(
            f"{path}: cannot be read as GGUF ({error_line(problem)}); copy or download the file again"
        ) from problem


def _states(files: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Size and time of change of files; of none that are gone."""
    real = {os.path.realpath(file) for file in files}
    return {file: (os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in real if os.path.exists(file)}


# As llama-gguf-split names them.
_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE)
_MERGE = "or merge the parts with llama-gguf-split --merge"


def _join_parts(reader: Any, reader_class: Any, path: Path) -> None:
    """Add the tensors of the other parts to the first one's, and `file_of`, the file of each tensor by its name.

    Errors: SourceError for another part than the first (which it names), a part that is missing or of another model.
    """
    reader.file_of = {tensor.name: path for tensor in reader.tensors}
    number, count = _part_of(reader)
    if count == 1:
        return
    name = _PART.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[4])) != (number, count):
        raise SourceError(
            f"{path}: is part {number} of {count} of a GGUF model, and not named so; "
            f"name it NAME-{number:05d}-of-{count:05d}.gguf, {_MERGE}"
        )
    files = [path.with_name(f"{name[1]}{part:05d}{name[3]}{name[4]}{name[5]}") for part in range(1, count + 1)]
    if number != 1:
        raise SourceError(f"{path}: is part {number} of {count} of a GGUF model; give the first, {files[0]}, {_MERGE}")
    for part, file in enumerate(files[1:], start=2):
        if not file.is_file():
            raise SourceError(f"{file}: part {part} of {count} of a GGUF model is missing; copy it there")
        other = _read_whole(reader_class, file)
        if _part_of(other) != (part, count) or any(tensor.name in reader.file_of for tensor in other.tensors):
            raise SourceError(f"{file}: is not part {part} of {count} of the model of {path.name}; copy it again")
        reader.tensors += other.tensors
        reader.file_of |= {tensor.name: file for tensor in other.tensors}
    said_count = reader.fields.get("split.tensors.count")
    if said_count is not None and int(said_count.contents()) != len(reader.tensors):
        wanted = said_count.contents()
        raise SourceError(
            f"{path}: its {count} parts hold {len(reader.tensors)} tensors, not {wanted}; copy them again"
        )
    family = str(reader.fields["general.architecture"].contents()) if "general.architecture" in reader.fields else ""
    if _is_converted(family):
        raise SourceError(
            f"{path}: transformers reads GGUF files of {family} in one part only; merge the parts with "
            "llama-gguf-split --merge"
        )


def _part_of(reader: Any) -> tuple[int, int]:
    """(number from 1, how many) of a part; (1, 1) of a file that is not split."""
    number, count = (reader.fields.get(f"split.{key}") for key in ("no", "count"))
    if count is None or int(count.contents()) <= 1:
        return 1, 1
    return (0 if number is None else int(number.contents())) + 1, int(count.contents())
