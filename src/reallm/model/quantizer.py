"""The Hugging Face side: the quantization config of an artifact, and what `from_pretrained` does with it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as registry
from transformers.utils.quantization_config import QuantizationConfigMixin

from reallm.artifact.coding import coded_tensor, decoded_tensor
from reallm.artifact.integrity import verify
from reallm.artifact.manifest import QUANT_METHOD, VERSION, Manifest, check_version
from reallm.errors import ArtifactError, FormatError
from reallm.formats import WeightFormat, table_tensors, tables_of
from reallm.model.headers import Header, read_headers
from reallm.model.modules import DECODE_AT_LOAD, Anchor, check_mode
from reallm.model.resident import count_matrices
from reallm.model.silence import quiet
from reallm.model.source import Source
from reallm.model.swap import compressed_modules, swap_in, swap_out
from reallm.model.untrusted import check_own_tables
from reallm.model.values import check_kept
from reallm.model.walk import Matrix

# Shown by a loader that does not know reallm, in its table of unexpected tensors.
REMEDY = "COMPRESSED_BY_REALLM.pip_install_reallm-compress_and_IMPORT_REALLM_before_from_pretrained"


class ReallmConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact: plain JSON values only, those of `artifact.Manifest` and `mode`.

    A user may pass `ReallmConfig(mode=..., verify=...)` to `from_pretrained`: these are taken over, the rest is the
    artifact's. `verify`: compare the tensors with the checksums before they are loaded. Keys that this version does
    not know are kept as they are.
    Errors: ArtifactError for a version of the future or an unknown mode.
    """

    def __init__(
        self,
        version: Any = VERSION,
        mode: Any = DECODE_AT_LOAD,
        layouts: list[dict[str, Any]] | None = None,
        matrices: dict[str, int] | None = None,
        provenance: dict[str, Any] | None = None,
        checksums: dict[str, str] | None = None,
        verify: bool = True,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.version = check_version(version)
        self.mode = check_mode(mode)
        self.layouts = layouts or []
        self.matrices = matrices or {}
        self.provenance = provenance or {}
        self.checksums = checksums or {}
        self.verify = verify
        for key, value in others.items():
            setattr(self, key, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may change."""
        return {"mode": self.mode, "verify": self.verify}

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        values = super().to_dict()
        del values["verify"]
        if not self.checksums:
            del values["checksums"]
        return values

    def manifest(self) -> Manifest:
        """The compressed matrices.

        Errors: FormatError for an unknown format; ArtifactError for entries that do not fit together.
        """
        return Manifest.from_dict(self.to_dict())

    def weight_formats(self) -> dict[str, WeightFormat]:
        """Format of every compressed matrix by module path."""
        return {matrix.name: matrix.fmt for matrix in self.manifest().matrices}

    def coded_tensors(self) -> dict[str, tuple[str, ...]]:
        """Local names of entropy-coded tensors by module path."""
        return {matrix.name: matrix.coded for matrix in self.manifest().matrices if matrix.coded}


def write_config(source: Source, manifest: Manifest, folder: Path) -> None:
    """Write `config.json`: the original's, and how its matrices are stored."""
    config = copy.deepcopy(source.config)
    config.quantization_config = ReallmConfig(**manifest.to_dict())
    with quiet():
        config.save_pretrained(folder)


def marker_tensors(matrices: list[Matrix]) -> dict[str, Tensor]:
    """Empty tensors that a writer adds so that nobody loads an artifact as garbage.

    A loader that does not know reallm meets the first under the name of a plain weight, of another
    shape, and fails; the second tells it why in words. Ours knows them.
    """
    if not matrices:
        return {}
    empty = torch.empty(0, dtype=torch.uint8)
    return {matrices[0].parameter: empty, REMEDY: empty.clone()}


class ReallmQuantizer(HfQuantizer):
    """Swaps modules before the weights are loaded, checks what arrived, decodes once if asked."""

    requires_calibration = True  # "quantize on load" is not a thing here: only artifacts are loaded
    quantization_config: ReallmConfig

    def __init__(self, quantization_config: ReallmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        check_mode(quantization_config.mode)
        self._stored: dict[str, Tensor] = {}  # full name -> what it must be, on the meta device
        self._shared: dict[str, Tensor] = {}  # those of them that matrices share
        self._coded: set[str] = set()  # those of them that the file holds entropy-coded
        self._markers: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Errors: ArtifactError for offloading to disk, which buffers do not survive."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise ArtifactError("device_map: a compressed model cannot be offloaded to disk; use cpu or a GPU")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        named = {matrix.name: matrix for matrix in self.quantization_config.manifest().matrices}
        matrices = _within(model, named)
        if _is_another_class(model):
            matrices = self._without_a_head(model, matrices)
        swap_in(model, {path: matrix.fmt for path, matrix in matrices.items()})
        for path, module in compressed_modules(model).items():
            if module.shape != matrices[path].shape:
                raise ArtifactError(
                    f"{path}: the model has {module.shape}, config.json stores {matrices[path].shape}; it is damaged"
                )
            module.loading = True
        check_own_tables(model, "artifact", ArtifactError)
        self._stored = {
            f"{path}.{local}": tensor
            for path, module in compressed_modules(model).items()
            for local, tensor in module.stored().items()
        }
        self._shared = table_tensors(tables_of(matrix.fmt for matrix in matrices.values()))
        self._stored |= self._shared
        coded = _within(model, self.quantization_config.coded_tensors())
        self._coded = {f"{path}.{local}" for path, names in coded.items() for local in names}
        if files := kwargs.get("checkpoint_files"):
            self._check_files(model, [Path(file) for file in files])
        return model

    def _without_a_head(self, model: nn.Module, matrices: dict[str, Any]) -> dict[str, Any]:
        """Leave out a head that a model of another class, a classifier for instance, has not.

        Errors: ArtifactError if it keeps its decoder under another name, as some for question answering do.
        """
        prefix = f"{model.base_model_prefix}."
        lost = {path for path in matrices if not path.startswith(prefix) and not _is_there(model, path)}
        if not hasattr(model, model.base_model_prefix) or not lost:
            return matrices
        if len(lost) == len(matrices):
            raise ArtifactError(
                f"{type(model).__name__}: keeps its decoder under {prefix!r}, the artifact has {max(lost)!r}; "
                f"artifacts load as {_saved_class(model)}, and as classes that name its decoder alike"
            )
        # What is saved of this model lacks them too.
        kept = self.quantization_config.matrices
        self.quantization_config.matrices = {path: number for path, number in kept.items() if path not in lost}
        return {path: matrix for path, matrix in matrices.items() if path not in lost}

    def _check_files(self, model: nn.Module, files: list[Path]) -> None:
        """Compare the headers with the model before any tensor is read, and note the markers."""
        headers = read_headers(files, ArtifactError)
        if self.quantization_config.verify:
            verify(files, self.quantization_config.checksums)
        expected = model.state_dict()
        prefix = f"{model.base_model_prefix}."
        ties = set(model.all_tied_weights_keys)
        fresh = _fresh_tensors(model) - set(self._stored) - set(self.quantization_config.checksums)
        optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)")
        for name, wanted in expected.items():
            header = headers.get(name) or headers.get(prefix + name) or headers.get(name.removeprefix(prefix))
            if header is None and (name in ties or name in fresh or optional.search(name)):
                continue
            if header is None:
                whose = f" in what was saved of a {_saved_class(model)}" if _is_another_class(model) else ""
                raise ArtifactError(f"{files[0].parent}: tensor {name!r} is missing{whose}; copy the artifact again")
            # Kept parameters may be stored in another dtype than the model computes in; ours may not.
            dtype = wanted.dtype if name in self._stored else header.dtype
            shape = wanted.shape
            if name in self._coded:
                dtype, shape = torch.uint8, header.shape if len(header.shape) == 1 else (-1,)
            _check(f"{files[0].parent}: tensor {name!r}", header.dtype, header.shape, dtype, shape)
        self._markers = sorted(n for n, h in headers.items() if _is_marker(h) and n not in expected)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in self._markers}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self._shared:
            self._check_arrived(name, model.get_buffer(name))
        for path, module in compressed_modules(model).items():
            for local, tensor in module.stored().items():
                if f"{path}.{local}" in self._coded and tensor.device.type != "meta":
                    tensor = self._uncoded(f"{path}.{local}", tensor)
                    module.put(local, tensor)
                self._check_arrived(f"{path}.{local}", tensor)
            module.loaded()
            try:
                if self.quantization_config.mode == DECODE_AT_LOAD:
                    module.decode_once()
                else:
                    module.check_values()
            except FormatError as error:
                raise ArtifactError(f"{path}: {error}; copy the artifact again") from error
        check_kept(model)
        if next(model.parameters(), None) is None:
            module = next(iter(compressed_modules(model).values()))
            stored = next(iter(module.stored().values()))
            model.add_module("anchor", Anchor(module.compute_dtype, stored.device))
        count_matrices(model)
        # What is saved from now on may differ from what was loaded.
        self.quantization_config.checksums = {}
        return model

    def _check_arrived(self, name: str, tensor: Tensor) -> None:
        wanted = self._stored[name]
        if tensor.device.type == "meta":
            raise ArtifactError(f"tensor {name!r} is missing; copy the artifact again")
        _check(f"tensor {name!r}", tensor.dtype, tensor.shape, wanted.dtype, wanted.shape)

    def _uncoded(self, name: str, tensor: Tensor) -> Tensor:
        try:
            return decoded_tensor(tensor, self._stored[name])
        except FormatError as error:
            raise ArtifactError(f"tensor {name!r}: {error}") from error

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Stored tensors are never cast, whatever the model's rules for dtypes say."""
        targets = getattr(converter, "target_patterns", ())
        return None if any(name in self._stored for name in targets) else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True for stored tensors: their shapes are ours to check."""
        return param_name in self._stored

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: an artifact has the names and layouts of the transformers model itself."""
        return []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the state dict, coded tensors coded again, and the markers."""
        markers = {name: torch.empty(0, dtype=torch.uint8) for name in self._markers}
        state = model.state_dict()
        if lost := [name for name in self._stored if name not in state]:
            raise ArtifactError(
                f"{lost[0]!r} and {len(lost) - 1} other stored tensors are no longer in the model under their names "
                "(resized, or wrapped by PEFT): save the adapter alone, or call model.dequantize() before the change"
            )
        coded = {name: coded_tensor(state[name]) for name in self._coded}
        return {**state, **coded, **markers}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes: saved as it was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top; the stored tensors themselves do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Decoded once, it is a model of plain products."""
        return self.quantization_config.mode == DECODE_AT_LOAD

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        swap_out(model, dtype or model.dtype)
        count_matrices(model, False)
        return model


def register_with_transformers() -> None:
    """Make `from_pretrained` know artifacts; may be called any number of times, also after a reload."""
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ReallmConfig
    registry.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ReallmQuantizer
    # The closed list of configs whose loading attributes (our mode) a user's config may set.
    others = tuple(
        t for t in getattr(registry, "LOADING_ATTRIBUTES_CONFIG_TYPES", ()) if t.__name__ != ReallmConfig.__name__
    )
    registry.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, ReallmConfig)


