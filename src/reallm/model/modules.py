"""Modules that hold a compressed matrix and act as the linear or embedding it replaces."""

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
from reallm.formats import Parts, Shape, Table, Tensors, WeightFormat, decode_rows, tables_at_hand
from reallm.model.values import check_decoded, check_parts

DECODE_AT_LOAD = "decode_at_load"
DECODE_PER_USE = "decode_per_use"
MODES = (DECODE_AT_LOAD, DECODE_PER_USE)

# Names of the modules' own; a stored tensor of such a local name would hide one of them.
RESERVED = frozenset({"weight", "bias", "dense", "shell", "live"})


_READ_ONLY = (
    "a compressed weight cannot be merged into or changed, which PiSSA, OLoRA, LoftQ and CorDA do too: save the "
    "adapter and use adapters.merge, take the default init_lora_weights, or call model.dequantize() first"
)


class SharedTables(nn.Module):
    """The stored tensors of decoders that many matrices share, as buffers `<table>.<local name>`."""

    def __init__(self, tables: dict[str, Table]) -> None:
        super().__init__()
        self._names = {name: tuple(table.layout) for name, table in tables.items()}
        for name, table in tables.items():
            for local, tensor in table.layout.items():
                parent, leaf = _descend(self, f"{name}.{local}")
                parent.register_buffer(leaf, tensor)
        self._is_hf_initialized = True

    def stored(self) -> dict[str, Tensors]:
        """The tensors by table and local name."""
        return {
            table: {local: self.get_buffer(f"{table}.{local}") for local in names}
            for table, names in self._names.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move stored tensors with the model, but never cast them."""
        return super()._apply(lambda tensor: _moved_only(fn, tensor), recurse)


class _Decoded(Tensor):
    """A decoded weight to look at. What is written into it would change no stored tensor: it is refused.

    PEFT merges into weights and takes residuals out of them (PiSSA) by `weight.data = …`.
    """

    owner: nn.Module | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # as for parameters: what is computed is a plain tensor

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A copy."""
        return self.as_subclass(Tensor).detach().clone()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise ArtifactError(_READ_ONLY)


class _ReadOnly(nn.Module):
    """A module whose `weight` is no parameter but made of stored tensors."""

    def reset_parameters(self) -> None:
        """Nothing: there are none."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's. Errors: ArtifactError for another `weight` than its own, which nothing would read."""
        if name != "weight":
            super().__setattr__(name, value)
        elif not isinstance(value, _Decoded) or value.owner is not self.weight.owner:
            raise ArtifactError(_READ_ONLY)


class _Compressed(_ReadOnly):
    """Stored tensors of one matrix as buffers under their local names, and its weight.

    `dense` (not persistent) is the decoded weight in the compute dtype; while it is empty, the weight
    is decoded at each use. Its dtype follows the model's; stored tensors keep theirs. While the matrix is
    tuned, `live` decodes it from parts that train, and nothing is stored here.
    """

    def __init__(self, fmt: WeightFormat, shape: Shape, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # and nothing of the linear or embedding that a subclass also is
        self.fmt, self.shape = fmt, shape
        self._local_names = tuple(layout := fmt.layout(shape))
        for name, tensor in layout.items():
            assert name.partition(".")[0] not in RESERVED, f"{fmt.name}: local name {name!r} is reserved"
            parent, leaf = _descend(self, name)
            parent.register_buffer(leaf, tensor)
        self.register_buffer("dense", torch.empty(0, dtype=dtype, device="meta"), persistent=False)
        self.live: nn.Module | None = None
        self.loading = False  # until the loader is done: stored tensors may be entropy-coded still, or not there
        self._shared: tuple[SharedTables, ...] = ()  # in a tuple: a child would list its tensors once a matrix
        # Nothing in here is for the model's random initialisation.
        self._is_hf_initialized = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the decoded weight."""
        return self.dense.dtype

    def stored(self) -> Tensors:
        """The stored tensors by local name."""
        return {name: self.get_buffer(name) for name in self._local_names}

    def loaded(self) -> None:
        """Say that all stored tensors are there, as the file's layout has them."""
        self.loading = False

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a stored tensor."""
        parent, leaf = _descend(self, name)
        parent.register_buffer(leaf, tensor)

    def decode(self) -> Float[Tensor, "out in"]:
        """The matrix from its stored tensors, in the compute dtype."""
        return self.fmt.decode(self.unpacked(), self.shape).to(self.compute_dtype)

    def use_shared(self, tables: SharedTables) -> None:
        """Take shared decoders from there."""
        self._shared = (tables,)

    def shared_tables(self) -> dict[str, Tensors]:
        """Stored tensors of the decoders that this matrix shares with others, by table."""
        names = self.fmt.tables()
        return {name: t for shared in self._shared for name, t in shared.stored().items() if name in names}

    def unpacked(self) -> Parts:
        """The parts of the matrix."""
        with tables_at_hand(self.shared_tables()):
            return self.fmt.unpack(self.stored(), self.shape)

    def decode_once(self) -> None:
        """Keep the decoded matrix from now on. Errors: FormatError if stored numbers are not what a fit gives."""
        with torch.no_grad():
            parts = self._checked_parts()
            dense = self.fmt.decode(parts, self.shape).to(self.compute_dtype).contiguous()
            check_decoded(dense)
            self.dense = dense

    def check_values(self) -> None:
        """Errors: FormatError if stored numbers are not what a fit gives; unpacks the matrix once."""
        with torch.no_grad():
            self._checked_parts()

    def _checked_parts(self) -> Parts:
        parts = self.unpacked()
        check_parts(parts)
        return parts

    def come_alive(self, live: nn.Module) -> None:
        """Take the matrix from what `live()` decodes from now on, and let go of what is stored."""
        self.live = live
        for name, tensor in self.stored().items():
            self.put(name, tensor.new_empty(0))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded matrix: the kept one, or a fresh one. While it loads, an empty one of its shape without memory.

        Families whose initialisation looks at the weights of other modules (GPT-2) do so before all tensors are there.
        """
        if not self.loading and self.live is None:
            weight = self.matrix().as_subclass(_Decoded)
            weight.owner = self  # PEFT puts a module's own weight back when it goes
            return weight
        return self.matrix()

    def matrix(self) -> Float[Tensor, "out in"]:
        """`weight` as a plain tensor, to compute with."""
        if self.loading:
            blank = torch.empty(self.shape, dtype=self.compute_dtype, device="meta")
            blank._is_hf_initialized = True  # type: ignore[attr-defined]
            return blank
        if self.live is not None:
            return self.live()
        return self.dense if self.dense.numel() else self.decode()

    def rows(self, ids: Int[Tensor, " ..."]) -> Float[Tensor, "... in"]:
        """Rows of the matrix by number; decodes only those if the format can."""
        if self.live is not None or self.dense.numel():
            return F.embedding(ids, self.matrix())
        # A token that occurs twice is decoded once.
        rows, place = torch.unique(ids, return_inverse=True)
        with tables_at_hand(self.shared_tables()):
            found = decode_rows(self.fmt, self.stored(), self.shape, rows)
        return F.embedding(place, found.to(self.compute_dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """In a model, the same; of it alone, the plain module it stands for: PEFT's modules_to_save train that."""
        return _copied(self, memo) if memo else copy.deepcopy(self.dense_module(self.compute_dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move stored tensors with the model, but never cast them: their dtype is the format's."""
        stored = {id(tensor) for tensor in self.stored().values()}

        def move(tensor: Tensor) -> Tensor:
            return _moved_only(fn, tensor) if id(tensor) in stored else fn(tensor)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, format={self.fmt.name}"


class CompressedLinear(_Compressed, nn.Linear):
    """x @ weight.T + bias, also for Conv1D; `bias` is a normal parameter.

    It is a linear for those who ask, so that PEFT and others work over it.
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
        self.conv1d = conv1d  # what to turn into again when decompressed

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return F.linear(x, self.matrix(), self.bias)

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """The plain module it stands for, with the decoded weight."""
        plain = _plain_linear(self.shape, self.conv1d)
        weight = self.matrix().to(dtype)
        plain.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        return plain


class CompressedEmbedding(_Compressed, nn.Embedding):
    """A look-up of rows; an embedding for those who ask.

    `shell` is the module it replaces if that has a forward of its own (scaled or normed embeddings): it is run on the
    rows that occur, so that whatever it does is done. What it stores beside its table is held here, under its names.
    """

    def __init__(self, fmt: WeightFormat, shape: Shape, dtype: torch.dtype, original: nn.Embedding) -> None:
        super().__init__(fmt, shape, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = original.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        own_forward = type(original).forward is not nn.Embedding.forward
        self.shell = _hollow(original, dtype) if own_forward else None
        self._held = self._take_over(original) if own_forward else ()

    def loaded(self) -> None:
        """Also put a parameter of no bytes where the table was: PEFT's soft prompts seek one with so many rows."""
        super().loaded()
        device = next(iter(self.stored().values())).device
        blank = torch.empty((self.shape[0], 0), dtype=self.compute_dtype, device=device)
        self._parameters["weight"] = nn.Parameter(blank, requires_grad=False)  # `weight` itself stays the property

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        blank = self._parameters.pop("weight", None)
        super()._load_from_state_dict(*arguments, **named)
        if blank is not None:
            self._parameters["weight"] = blank

    def forward(self, ids: Int[Tensor, " ..."]) -> Float[Tensor, "... in"]:
        if self.shell is None:
            return self.rows(ids)
        rows, place = torch.unique(ids, return_inverse=True)
        return self._filled({}, {"weight": self.rows(rows)})(place)

    def _take_over(self, original: nn.Embedding) -> tuple[str, ...]:
        """Hold what an embedding stores beside its table; returns the names."""
        held = {n: p for n, p in original._parameters.items() if n != "weight"} | original._modules
        held |= {n: b for n, b in original._buffers.items() if n not in original._non_persistent_buffers_set}
        taken = set(held) & {name.partition(".")[0] for name in (*self._local_names, *RESERVED)}
        assert not taken, f"{type(original).__name__}: {taken} are names of stored tensors"
        for name, value in held.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif name in original._parameters:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        return tuple(held)

    def _filled(self, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Embedding:
        """The module it replaces with what is held here; `tensors` as buffers, which may be any tensor."""
        filled = copy.copy(self.shell)
        own = {n: b for n, b in filled._buffers.items() if n != "weight"}
        filled._parameters = {n: self._parameters[n] for n in self._held if n in self._parameters} | parameters
        filled._buffers = own | {n: self._buffers[n] for n in self._held if n in self._buffers} | tensors
        filled._modules = {n: self._modules[n] for n in self._held if n in self._modules}
        return filled

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """The plain module it stands for, with the decoded weight."""
        if self.shell is None:
            return nn.Embedding(*self.shape, padding_idx=self.padding_idx, _weight=self.matrix().to(dtype))
        plain = self._filled({"weight": nn.Parameter(self.matrix().to(dtype))}, {})
        plain.padding_idx = self.padding_idx
        return plain


class CompressedExpert(_Compressed):
    """One expert's matrix; `CompressedExperts` hands it out."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _copied(self, memo)


# Of tensors, and not of modules.
_METHODS = frozenset(
    "T mT size dim numel view reshape transpose permute unbind chunk split contiguous flatten unsqueeze detach data "
    "matmul bmm is_floating_point".split()
)
_PRODUCTS = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)


class CompressedExperts(nn.Module):
    """Stands for a fused (experts, ...) parameter: indexing decodes that expert's slice.

    For functions of torch, and by its methods, it is the whole tensor, decoded; a batched product takes one expert
    after the other. `transposed`: the model stores slices as (in, out).
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
        """dtype of the slices."""
        return self.get_submodule("0").compute_dtype

    @property
    def shape(self) -> torch.Size:
        """That of the fused parameter."""
        slice_shape = self.get_submodule("0").shape
        return torch.Size((len(self), *(reversed(slice_shape) if self.transposed else slice_shape)))

    @property
    def ndim(self) -> int:
        """Three."""
        return 3

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(self.buffers()).device

    def whole(self) -> Float[Tensor, "experts rows columns"]:
        """All slices, decoded."""
        return torch.stack(list(self))

    def __getattr__(self, name: str) -> Any:
        """A tensor's method is that of the whole."""
        if name in _METHODS:
            return getattr(self.whole(), name)
        return super().__getattr__(name)

    def __matmul__(self, other: Any) -> Tensor:
        return self.whole() @ other

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """What a function of torch gives of the decoded tensors."""
        if function in _PRODUCTS and len(arguments) == 2 and not named:
            x, experts = arguments
            if isinstance(x, Tensor) and isinstance(experts, cls) and x.ndim == 3 and len(x) == len(experts):
                return torch.stack([rows @ weight for rows, weight in zip(x, experts, strict=True)])
        arguments, named = tree_map(lambda a: a.whole() if isinstance(a, cls) else a, (arguments, named or {}))
        return function(*arguments, **named)

    def dense_parameter(self, dtype: torch.dtype) -> nn.Parameter:
        """The fused parameter it stands for."""
        return nn.Parameter(self.whole().to(dtype))


class Anchor(nn.Module):
    """An empty parameter that is no part of the state, for a model of which everything else is buffers.

    Transformers and PEFT ask a model's first parameter for device and dtype. OLMo's norms have no weights, so that
    none is left once all its matrices are compressed.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None: ...

    def _load_from_state_dict(self, *_: Any) -> None: ...


class TiedLinear(_ReadOnly, nn.Linear):
    """A head that uses the matrix of another module, the input embedding's, and stores nothing of it."""

    def __init__(self, owner: _Compressed, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        # In a tuple: a plain attribute would make the owner a child, and its tensors be listed twice.
        self._owner = (owner,)
        self.out_features, self.in_features = owner.shape
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The owner's decoded matrix."""
        return self._owner[0].weight

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """In a model, the same; of this module alone, a plain linear with a matrix of its own."""
        if memo:
            return _copied(self, memo)
        matrix = self._owner[0].matrix().detach()
        plain = self.dense_module(matrix.dtype)
        plain.weight = nn.Parameter(matrix)
        return copy.deepcopy(plain)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # Spread over devices, the embedding may lie on another than the head's input.
        return F.linear(x, self._owner[0].matrix().to(x.device), self.bias)

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """The plain module; its weight is to be tied again."""
        plain = _plain_linear(self._owner[0].shape, conv1d=False)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        return plain


def check_mode(mode: Any) -> str:
    """A mode's name. Errors: ArtifactError listing the modes."""
    if mode not in MODES:
        raise ArtifactError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    return mode


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` makes of a module."""
    made = memo[id(module)] = type(module).__new__(type(module))
    made.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return made


def _moved_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of a stored tensor, in its own dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _descend(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a dotted local name, made where it is missing, and the last part."""
    *parts, leaf = name.split(".")
    for part in parts:
        if part not in module._modules:
            child = nn.Module()
            child._is_hf_initialized = True
            module.add_module(part, child)
        module = module._modules[part]
    return module, leaf


def _hollow(original: nn.Embedding, dtype: torch.dtype) -> nn.Embedding:
    """The module with nothing but buffers that are not stored; it will be lent the rest at each call.

    These stay: the family's initialisation, which knows the class, makes them after loading.
    """
    shell = copy.copy(original)
    unstored = shell._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    shell._parameters, shell._modules = {}, {}
    shell._buffers = {name: buffer for name, buffer in original._buffers.items() if name in unstored}
    # No rows, but a tensor: initialisation code reads the weight.
    shell.register_buffer("weight", torch.empty((0, original.embedding_dim), dtype=dtype, device="meta"), False)
    # The table lent holds only the rows that occur, so the number of the padding row means nothing.
    shell.padding_idx = None
    return shell


def _plain_linear(shape: Shape, conv1d: bool) -> nn.Module:
    """An empty linear (or Conv1D) of a shape (out, in)."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(*shape) if conv1d else nn.Linear(shape[1], shape[0])
