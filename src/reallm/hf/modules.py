"""Modules that store a compressed matrix and act as the linear or embedding that they replace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from reallm.errors import ArtifactError
from reallm.formats import Shape, SharedDecoder, Tensors, Unpacked, WeightFormat, use_shared_decoders
from reallm.hf.validate import check_decoded, check_unpacked

DECODE_AT_LOAD = "decode_at_load"
DECODE_PER_USE = "decode_per_use"
MODES = (DECODE_AT_LOAD, DECODE_PER_USE)

# Attributes of the modules; a stored tensor with such a local name would hide one of them.
RESERVED = frozenset({"weight", "bias", "dense", "wrapped", "trainable_weight"})


_READ_ONLY = (
    "a compressed weight cannot be merged into or changed, which PiSSA, OLoRA, LoftQ and CorDA do too: save the "
    "adapter and use adapters.merge, take the default init_lora_weights, or call model.dequantize() first"
)


class SharedDecoders(nn.Module):
    """The stored tensors of shared decoders, as buffers `<decoder>.<local name>`."""

    def __init__(self, shared_decoders: dict[str, SharedDecoder]) -> None:
        super().__init__()
        self._names = {name: tuple(decoder.layout) for name, decoder in shared_decoders.items()}
        for name, decoder in shared_decoders.items():
            for local, tensor in decoder.layout.items():
                parent, leaf = _descend(self, f"{name}.{local}")
                parent.register_buffer(leaf, tensor)
        self._is_hf_initialized = True

    def packed_tensors(self) -> dict[str, Tensors]:
        """Return the stored tensors by decoder and local name."""
        return {
            decoder: {local: self.get_buffer(f"{decoder}.{local}") for local in names}
            for decoder, names in self._names.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move stored tensors with the model, but never cast them."""
        return super()._apply(lambda tensor: _move_only(fn, tensor), recurse)


class _DecodedWeight(Tensor):
    """A read-only decoded weight: assignments, which would not change the stored tensors, raise ArtifactError.

    PEFT merges into weights and subtracts residuals from them (PiSSA) by `weight.data = …`.
    """

    owner: nn.Module | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # as for parameters: results are plain tensors

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Return a copy."""
        return self.as_subclass(Tensor).detach().clone()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise ArtifactError(_READ_ONLY)


class _ReadOnly(nn.Module):
    """A module whose `weight` is not a parameter but decoded from stored tensors."""

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters to initialise."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Errors: ArtifactError for a `weight` of another module, which would have no effect."""
        if name != "weight":
            super().__setattr__(name, value)
        elif not isinstance(value, _DecodedWeight) or value.owner is not self.weight.owner:
            raise ArtifactError(_READ_ONLY)


