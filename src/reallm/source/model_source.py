"""Read the source model, a Hugging Face folder, a hub id or a GGUF file, one tensor at a time."""

from __future__ import annotations

import abc
import copy
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reallm.checkpoint.headers import INDEX, SINGLE, Header, read_headers, read_tensor, same_values, weight_files
from reallm.checkpoint.manifest import QUANT_METHOD
from reallm.checkpoint.validation import PICKLES, read_json, suffix_of
from reallm.errors import SourceError
from reallm.source.auxiliary_files import (
    PATTERNS,
    SETTINGS,
    TEMPLATES,
    auxiliary_files,
    subfolder_files,
    too_large_files,
)
from reallm.source.fused_experts import FusedExperts, map_state_dict, transformers_names
from reallm.source.gguf import GGUFTensors, fast_reader, gguf_arguments, gguf_files, open_reader, require_gguf
from reallm.source.gguf_tokenizer import gguf_tokenizer
from reallm.source.limits import check_untrusted_config, error_line, loading_limits
from reallm.source.transformers_logging import silence_transformers
from reallm.source.unused_tensors import Unused, unused_files, unused_tensors
from reallm.source.walk import meta_model, tied_names

ADAPTER = "adapter_config.json"  # written by PEFT
DOWNLOADS = ("config.json", INDEX, "*.safetensors", *PATTERNS)
# Copies of the weights in other layouts, which would double the download.
NOT_DOWNLOADED = ("*/*", "consolidated*")
# A second download, since the first skips subfolders, which also hold weights in other layouts.
DOWNLOADS_BELOW = (
    f"{TEMPLATES}/*.jinja",
    *(f"*/{name}" for name in ("config.json", "tokenizer*", "vocab*", "merges*", *SETTINGS)),
)


def open_source(model: str | Path, revision: str | None = None) -> Source:
    """Open a model without reading any weights.

    `model` is a local folder, a `.gguf` file or a hub id; `revision` applies to a hub id.
    Errors: SourceError, one line with the remedy, if it cannot be read or would run foreign code.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        refuse_adapter(path)
        return FolderSource(path)
    if _looks_like_a_path(str(model), path):
        raise SourceError(f"{model}: no such file or folder; MODEL is a model folder, a .gguf file or a hub id")
    folder = _download(str(model), revision)
    refuse_adapter(folder)
    return FolderSource(folder, label=str(model))


def refuse_adapter(folder: Path) -> None:
    """Raise SourceError for a folder that holds only an adapter, naming its base model."""
    file = folder / ADAPTER
    if not file.is_file() or (folder / "config.json").is_file():
        return
    config = read_json(file, SourceError)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    name = " ".join(str(base or "another model").split())[:200]  # untrusted text, on one line
    raise SourceError(f"{folder}: is an adapter of {name}; give that as MODEL, and --adapter {folder}")


def _open_file(path: Path) -> Source:
    if suffix_of(path) == ".gguf":
        return GGUFSource(path)
    if suffix_of(path) in PICKLES:
        raise SourceError(f"{path}: is a pickle checkpoint, which can run code when read; {_CONVERT}")
    raise SourceError(f"{path}: is a file; give the folder that holds the model, or a .gguf file")


_CONVERT = "convert it with model.save_pretrained(FOLDER), which writes safetensors, and give that folder"


def _looks_like_a_path(text: str, path: Path) -> bool:
    """Return whether MODEL is a path: it is not `name` or `org/name`, or it lies in an existing folder."""
    if text.startswith((".", "~", os.sep)) or text.lower().endswith((os.sep, ".gguf", ".safetensors")):
        return True
    return text.count("/") > 1 or "\\" in text or " " in text or (path.parent != Path() and path.parent.is_dir())


def _download(name: str, revision: str | None) -> Path:
    """Download a hub model to the local cache, without pickles; offline, use the cached copy."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(DOWNLOADS), ignore_patterns=list(NOT_DOWNLOADED)
        )
        patterns = [*DOWNLOADS_BELOW, *subfolder_files(Path(folder))]
        snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as problem:  # the network stack raises exceptions of many libraries
        raise SourceError(
            f"{name}: no such file or folder, and not available from the Hugging Face hub ({error_line(problem)}); "
            "check the name, the network, or HF_TOKEN for a gated model"
        ) from problem
    return Path(folder)