def with_mode(quantization: dict[str, Any], mode: str, verify: bool = True) -> dict[str, Any]:
    """A copy of an artifact's `quantization_config` with another mode, and whether checksums are compared."""
    return {**copy.deepcopy(quantization), "mode": check_mode(mode), "verify": verify}


def _within(model: nn.Module, matrices: dict[str, Any]) -> dict[str, Any]:
    """Paths as this model has them: a base model (AutoModel) lacks the first part, and the head."""
    prefix = f"{model.base_model_prefix}."
    if hasattr(model, model.base_model_prefix) or not any(path.startswith(prefix) for path in matrices):
        return matrices
    return {path.removeprefix(prefix): matrix for path, matrix in matrices.items() if path.startswith(prefix)}


def _saved_class(model: nn.Module) -> str:
    """Class that an artifact was written for: config.json's, or the family's causal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    saved = getattr(model.config, "architectures", None)
    return saved[0] if saved else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type, "a causal model")


def _is_another_class(model: nn.Module) -> bool:
    return type(model).__name__ != _saved_class(model)


def _fresh_tensors(model: nn.Module) -> set[str]:
    """State-dict names that an artifact of another class need not have: a new head, which transformers initialises.

    The decoder and a language model's head are never new: random numbers there would be taken for the artifact's.
    """
    decoder = getattr(model, model.base_model_prefix, None)
    if not _is_another_class(model) or decoder is None:
        return set()
    parts = [part for part in (decoder, model.get_output_embeddings()) if part is not None]
    known = {id(module) for part in parts for module in part.modules()}
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if id(module) not in known
        for name in (*module._parameters, *module._buffers)
    }


def _is_there(model: nn.Module, path: str) -> bool:
    """Whether a model has a module of this path, or a parameter whose slice it numbers."""
    modules = dict(model.named_modules())
    parent, _, last = path.rpartition(".")
    return path in modules or (last.isdigit() and parent.rpartition(".")[0] in modules)


def _check(what: str, dtype: torch.dtype, shape: Any, wanted_dtype: torch.dtype, wanted_shape: Any) -> None:
    """Errors: ArtifactError saying what was found and what config.json leads to."""
    if dtype != wanted_dtype or tuple(shape) != tuple(wanted_shape):
        found, wanted = _describe(dtype, shape), _describe(wanted_dtype, wanted_shape)
        raise ArtifactError(f"{what} is {found}, config.json says {wanted}; the artifact is damaged")


def _is_marker(header: Header) -> bool:
    return header.dtype == torch.uint8 and header.shape == (0,)


def _describe(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