class _CompressedModule(_ReadOnly):
    """The stored tensors of one matrix as buffers under their local names, and its decoded weight.

    `dense` (not persistent) is the decoded weight in the compute dtype; while it is empty, the weight
    is decoded at each use. Its dtype follows the model's; stored tensors keep theirs. In fine-tuning
    `trainable_weight` decodes the matrix from trainable tensors, and the buffers are empty.
    """

    def __init__(self, fmt: WeightFormat, shape: Shape, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not the __init__ of nn.Linear or nn.Embedding, which subclasses inherit from
        self.fmt, self.shape = fmt, shape
        self._local_names = tuple(layout := fmt.layout(shape))
        for name, tensor in layout.items():
            assert name.partition(".")[0] not in RESERVED, f"{fmt.name}: local name {name!r} is reserved"
            parent, leaf = _descend(self, name)
            parent.register_buffer(leaf, tensor)
        self.register_buffer("dense", torch.empty(0, dtype=dtype, device="meta"), persistent=False)
        self.trainable_weight: nn.Module | None = None
        self.loading = False  # until loading ends: stored tensors may be missing or still entropy-coded
        self._shared: tuple[SharedDecoders, ...] = ()  # in a tuple: a child module would be listed once per matrix
        # Exclude it from the model's random initialisation.
        self._is_hf_initialized = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of the decoded weight."""
        return self.dense.dtype

    def packed_tensors(self) -> Tensors:
        """Return the stored tensors by local name."""
        return {name: self.get_buffer(name) for name in self._local_names}

    def finish_loading(self) -> None:
        """End loading: all stored tensors are present, in the layout of the format."""
        self.loading = False

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace a stored tensor."""
        parent, leaf = _descend(self, name)
        parent.register_buffer(leaf, tensor)

    def decode(self) -> Float[Tensor, "out in"]:
        """Return the matrix decoded from its stored tensors, in the compute dtype."""
        return self.fmt.decode(self.unpack(), self.shape).to(self.compute_dtype)

    def set_shared_decoders(self, shared_decoders: SharedDecoders) -> None:
        """Use the shared decoders of this module."""
        self._shared = (shared_decoders,)

    def shared_decoder_tensors(self) -> dict[str, Tensors]:
        """Return the stored tensors of the shared decoders of this matrix, by decoder."""
        names = self.fmt.shared_decoders()
        return {name: t for shared in self._shared for name, t in shared.packed_tensors().items() if name in names}

    def unpack(self) -> Unpacked:
        """Return the unpacked tensors of the matrix."""
        with use_shared_decoders(self.shared_decoder_tensors()):
            return self.fmt.unpack(self.packed_tensors(), self.shape)

    def decode_once(self) -> None:
        """Decode the matrix and keep it in `dense`. Errors: FormatError if stored numbers are not finite, or huge."""
        with torch.no_grad():
            dense = self.fmt.decode(self._unpack_checked(), self.shape).to(self.compute_dtype).contiguous()
            check_decoded(dense)
            self.dense = dense

    def check_values(self) -> None:
        """Raise FormatError if stored numbers are not finite, or huge; unpacks the matrix once."""
        with torch.no_grad():
            self._unpack_checked()

    def _unpack_checked(self) -> Unpacked:
        unpacked = self.unpack()
        check_unpacked(unpacked)
        return unpacked

    def attach_trainable(self, trainable_weight: nn.Module) -> None:
        """Use `trainable_weight()` as the matrix from now on, and free the stored tensors."""
        self.trainable_weight = trainable_weight
        for name, tensor in self.packed_tensors().items():
            self.set_tensor(name, tensor.new_empty(0))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the decoded matrix: `dense`, or decoded now. During loading, a meta tensor of its shape.

        The initialisation of some families (GPT-2) reads the weights of other modules before all tensors are loaded.
        """
        if not self.loading and self.trainable_weight is None:
            weight = self.matrix().as_subclass(_DecodedWeight)
            weight.owner = self  # PEFT assigns a module's own weight back when it is removed
            return weight
        return self.matrix()

    def matrix(self) -> Float[Tensor, "out in"]:
        """Return `weight` as a plain tensor."""
        if self.loading:
            blank = torch.empty(self.shape, dtype=self.compute_dtype, device="meta")
            blank._is_hf_initialized = True  # type: ignore[attr-defined]
            return blank
        if self.trainable_weight is not None:
            return self.trainable_weight()
        return self.dense if self.dense.numel() else self.decode()

    def rows(self, ids: Int[Tensor, " ..."]) -> Float[Tensor, "... in"]:
        """Return rows of the matrix by index; only these are decoded if the format allows."""
        if self.trainable_weight is not None or self.dense.numel():
            return F.embedding(ids, self.matrix())
        # A token that occurs twice is decoded once.
        rows, place = torch.unique(ids, return_inverse=True)
        with use_shared_decoders(self.shared_decoder_tensors()):
            found = self.fmt.decode_rows(self.packed_tensors(), self.shape, rows)
        return F.embedding(place, found.to(self.compute_dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the module within a model; alone, return its dense counterpart, which PEFT's modules_to_save train."""
        return _copy_module(self, memo) if memo else copy.deepcopy(self.dense_module(self.compute_dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move stored tensors with the model, but never cast them: their dtype is the format's."""
        stored = {id(tensor) for tensor in self.packed_tensors().values()}

        def move(tensor: Tensor) -> Tensor:
            return _move_only(fn, tensor) if id(tensor) in stored else fn(tensor)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, format={self.fmt.name}"


class CompressedLinear(_CompressedModule, nn.Linear):
    """Compute x @ weight.T + bias, also in place of a Conv1D; `bias` is a normal parameter.

    Inherits from nn.Linear, so that PEFT and others accept it.
    """

    def __init__(
        self,
        fmt: WeightFormat,
        shape: Shape,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        conv1d: bool = False,
    ) -> None:
        super().__init__(fmt, shape, dtype)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)
        self.conv1d = conv1d  # whether `dense_module` returns a Conv1D

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return F.linear(x, self.matrix(), self.bias)

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """Return the plain module that this one replaces, with the decoded weight."""
        plain = _plain_linear(self.shape, self.conv1d)
        weight = self.matrix().to(dtype)
        plain.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        return plain


class CompressedEmbedding(_CompressedModule, nn.Embedding):
    """Look up rows of a compressed matrix; inherits from nn.Embedding.

    `wrapped` is the module it replaces if that has a forward of its own (scaled or normed embeddings): it is run on the
    rows that occur. Its other parameters, buffers and modules are registered here under their names.
    """

    def __init__(self, fmt: WeightFormat, shape: Shape, dtype: torch.dtype, original: nn.Embedding) -> None:
        super().__init__(fmt, shape, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = original.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        own_forward = type(original).forward is not nn.Embedding.forward
        self.wrapped = _strip_tensors(original, dtype) if own_forward else None
        self._other_names = self._register_other_tensors(original) if own_forward else ()

    def finish_loading(self) -> None:
        """Also register an empty parameter as `weight`: PEFT's soft prompts look for one with as many rows."""
        super().finish_loading()
        device = next(iter(self.packed_tensors().values())).device
        blank = torch.empty((self.shape[0], 0), dtype=self.compute_dtype, device=device)
        self._parameters["weight"] = nn.Parameter(
            blank, requires_grad=False
        )  # attribute access still finds the property

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        blank = self._parameters.pop("weight", None)
        super()._load_from_state_dict(*arguments, **named)
        if blank is not None:
            self._parameters["weight"] = blank

    def forward(self, ids: Int[Tensor, " ..."]) -> Float[Tensor, "... in"]:
        if self.wrapped is None:
            return self.rows(ids)
        rows, place = torch.unique(ids, return_inverse=True)
        return self._fill_wrapped({}, {"weight": self.rows(rows)})(place)

    def _register_other_tensors(self, original: nn.Embedding) -> tuple[str, ...]:
        """Register the other parameters, buffers and modules of an embedding here; return their names."""
        others = {n: p for n, p in original._parameters.items() if n != "weight"} | original._modules
        others |= {n: b for n, b in original._buffers.items() if n not in original._non_persistent_buffers_set}
        reserved = set(others) & {name.partition(".")[0] for name in (*self._local_names, *RESERVED)}
        assert not reserved, f"{type(original).__name__}: {reserved} are names of stored tensors"
        for name, value in others.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif name in original._parameters:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        return tuple(others)

    def _fill_wrapped(self, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Embedding:
        """Return a copy of the wrapped embedding with its tensors and modules; `tensors` are set as buffers."""
        module = copy.copy(self.wrapped)
        own = {n: b for n, b in module._buffers.items() if n != "weight"}
        module._parameters = {n: self._parameters[n] for n in self._other_names if n in self._parameters} | parameters
        module._buffers = own | {n: self._buffers[n] for n in self._other_names if n in self._buffers} | tensors
        module._modules = {n: self._modules[n] for n in self._other_names if n in self._modules}
        return module

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """Return the plain module that this one replaces, with the decoded weight."""
        if self.wrapped is None:
            return nn.Embedding(*self.shape, padding_idx=self.padding_idx, _weight=self.matrix().to(dtype))
        plain = self._fill_wrapped({"weight": nn.Parameter(self.matrix().to(dtype))}, {})
        plain.padding_idx = self.padding_idx
        return plain


class CompressedExpert(_CompressedModule):
    """The matrix of one expert in `CompressedExperts`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _copy_module(self, memo)


# Attributes of tensors that modules do not have.
_METHODS = frozenset(
    "T mT size dim numel view reshape transpose permute unbind chunk split contiguous flatten unsqueeze detach data "
    "matmul bmm is_floating_point".split()
)
_PRODUCTS = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)


class CompressedExperts(nn.Module):
    """Replaces a fused (experts, ...) parameter: indexing decodes the slice of one expert.

    Torch functions and tensor methods get the whole decoded tensor; batched products decode one expert at a time.
    `transposed`: the model stores slices as (in, out).
    """

    def __init__(self, experts: list[CompressedExpert], transposed: bool) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.transposed = transposed
        self._is_hf_initialized = True

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: Any) -> Float[Tensor, "rows columns"]:
        if not isinstance(number, int) and not (isinstance(number, Tensor) and number.numel() == 1 and not number.ndim):
            return self.whole()[number]
        weight = self.get_submodule(str(int(number))).matrix()
        return weight.T if self.transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the slices."""
        return self.get_submodule("0").compute_dtype

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the fused parameter."""
        slice_shape = self.get_submodule("0").shape
        return torch.Size((len(self), *(reversed(slice_shape) if self.transposed else slice_shape)))

    @property
    def ndim(self) -> int:
        """Return 3."""
        return 3

    @property
    def device(self) -> torch.device:
        """Return the device of the stored tensors."""
        return next(self.buffers()).device

    def whole(self) -> Float[Tensor, "experts rows columns"]:
        """Return all slices, decoded and stacked."""
        return torch.stack(list(self))

    def __getattr__(self, name: str) -> Any:
        """Return a tensor method of the whole tensor."""
        if name in _METHODS:
            return getattr(self.whole(), name)
        return super().__getattr__(name)

    def __matmul__(self, other: Any) -> Tensor:
        return self.whole() @ other

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Call a torch function on the decoded tensors."""
        if function in _PRODUCTS and len(arguments) == 2 and not named:
            x, experts = arguments
            if isinstance(x, Tensor) and isinstance(experts, cls) and x.ndim == 3 and len(x) == len(experts):
                return torch.stack([rows @ weight for rows, weight in zip(x, experts, strict=True)])
        arguments, named = tree_map(lambda a: a.whole() if isinstance(a, cls) else a, (arguments, named or {}))
        return function(*arguments, **named)

    def dense_parameter(self, dtype: torch.dtype) -> nn.Parameter:
        """Return the fused parameter that this module replaces."""
        return nn.Parameter(self.whole().to(dtype))


class Anchor(nn.Module):
    """An empty parameter outside the state dict, for a model without any other parameter.

    Transformers and PEFT take device and dtype from a model's first parameter. OLMo's norms have no weights, so no
    parameter is left once all its matrices are compressed.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None: ...

    def _load_from_state_dict(self, *_: Any) -> None: ...


class TiedLinear(_ReadOnly, nn.Linear):
    """An lm_head that uses the matrix of another module, the input embedding, and stores nothing."""

    def __init__(self, owner: _CompressedModule, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        # In a tuple: as a plain attribute the owner would be a child module, and its tensors would be listed twice.
        self._owner = (owner,)
        self.out_features, self.in_features = owner.shape
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the owner's decoded matrix."""
        return self._owner[0].weight

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the module within a model; alone, return a plain linear with its own matrix."""
        if memo:
            return _copy_module(self, memo)
        matrix = self._owner[0].matrix().detach()
        plain = self.dense_module(matrix.dtype)
        plain.weight = nn.Parameter(matrix)
        return copy.deepcopy(plain)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # In a model spread over devices, the embedding may be on another device than the input.
        return F.linear(x, self._owner[0].matrix().to(x.device), self.bias)

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """Return the plain module; the caller ties its weight again."""
        plain = _plain_linear(self._owner[0].shape, conv1d=False)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        return plain


def check_mode(mode: Any) -> str:
    """Return `mode` if it is one. Errors: ArtifactError listing the modes."""
    if mode not in MODES:
        raise ArtifactError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    return mode


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return what `copy.deepcopy` would of a module without `__deepcopy__`."""
    made = memo[id(module)] = type(module).__new__(type(module))
    made.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return made


def _move_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return `fn(tensor)`, or if that has another dtype the tensor itself on the new device."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _descend(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule for a dotted local name, created if missing, and the name's last component."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in module._modules:
            child = nn.Module()
            child._is_hf_initialized = True
            module.add_module(parent, child)
        module = module._modules[parent]
    return module, leaf


def _strip_tensors(original: nn.Embedding, dtype: torch.dtype) -> nn.Embedding:
    """Return a copy of the embedding with only its non-persistent buffers; `_fill_wrapped` adds the rest at each call.

    These buffers stay because the family's initialisation, which knows the class, computes them after loading.
    """
    wrapped = copy.copy(original)
    unstored = wrapped._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    wrapped._parameters, wrapped._modules = {}, {}
    wrapped._buffers = {name: buffer for name, buffer in original._buffers.items() if name in unstored}
    # A tensor without rows: initialisation code reads the weight.
    wrapped.register_buffer("weight", torch.empty((0, original.embedding_dim), dtype=dtype, device="meta"), False)
    # The weight at each call has only the rows that occur, so the index of the padding row is meaningless.
    wrapped.padding_idx = None
    return wrapped


def _plain_linear(shape: Shape, conv1d: bool) -> nn.Module:
    """Return a linear (or Conv1D) of shape (out, in) on the meta device."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(*shape) if conv1d else nn.Linear(shape[1], shape[0])