class Source(abc.ABC):
    """A source model: names, shapes and tensors as in the transformers model.

    `config` has no `quantization_config`, and `config.dtype` is the dtype of the weights.
    """

    label: str
    config: Any  # transformers' PreTrainedConfig
    unused: tuple[Unused, ...] = ()  # tensors and files that the model does not use

    @abc.abstractmethod
    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor of the state dict in its stored dtype on the CPU; `index` selects a slice of axis 0."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Return the dtype that most weights have when read."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of the model's weights as stored in their files, without `unused`."""

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """Return the weight files."""

    def check(self) -> None:  # noqa: B027 - some sources have nothing to check
        """Run further checks that need no weights. Errors: SourceError."""

    @abc.abstractmethod
    def save_auxiliary_files(self, folder: Path) -> None:
        """Write tokenizer, processors, generation config, chat templates and licence into an existing folder."""

    @abc.abstractmethod
    def load(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """Return the complete original model in eval mode."""

    @cached_property
    def skeleton(self) -> nn.Module:
        """Return the model on the meta device; built once, not to be modified.

        Errors: SourceError for a config that transformers cannot build, or with far more tensors than the files hold.
        """
        with silence_transformers(), loading_limits(self.label, SourceError, self.tensors):
            return meta_model(self.config, self.dtype)

    @property
    def tensors(self) -> int:
        """Return about how many tensors the files hold, as a limit."""
        return 10_000

    @property
    def loaded_nbytes(self) -> int:
        """Return the bytes that stay in memory after the first `read`: 0 if tensors are read one by one."""
        return 0 if self.reads_lazily else self.total_parameters * self.dtype.itemsize

    @property
    def reads_lazily(self) -> bool:
        """Return whether `read` reads only the requested tensor."""
        return self.full_load_reason is None

    @property
    @abc.abstractmethod
    def full_load_reason(self) -> str | None:
        """Return why the first `read` loads the whole model into memory; None if tensors are read one by one."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the state dict, tied tensors under each of their names."""
        return {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}

    def names(self) -> list[str]:
        """Return the names of the state dict, in model order."""
        return list(self.shapes())

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of `read`'s result for a tensor, without reading it if possible."""
        return self.dtype

    @property
    def total_parameters(self) -> int:
        """Return the number of parameters of the model; tied tensors count once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @cached_property
    def auxiliary_file_bytes(self) -> dict[str, int]:
        """Return bytes by file of `save_auxiliary_files`; converting the tokenizer of a GGUF file takes seconds."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_auxiliary_files(Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.stat().st_size for path in files}

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of names, sizes and bytes of the weight files; reads all of them."""
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 23):
                    digest.update(chunk)
        return digest.hexdigest()

    def _from_pretrained(self, folder: Path, device: Any, **arguments: Any) -> nn.Module:
        """Load the complete model through transformers, never running code from the folder.

        Errors: SourceError for any exception of transformers, and for a tensor it would initialize at random.
        """
        from transformers import AutoModelForCausalLM

        arguments |= device_options(device)
        try:
            with silence_transformers():
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=False, output_loading_info=True, **arguments
                )
        except Exception as problem:  # see `read_config`
            raise SourceError(f"{self.label}: transformers cannot load it ({error_line(problem)})") from problem
        if missing := sorted(info["missing_keys"]):
            raise SourceError(f"{self.label}: tensor {missing[0]!r} is missing; copy or download the model again")
        return model

    def _check_config(self) -> None:
        """Raise SourceError unless the config describes an unquantized causal language model."""
        from transformers import AutoModelForCausalLM

        method = quantization_method(self.config)
        if method == QUANT_METHOD:
            raise SourceError(f"{self.label}: is already compressed by reallm; give the original model")
        if method is not None:
            raise SourceError(f"{self.label}: is quantized with {method}; give the original model")
        if type(self.config) not in AutoModelForCausalLM._model_mapping:
            whole = self.config.get_text_config(decoder=True) is self.config
            remedy = "" if whole else "; save only its text model, if transformers supports it, and give that"
            raise SourceError(
                f"{self.label}: model type {self.config.model_type!r} is not a causal language model{remedy}"
            )

    def _finish_config(self) -> None:
        """Set the config's dtype and architecture to the model that transformers builds.

        If transformers builds only the text model of a multimodal model, the config becomes the text model's.
        """
        if type(self.skeleton.config) is not type(self.config):
            self.config = copy.deepcopy(self.skeleton.config)
        self.config.dtype = self.dtype
        self.config.architectures = [type(self.skeleton).__name__]

    def _untie(self) -> None:
        """Untie the config and rebuild the skeleton, because tied tensors differ in the files.

        Errors: SourceError for a family that ties them whatever its config says.
        """
        tied = tied_names(self.skeleton)
        untie_config(self.config)
        del self.__dict__["skeleton"]
        if still_tied := tied.keys() & tied_names(self.skeleton).keys():
            raise SourceError(
                f"{self.label}: {min(still_tied)!r} and {tied[min(still_tied)]!r} differ, and this family ties them "
                "whatever its config says; keep one of them"
            )


def quantization_method(config: Any) -> str | None:
    """Return the quantization method that a config declares; None for unquantized weights."""
    configs = (config, config.get_text_config(decoder=True))
    found = next((q for one in configs if (q := getattr(one, "quantization_config", None))), None)
    if found is None:
        return None
    method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def untie_config(config: Any) -> None:
    """Declare in a config and its text model's config that lm_head is not tied to the embedding."""
    for one in (config, config.get_text_config(decoder=True)):
        one.tie_word_embeddings = False


class FolderSource(Source):
    """A Hugging Face folder with safetensors, read lazily through its headers.

    If transformers converts weights at load beyond renaming tensors and fusing experts, the first `read` loads the
    complete model instead.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder, self.label = folder, label or str(folder)
        self.config = read_config(folder, self.label)
        self._check_config()
        self._refuse_pickle()
        self._refuse_adapter_with_model()
        self._headers = read_headers(weight_files(folder, SourceError), SourceError)
        self._own = self._headers  # tensors that the model has a place for
        self._finish_config()
        self._keys = self._match_tensors()
        if self.config.dtype != self.dtype:  # unused tensors had decided the dtype
            del self.__dict__["skeleton"]
            self._finish_config()
        self._untied = self._is_untied()
        if self._untied:
            self._untie()

    @property
    def tensors(self) -> int:
        """Return the number of tensors in the files."""
        return len(self._headers)

    @property
    def full_load_reason(self) -> str | None:
        """Return a reason only if transformers must convert tensors."""
        return None if self._keys is not None else "transformers converts tensors of this family at load"

    def files(self) -> list[Path]:
        """Return the safetensors files."""
        return weight_files(self.folder, SourceError)

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating dtype with the most bytes."""
        sizes: dict[torch.dtype, int] = {}
        for header in self._own.values():
            if header.dtype.is_floating_point:
                sizes[header.dtype] = sizes.get(header.dtype, 0) + header.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in the tensor's header."""
        return self.dtype if self._keys is None else self._keys[name].dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors that the model has a place for."""
        return sum(header.nbytes for header in self._own.values())

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor of the state dict.

        Errors: SourceError for a name that the model lacks, OSError for a file that was deleted.
        """
        if self._keys is None:
            return _pick(self._complete, name, index, self.label)
        if name not in self._keys:
            raise SourceError(f"{self.label}: the model has no tensor {name!r}")
        stored = self._keys[name]
        return stored.read(index) if isinstance(stored, FusedExperts) else read_tensor(stored, index)

    def load(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """Load the original model through `from_pretrained`, from safetensors only."""
        model = self._from_pretrained(self.folder, device, dtype=dtype or "auto", use_safetensors=True)
        if self._untied:
            untie_config(model.config)
        return model

    def save_auxiliary_files(self, folder: Path) -> None:
        """Copy the files byte for byte."""
        for file in auxiliary_files(self.folder):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, folder / file)

    def _refuse_pickle(self) -> None:
        if (self.folder / INDEX).is_file() or (self.folder / SINGLE).is_file():
            return
        if found := sorted(file for file in self.folder.iterdir() if suffix_of(file) in PICKLES):
            raise SourceError(f"{found[0]}: is a pickle checkpoint, which can run code when read; {_CONVERT}")
        if others := sorted(file.name for file in self.folder.glob("*.safetensors")):
            raise SourceError(
                f"{self.label}: holds {others[0]}, but neither {SINGLE} nor {INDEX}, which transformers reads; rename "
                "a single file, or copy the index that belongs to the shards"
            )
        raise SourceError(f"{self.label}: holds no safetensors weights ({SINGLE} or {INDEX}); {_CONVERT}")

    def _refuse_adapter_with_model(self) -> None:
        """Raise SourceError for an adapter in the folder: transformers would load it too, but compression would not."""
        if (self.folder / ADAPTER).is_file():
            raise SourceError(
                f"{self.label}: holds a model and an adapter ({ADAPTER}); loading would apply the adapter, "
                "compression would not; move the adapter to a folder of its own, or merge it and save the merged model"
            )

    def _match_tensors(self) -> dict[str, Header | FusedExperts] | None:
        """Map each name of the state dict to stored tensors; None if transformers does more than rename and fuse.

        Also records the tensors that the model has no place for.
        Errors: SourceError naming a tensor that is missing, whose shape differs from the config, or that has no place
        in the model although the model computes other values without it.
        """
        available: Mapping[str, Header | FusedExperts] | None = self._headers
        keys, missing = match_names(self._headers, self.skeleton, self.names())
        unmatched = self._headers.keys() - set(keys.values())
        converted: dict[str, str] | None = {}
        # If every tensor of the files is matched, none is left that could be converted to a missing one.
        needs_conversion = bool(unmatched and self._needs_conversion())
        if needs_conversion:
            converted = transformers_names(self.skeleton, self._headers)
            if missing:
                unmatched = {key for key, name in (converted or {}).items() if name not in self._shapes}
        self._record_unused(unmatched, converted or {})
        if needs_conversion and missing:
            available = self._map_fused()
            keys, missing = match_names(available or set((converted or {}).values()), self.skeleton, self.names())
        if available is None and (converted is None or self._splits_tensors()):
            return None
        optional = re.compile("|".join(self.skeleton._keys_to_ignore_on_load_missing or ()) or "(?!)")
        if found := [name for name in missing if not optional.search(name)]:
            raise SourceError(f"{self.label}: tensor {found[0]!r} is missing; copy or download the model again")
        if available is None or missing:
            return None
        self._check_shapes(available, keys)
        return {name: available[key] for name, key in keys.items()}

    def _map_fused(self) -> dict[str, Header | FusedExperts] | None:
        """Map each tensor to stored tensors, fused experts included. Errors: SourceError for incomplete experts."""
        try:
            return map_state_dict(self.skeleton, self._headers)
        except ValueError as problem:
            raise SourceError(f"{self.label}: {problem}; copy or download the model again") from problem

    def _record_unused(self, unmatched: Container[str], names: Mapping[str, str]) -> None:
        """Set `unused` to the tensors that the model has no place for and the files that are not read.

        Errors: SourceError for a tensor without which the model would compute other values.
        """

        def is_zero(key: str) -> bool:
            return not read_tensor(self._headers[key]).any()

        stored = {key: header for key, header in self._headers.items() if key in unmatched}
        tensors = unused_tensors(self.label, self.skeleton, stored, names, is_zero)
        files = unused_files(self._other_weights(), "weights that are not read")
        large = unused_files(too_large_files(self.folder), "larger than the files of any tokenizer: not copied")
        self.unused = (*tensors, *files, *large)
        self._own = {key: header for key, header in self._headers.items() if key not in stored}

    def _other_weights(self) -> list[Path]:
        """Return the weight files of the folder that are not read."""
        read = {file.name for file in self.files()}
        found = {file for file in self.folder.iterdir() if suffix_of(file) in (".safetensors", *PICKLES)}
        return sorted(file for file in found if file.is_file() and file.name not in read)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes()

    def _is_untied(self) -> bool:
        """Return whether the files hold different values for tied tensors; transformers then loads both."""
        headers: Mapping[str, Any] = self._keys or self._headers
        pairs = ((headers.get(target), headers.get(owner)) for target, owner in tied_names(self.skeleton).items())
        return any(
            isinstance(one, Header) and isinstance(other, Header) and not same_values(one, other, self.dtype)
            for one, other in pairs
        )

    def _splits_tensors(self) -> bool:
        """Return whether transformers splits stored tensors, so that names cannot show which are missing."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return any(len(entry.target_patterns) > 1 for entry in get_model_conversion_mapping(self.skeleton))

    def _needs_conversion(self) -> bool:
        """Return whether transformers renames or fuses tensors of this family at load."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return bool(get_model_conversion_mapping(self.skeleton))

    def _check_shapes(self, available: Mapping[str, Header | FusedExperts], keys: dict[str, str]) -> None:
        for name, shape in self._shapes.items():
            found = available[keys[name]].shape
            if found != shape:
                raise SourceError(
                    f"{self.label}: tensor {keys[name]!r} has shape {found}, config.json says {shape}; "
                    "weights and config are of different models"
                )

    @cached_property
    def _complete(self) -> dict[str, Tensor]:
        return self.load().state_dict()


class GGUFSource(Source):
    """A GGUF file, or the files of a split one; `read` dequantizes a tensor to dense weights.

    If transformers' conversion of single tensors is not known, the first `read` dequantizes all tensors.
    """

    def __init__(self, path: Path) -> None:
        require_gguf()
        from transformers import AutoConfig

        self.path, self.label = path, str(path)
        self._files = gguf_files(path)
        try:
            with silence_transformers(), fast_reader():
                self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, IndexError, OSError, NotImplementedError) as problem:
            raise SourceError(
                f"{path}: cannot be read as GGUF ({error_line(problem)}); give the Hugging Face folder"
            ) from problem
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self._check_config()
        self._finish_config()
        if not isinstance(self._tensors, str):
            tensors = self._tensors[0]
            names = {name: tensors.guess_name(name) for name in tensors.unmatched}
            self.unused = tuple(unused_tensors(self.label, self.skeleton, tensors.unmatched, names, tensors.is_zero))
            if any(tensors.differ(target, owner) for target, owner in tied_names(self.skeleton).items()):
                self._untie()
                del self.__dict__["_tensors"]

    @property
    def full_load_reason(self) -> str | None:
        """Return a reason if the conversion of single tensors is not known, or a tensor is not found by name."""
        found = self._tensors
        return found if isinstance(found, str) else None

    def files(self) -> list[Path]:
        """Return the file, or the files of a split model."""
        return self._files

    @property
    def dtype(self) -> torch.dtype:
        """Return float32, the result of dequantization."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files, without tensors that the model has no place for."""
        return sum(file.stat().st_size for file in self._files) - sum(one.nbytes for one in self.unused)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor of the state dict in float32.

        Errors: SourceError for a name that the model lacks or a shape that differs from the header, OSError for a file
        that was deleted.
        """
        if isinstance(self._tensors, str):
            return _pick(self._complete, name, index, self.label)
        tensors, keys = self._tensors
        if name not in keys:
            raise SourceError(f"{self.label}: the model has no tensor {name!r}")
        tensor = tensors.read(keys[name], index)
        expected = self._shapes[name] if index is None else self._shapes[name][1:]
        if tuple(tensor.shape) != expected:
            raise SourceError(f"{self.label}: tensor {name!r} has shape {tuple(tensor.shape)}, not {expected}")
        return tensor

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes()

    @cached_property
    def _tensors(self) -> tuple[GGUFTensors, dict[str, str]] | str:
        """Return the file's tensors and its name for each of the state dict; or the reason for a full load."""
        try:
            tensors = GGUFTensors(self.path, self.skeleton)
        except LookupError as reason:
            return str(reason.args[0]) if reason.args else "its header is incomplete"
        except (ImportError, AttributeError, TypeError) as problem:  # internals of transformers, not a public interface
            return f"this version of transformers reads GGUF files differently ({error_line(problem)})"
        keys, missing = match_names(tensors, self.skeleton, self.names())
        if missing and not tensors.unmatched:  # no tensor of the file could be converted to it
            raise SourceError(f"{self.label}: tensor {missing[0]!r} is missing; copy or download the model again")
        return f"tensor {missing[0]!r} is not in the file by that name" if missing else (tensors, keys)

    def load(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """Load the dequantized model."""
        arguments = gguf_arguments(self.path)
        with fast_reader():
            model = self._from_pretrained(
                self.path.parent, device, config=self.config, dtype=dtype or self.dtype, **arguments
            )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return model

    def check(self) -> None:
        """Build the tokenizer, and compare the header with the embedding.

        Errors: SourceError with the remedy.
        """
        rows = {int(t.shape[-1]) for t in open_reader(self.path).tensors if t.name == "token_embd.weight"}
        if rows - {self.config.vocab_size}:
            raise SourceError(
                f"{self.path}: its header states {self.config.vocab_size:,} tokens, and its embedding has "
                f"{max(rows):,} rows; copy or download the file again"
            )
        gguf_tokenizer(self.path)

    def save_auxiliary_files(self, folder: Path) -> None:
        """Convert the tokenizer of the file to Hugging Face files and write them."""
        from transformers import GenerationConfig

        with silence_transformers():
            gguf_tokenizer(self.path).save_pretrained(folder)
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)

    @cached_property
    def _complete(self) -> dict[str, Tensor]:
        return self.load().state_dict()


