"""The quantization config of an artifact, and the quantizer that `from_pretrained` calls."""

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

from reallm.checkpoint.checksums import verify
from reallm.checkpoint.entropy_coding import decode_tensor, encode_tensor
from reallm.checkpoint.headers import Header, read_headers
from reallm.checkpoint.manifest import QUANT_METHOD, VERSION, Manifest, check_version
from reallm.errors import ArtifactError, FormatError
from reallm.formats import WeightFormat, collect_shared_decoders, shared_decoder_layout
from reallm.hf.memory_footprint import count_matrices
from reallm.hf.modules import DECODE_AT_LOAD, Anchor, check_mode
from reallm.hf.replacement import compressed_modules, replace_with_compressed, replace_with_dense
from reallm.hf.validate import check_unquantized
from reallm.source.limits import check_buffer_nbytes
from reallm.source.model_source import Source
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import Matrix

# Shown by a loader that does not know reallm, in its table of unexpected tensors.
REMEDY = "COMPRESSED_BY_REALLM.pip_install_reallm-compress_and_IMPORT_REALLM_before_from_pretrained"


class ReallmConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact: plain JSON values only, the fields of `Manifest` and `mode`.

    A user may pass `ReallmConfig(mode=..., verify=...)` to `from_pretrained`: these two are used, all other fields come
    from the artifact. `verify`: compare the tensors with the checksums before they are loaded. Unknown keys are
    preserved.
    Errors: ArtifactError for a newer version or an unknown mode.
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
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.version = check_version(version)
        self.mode = check_mode(mode)
        self.layouts = layouts or []
        self.matrices = matrices or {}
        self.provenance = provenance or {}
        self.checksums = checksums or {}
        self.verify = verify
        for key, value in unknown.items():
            setattr(self, key, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the fields that a config passed to `from_pretrained` may change."""
        return {"mode": self.mode, "verify": self.verify}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are written to config.json."""
        values = super().to_dict()
        del values["verify"]
        if not self.checksums:
            del values["checksums"]
        return values

    def manifest(self) -> Manifest:
        """Return the manifest: the compressed matrices and their formats.

        Errors: FormatError for an unknown format; ArtifactError for entries that do not fit together.
        """
        return Manifest.from_dict(self.to_dict())

    def weight_formats(self) -> dict[str, WeightFormat]:
        """Return the format of every compressed matrix by module path."""
        return {matrix.name: matrix.fmt for matrix in self.manifest().matrices}

    def coded_tensors(self) -> dict[str, tuple[str, ...]]:
        """Return the local names of entropy-coded tensors by module path."""
        return {matrix.name: matrix.coded for matrix in self.manifest().matrices if matrix.coded}


def write_config(source: Source, manifest: Manifest, folder: Path) -> None:
    """Write `config.json`: the source model's config plus the manifest."""
    config = copy.deepcopy(source.config)
    config.quantization_config = ReallmConfig(**manifest.to_dict())
    with silence_transformers():
        config.save_pretrained(folder)


def marker_tensors(matrices: list[Matrix]) -> dict[str, Tensor]:
    """Return empty tensors that make loading fail without reallm, instead of giving random weights.

    A loader that does not know reallm finds the first under the name of a plain weight, with another shape, and fails;
    the name of the second states the remedy. `ReallmQuantizer` ignores both.
    """
    if not matrices:
        return {}
    empty = torch.empty(0, dtype=torch.uint8)
    return {matrices[0].parameter: empty, REMEDY: empty.clone()}


class ReallmQuantizer(HfQuantizer):
    """Replace modules before the weights are loaded, check the loaded tensors, decode them in mode decode_at_load."""

    requires_calibration = True  # there is no quantization on load: only artifacts are loaded
    quantization_config: ReallmConfig

    def __init__(self, quantization_config: ReallmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        check_mode(quantization_config.mode)
        self._stored: dict[str, Tensor] = {}  # full name -> expected tensor, on the meta device
        self._shared: dict[str, Tensor] = {}  # subset of _stored: tensors of shared decoders
        self._coded: set[str] = set()  # subset of _stored: entropy-coded in the file
        self._markers: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ArtifactError for offloading to disk, which does not support buffers."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise ArtifactError("device_map: a compressed model cannot be offloaded to disk; use cpu or a GPU")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        named = {matrix.name: matrix for matrix in self.quantization_config.manifest().matrices}
        matrices = _strip_prefix(model, named)
        if _is_another_class(model):
            matrices = self._omit_head(model, matrices)
        replace_with_compressed(model, {path: matrix.fmt for path, matrix in matrices.items()})
        for path, module in compressed_modules(model).items():
            if module.shape != matrices[path].shape:
                raise ArtifactError(
                    f"{path}: the model has {module.shape}, config.json says {matrices[path].shape}; it is damaged"
                )
            module.loading = True
        check_buffer_nbytes(model, "artifact", ArtifactError)
        self._stored = {
            f"{path}.{local}": tensor
            for path, module in compressed_modules(model).items()
            for local, tensor in module.packed_tensors().items()
        }
        self._shared = shared_decoder_layout(collect_shared_decoders(matrix.fmt for matrix in matrices.values()))
        self._stored |= self._shared
        coded = _strip_prefix(model, self.quantization_config.coded_tensors())
        self._coded = {f"{path}.{local}" for path, names in coded.items() for local in names}
        if files := kwargs.get("checkpoint_files"):
            self._check_files(model, [Path(file) for file in files])
        return model

    def _omit_head(self, model: nn.Module, matrices: dict[str, Any]) -> dict[str, Any]:
        """Omit an lm_head that a model of another class, for instance a classifier, does not have.

        Errors: ArtifactError if its decoder has another name, as in some question-answering models.
        """
        prefix = f"{model.base_model_prefix}."
        lost = {path for path in matrices if not path.startswith(prefix) and not _has_matrix(model, path)}
        if not hasattr(model, model.base_model_prefix) or not lost:
            return matrices
        if len(lost) == len(matrices):
            raise ArtifactError(
                f"{type(model).__name__}: keeps its decoder under {prefix!r}, the artifact has {max(lost)!r}; "
                f"artifacts load as {_saved_class(model)}, and as classes with the same decoder name"
            )
        # The saved model lacks them too.
        matrices_by_path = self.quantization_config.matrices
        self.quantization_config.matrices = {
            path: number for path, number in matrices_by_path.items() if path not in lost
        }
        return {path: matrix for path, matrix in matrices.items() if path not in lost}

    def _check_files(self, model: nn.Module, files: list[Path]) -> None:
        """Compare the headers with the model before any tensor is read, and find the markers."""
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
            # Unquantized parameters may be stored in another dtype than the compute dtype; compressed ones may not.
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
            self._check_loaded(name, model.get_buffer(name))
        for path, module in compressed_modules(model).items():
            for local, tensor in module.packed_tensors().items():
                if f"{path}.{local}" in self._coded and tensor.device.type != "meta":
                    tensor = self._decode_entropy_coded(f"{path}.{local}", tensor)
                    module.set_tensor(local, tensor)
                self._check_loaded(f"{path}.{local}", tensor)
            module.finish_loading()
            try:
                if self.quantization_config.mode == DECODE_AT_LOAD:
                    module.decode_once()
                else:
                    module.check_values()
            except FormatError as error:
                raise ArtifactError(f"{path}: {error}; copy the artifact again") from error
        check_unquantized(model)
        if next(model.parameters(), None) is None:
            module = next(iter(compressed_modules(model).values()))
            stored = next(iter(module.packed_tensors().values()))
            model.add_module("anchor", Anchor(module.compute_dtype, stored.device))
        count_matrices(model)
        # A model saved from now on may differ from the loaded one.
        self.quantization_config.checksums = {}
        return model

    def _check_loaded(self, name: str, tensor: Tensor) -> None:
        wanted = self._stored[name]
        if tensor.device.type == "meta":
            raise ArtifactError(f"tensor {name!r} is missing; copy the artifact again")
        _check(f"tensor {name!r}", tensor.dtype, tensor.shape, wanted.dtype, wanted.shape)

    def _decode_entropy_coded(self, name: str, tensor: Tensor) -> Tensor:
        try:
            return decode_tensor(tensor, self._stored[name])
        except FormatError as error:
            raise ArtifactError(f"tensor {name!r}: {error}") from error

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return None for stored tensors, which are never cast, else what transformers returns."""
        targets = getattr(converter, "target_patterns", ())
        return None if any(name in self._stored for name in targets) else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return True for stored tensors, so that this quantizer checks their shapes, not transformers."""
        return param_name in self._stored

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """Return no conversions: an artifact has the names and layouts of the transformers model."""
        return []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: the state dict, entropy-coded again where it was, and the markers."""
        markers = {name: torch.empty(0, dtype=torch.uint8) for name in self._markers}
        state = model.state_dict()
        if lost := [name for name in self._stored if name not in state]:
            raise ArtifactError(
                f"{lost[0]!r} and {len(lost) - 1} other stored tensors are no longer in the model under their names "
                "(resized, or wrapped by PEFT): save the adapter alone, or call model.dequantize() before the change"
            )
        coded = {name: encode_tensor(state[name]) for name in self._coded}
        return {**state, **coded, **markers}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: it is saved as it was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained; the stored tensors are not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return whether the mode is decode_at_load: then all products are plain."""
        return self.quantization_config.mode == DECODE_AT_LOAD

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        replace_with_dense(model, dtype or model.dtype)
        count_matrices(model, False)
        return model


def register_with_transformers() -> None:
    """Register config and quantizer with transformers; may be called again, also after a reload."""
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ReallmConfig
    registry.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ReallmQuantizer
    # Transformers lists the config classes whose loading attributes (here `mode`) a user's config may set.
    others = tuple(
        t for t in getattr(registry, "LOADING_ATTRIBUTES_CONFIG_TYPES", ()) if t.__name__ != ReallmConfig.__name__
    )
    registry.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, ReallmConfig)


def replace_mode(quantization: dict[str, Any], mode: str, verify: bool = True) -> dict[str, Any]:
    """Return a copy of an artifact's `quantization_config` with another mode and `verify`."""
    return {**copy.deepcopy(quantization), "mode": check_mode(mode), "verify": verify}


def _strip_prefix(model: nn.Module, matrices: dict[str, Any]) -> dict[str, Any]:
    """Return the matrices by this model's paths: a base model (AutoModel) lacks the prefix and lm_head."""
    prefix = f"{model.base_model_prefix}."
    if hasattr(model, model.base_model_prefix) or not any(path.startswith(prefix) for path in matrices):
        return matrices
    return {path.removeprefix(prefix): matrix for path, matrix in matrices.items() if path.startswith(prefix)}


def _saved_class(model: nn.Module) -> str:
    """Return the class name in config.json, or of the family's causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    saved = getattr(model.config, "architectures", None)
    return saved[0] if saved else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type, "a causal model")


def _is_another_class(model: nn.Module) -> bool:
    return type(model).__name__ != _saved_class(model)


def _fresh_tensors(model: nn.Module) -> set[str]:
    """Return state-dict names that an artifact of another class may lack: a new head, which transformers initialises.

    Decoder and lm_head are never new: their random weights would be mistaken for the artifact's.
    """
    decoder = getattr(model, model.base_model_prefix, None)
    if not _is_another_class(model) or decoder is None:
        return set()
    required = [module for module in (decoder, model.get_output_embeddings()) if module is not None]
    known = {id(module) for parent in required for module in parent.modules()}
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if id(module) not in known
        for name in (*module._parameters, *module._buffers)
    }


def _has_matrix(model: nn.Module, path: str) -> bool:
    """Return whether a model has a module of this path, or a fused parameter of which it is a slice."""
    modules = dict(model.named_modules())
    parent, _, last = path.rpartition(".")
    return path in modules or (last.isdigit() and parent.rpartition(".")[0] in modules)


def _check(what: str, dtype: torch.dtype, shape: Any, wanted_dtype: torch.dtype, wanted_shape: Any) -> None:
    """Raise ArtifactError with both values if dtype or shape are not those that config.json implies."""
    if dtype != wanted_dtype or tuple(shape) != tuple(wanted_shape):
        found, wanted = _describe(dtype, shape), _describe(wanted_dtype, wanted_shape)
        raise ArtifactError(f"{what} is {found}, config.json says {wanted}; the artifact is damaged")


def _is_marker(header: Header) -> bool:
    return header.dtype == torch.uint8 and header.shape == (0,)


def _describe(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