def match_names(
    available: Container[str], skeleton: nn.Module, names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return (name in the files by name of the state dict, names that no file has a tensor for).

    Files may use names with or without the prefix of the base model, and store a tied tensor under any of its names.
    """
    prefix = skeleton.base_model_prefix
    keys: dict[str, str] = {}
    for name in names:
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        if (key := next((candidate for candidate in candidates if candidate in available), None)) is not None:
            keys[name] = key
    groups = tied_names(skeleton)
    missing = []
    for name in [name for name in names if name not in keys]:
        owner = groups.get(name, name)
        partners = [owner, *(other for other, its_owner in groups.items() if its_owner == owner)]
        found = next((keys[partner] for partner in partners if partner in keys), None)
        if found is None:
            missing.append(name)
        else:
            keys[name] = found
    return keys, missing


def device_options(device: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model to a device; None is the CPU.

    Errors: SourceError for a device that is not available, or if accelerate is not installed.
    """
    if device is None:
        return {}
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA asserts
        raise SourceError(f"device {str(device)!r} is not available here ({error_line(problem)}); use cpu") from problem
    if torch.device(device).type == "cpu":
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise SourceError(f"loading to device {str(device)!r} needs accelerate: pip install accelerate")
    return {"device_map": {"": device}}


def _pick(state: dict[str, Tensor], name: str, index: int | None, label: str) -> Tensor:
    if name not in state:
        raise SourceError(f"{label}: the model has no tensor {name!r}")
    return state[name] if index is None else state[name][index]


def read_config(folder: Path, label: str) -> Any:
    """Read the transformers config of a folder, never running code from it.

    Errors: SourceError if config.json is missing, damaged, of an unknown model type or needs foreign code.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise SourceError(f"{label}: has no config.json, so it is not a complete Hugging Face model folder")
    plain = read_json(file, SourceError)
    kind = plain.get("model_type") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if isinstance(plain, dict) and "auto_map" in plain:
            raise SourceError(f"{label}: needs model code from its own folder, which reallm never runs")
        raise SourceError(
            f"{label}: model type {kind!r} is not known to this version of transformers; pip install -U transformers"
        )
    check_untrusted_config(plain, label, SourceError)
    try:
        with silence_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as problem:  # any value reaches the code of hundreds of families: there is no closed list
        raise SourceError(f"{file}: cannot be read ({error_line(problem)})") from problem
