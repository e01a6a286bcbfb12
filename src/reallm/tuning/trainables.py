"""Trainable tensors of a compressed model, chosen by parameter group: float tensors of compressed matrices, their
decoders, and unquantized tensors.

packed tensors ── unpack ──▶ codes are frozen, chosen float tensors become parameters ── decode, at every use ──▶ weight

A parameter is its tensor divided by a power of two near the tensor's root mean square, which is exact. One learning
rate therefore serves scales of 0.01 and codebook entries of 3 alike.

The weights of a decoder net are stored as low-bit codes and scales. Both train, the codes as real numbers with a
straight-through estimator for rounding. A shared decoder is one such weight, which all its matrices reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reallm.errors import RecipeError
from reallm.formats import (
    Shape,
    Tensors,
    Unpacked,
    WeightFormat,
    fake_quantizer,
    from_spec,
    map_tensors,
    named_tensors,
    replace_tensors,
    shared_decoder_name,
    use_shared_decoders,
    zero_value,
)
from reallm.formats import parameters as decoder_store
from reallm.formats.base import add_prefix, strip_prefix
from reallm.formats.dense import UnpackedDense
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.shared_decoders import PREFIX as SHARED
from reallm.hf import CompressedLinear
from reallm.hf.replacement import compressed_modules
from reallm.kernels import straight_through
from reallm.source import Walk
from reallm.source.decoder_blocks import decoder_blocks
from reallm.tuning.tune_settings import PARAMETER_GROUPS

_FOLDED = from_spec({"format": "dense", "dtype": "float32"})
_GROUP_BY_REASON = {"norm": "norms", "bias": "biases"}
_UNIT_FOR_ZEROS = 2.0**-3  # a residual that starts at zero: steps of 1e-4 at the default learning rate
_ZERO_SIZE = 2.0**-40


class TrainableWeight(nn.Module):
    """A compressed weight whose chosen tensors are parameters; calling it decodes the weight.

    `shared_decoders` are the trainable shared decoders by name, each a weight of one row. They are not registered as
    submodules, so that each appears once among the model's parameters.
    """

    def __init__(
        self,
        fmt: WeightFormat,
        shape: Shape,
        stored: Tensors,
        chosen: Sequence[str],
        constant_dtype: torch.dtype | None,
        shared_decoders: Mapping[str, TrainableWeight] | None = None,
    ) -> None:
        """`chosen` are local tensor names; `constant_dtype` is the dtype of folded constants, None: no folding."""
        super().__init__()
        self.fmt, self.shape = fmt, shape
        unpacked = fmt.unpack(stored, shape)
        values = named_tensors(unpacked)
        # (tensor, shared decoder, tensor of the decoder): a tuple, so that no decoder is registered as a submodule.
        self._shared_tensors = tuple(
            (name, shared_decoders[decoder], name.rpartition(".")[2])
            for name in values
            if (decoder := shared_decoder_name(fmt, name))
            and shared_decoders is not None
            and decoder in shared_decoders
        )
        trainable = {*chosen, *(name for name, _, _ in self._shared_tensors)}
        self.zeros = {name: zero_value(fmt, name) for name in chosen}
        self.units = {name: power_of_two_unit(values[name].float() - self.zeros[name]) for name in chosen}
        self._chosen_types = {name: values[name].dtype for name in chosen}
        self._rounding = {name: fake_quantizer(fmt, name, shape) for name in chosen}
        self._rounded: dict[str, tuple[int, Tensor]] = {}
        for name in chosen:
            scaled = (values[name].float() - self.zeros[name]) / self.units[name]
            self.register_parameter(_leaf(name), nn.Parameter(scaled))
        self.folded_fmt, self.scale_factors = fmt, {}
        if constant_dtype is not None:
            self.folded_fmt, unpacked, self.scale_factors = _fold_constants(
                fmt, unpacked, shape, trainable, constant_dtype
            )
        self._types: dict[str, torch.dtype] = {}
        for name, tensor in named_tensors(unpacked).items():
            if name not in trainable:
                self._types[name] = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self.register_buffer(_leaf(name, "constant"), _narrow(tensor), persistent=False)
        self._meta_tensors = map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), unpacked)

    def trained_tensor(self, name: str) -> Tensor:
        """Return a trained tensor in natural units, float32."""
        values = self.get_parameter(_leaf(name)) * self.units[name]
        return (
            values + self.zeros[name] if self.zeros[name] else values
        )  # adding 0 costs one more kernel launch, twice per step

    def export_tensors(self) -> Tensors:
        """Return the trained tensors as they are read back from a file."""
        return {
            n: self._rounding[n](self.trained_tensor(n).detach()).to(dtype) for n, dtype in self._chosen_types.items()
        }

    def export_unpacked(self) -> Unpacked:
        """Return the unpacked weight as it is stored; every tensor of it must train."""
        return replace_tensors(self._meta_tensors, self.export_tensors())

    def forward(self) -> Float[Tensor, "out in"]:
        """Return the decoded weight in float32, differentiable in the parameters."""
        device = next(itertools.chain(self.buffers(), self.parameters())).device
        with torch.autocast(device.type, enabled=False):
            trained = {name: self.rounded_tensor(name) for name in self.units}
            # In block-wise tuning a block is on a different device than the shared decoders.
            trained |= {name: decoder.rounded_tensor(part).to(device) for name, decoder, part in self._shared_tensors}
            tensors = {name: self.get_buffer(_leaf(name, "constant")).to(dtype) for name, dtype in self._types.items()}
            for place, name in self.scale_factors.items():
                tensors[place] = tensors[place] * trained[name]
            return self.folded_fmt.decode(replace_tensors(self._meta_tensors, tensors | trained), self.shape)

    def rounded_tensor(self, name: str) -> Tensor:
        """Return a trained tensor rounded as it is stored, with a straight-through gradient."""
        values = self.trained_tensor(name)
        # Round once per step: a step runs every block twice per micro-batch, and validation runs it again.
        parameter = self.get_parameter(_leaf(name))
        version, rounded = self._rounded.get(name, (-1, values))
        if version != parameter._version or rounded.device != values.device:
            rounded = self._rounding[name](values.detach())
            self._rounded[name] = parameter._version, rounded
        return straight_through(values, rounded)


class _UnquantizedTensor(nn.Module):
    """Parametrization of a trainable unquantized tensor: parameter · unit, rounded as it is stored."""

    def __init__(self, unit: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.unit, self.dtype = unit, dtype

    def forward(self, parameter: Tensor) -> Tensor:
        values = parameter * self.unit
        return straight_through(values, values.detach().to(self.dtype).to(values.dtype))

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / self.unit


@dataclass(frozen=True)
class Trainables:
    """Trainable parameters of a model by the name of the stored tensor; `counts` are values per parameter group."""

    parameters: dict[str, nn.Parameter]
    counts: dict[str, int]
    matrices: dict[str, TrainableWeight]
    unquantized: dict[str, torch.dtype]
    model: nn.Module
    shared_decoders: dict[str, TrainableWeight] = field(default_factory=dict)

    def module_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters inside one module, such as a block."""
        members = {id(parameter) for parameter in module.parameters()}
        return {name: p for name, p in self.parameters.items() if id(p) in members}

    def export_tensors(self) -> Tensors:
        """Return every trained tensor in natural units, as it is read back from a file.

        Shared decoders are packed, under their names in the file.
        """
        tensors: Tensors = {}
        for path, trainable_weight in self.matrices.items():
            tensors |= add_prefix(path, trainable_weight.export_tensors())
        for name, dtype in self.unquantized.items():
            tensors[name] = _get_tensor(self.model, name).detach().to(dtype)
        for decoder, trainable_weight in self.shared_decoders.items():
            packed = trainable_weight.fmt.pack(trainable_weight.export_unpacked(), trainable_weight.shape)
            tensors |= add_prefix(f"{SHARED}.{decoder}.{decoder_store.PREFIX}", packed)
        return tensors

    @contextlib.contextmanager
    def freeze_shared_decoders(self) -> Iterator[None]:
        """Disable gradients of shared decoders in the context: they belong to no block."""
        shared = [
            parameter
            for trainable_weight in self.shared_decoders.values()
            for parameter in trainable_weight.parameters()
        ]
        for parameter in shared:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in shared:
                parameter.requires_grad_()


def choose(
    model: nn.Module,
    walked: Walk,
    stored_dtypes: dict[str, torch.dtype],
    train: Sequence[str],
    *,
    constant_dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
    blocks_only: bool = False,
) -> Trainables:
    """Make the parameter groups `train` of a compressed model trainable and freeze everything else.

    The model must be loaded with decode_per_use. `stored_dtypes` are those of unquantized tensors in the file. With
    `blocks_only` no unquantized tensor outside the decoder blocks trains, such as the last norm. Constants are decoded
    on `device` one matrix at a time; the matrices stay on their devices.
    Errors: RecipeError if the model has none of the groups.
    """
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    counts: dict[str, int] = defaultdict(int)
    matrices, kinds, available = {}, {m.name: m.kind for m in walked.matrices}, set()
    modules = compressed_modules(model)
    selected = [path for path in modules if kinds[path] == "block" or kinds[path] in train]
    shared_decoders = (
        _trainable_decoders(model, [modules[path] for path in selected]) if decoder_store.ROLE in train else {}
    )
    for decoder, trainable_weight in shared_decoders.items():
        for name in trainable_weight.units:
            stored_name = f"{SHARED}.{decoder}.{decoder_store.PREFIX}.{name}"
            parameters[stored_name] = trainable_weight.get_parameter(_leaf(name))
            counts[decoder_store.ROLE] += parameters[stored_name].numel()
    for path, module in modules.items():
        with use_shared_decoders(module.shared_decoder_tensors()):
            roles = trainable_roles(module.fmt, module.packed_tensors(), module.shape)
        available |= set(roles.values()) if path in selected else set()
        own = [name for name in roles if not shared_decoder_name(module.fmt, name)]
        chosen = [name for name in own if path in selected and roles[name] in train]
        if not chosen and not set(module.fmt.shared_decoders()) & set(shared_decoders):
            module.decode_once()
            continue
        with use_shared_decoders(module.shared_decoder_tensors()):
            trainable_weight = _make_trainable(
                module.fmt,
                module.shape,
                module.packed_tensors(),
                chosen,
                constant_dtype,
                device,
                shared_decoders,
            )
        module.attach_trainable(trainable_weight)
        matrices[path] = trainable_weight
        for name in chosen:
            parameters[f"{path}.{name}"] = trainable_weight.get_parameter(_leaf(name))
            counts[roles[name]] += parameters[f"{path}.{name}"].numel()
    unquantized = {}
    prefixes = _block_prefixes(model) if blocks_only else ("",)
    for entry in (one for one in walked.unquantized if one.name.startswith(prefixes)):
        group = _GROUP_BY_REASON.get(entry.reason)
        available |= {group} if group else set()
        if group in train:
            parameters[entry.name] = _train_unquantized(model, entry.name, stored_dtypes[entry.name])
            unquantized[entry.name] = stored_dtypes[entry.name]
            counts[group] += parameters[entry.name].numel()
    if not parameters:
        known = ", ".join(sorted({*PARAMETER_GROUPS, *_GROUP_BY_REASON.values()} & available))
        raise RecipeError(f"--train {','.join(train)}: this model has none of them; it has {known or 'nothing'}")
    return Trainables(parameters, dict(counts), matrices, unquantized, model, shared_decoders)


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of tensor names inside decoder blocks."""
    blocks = {id(block) for block in decoder_blocks(model)}
    return tuple(f"{path}." for path, module in model.named_modules() if id(module) in blocks)


def _trainable_decoders(model: nn.Module, modules: Sequence[Any]) -> dict[str, TrainableWeight]:
    """Make the shared decoders of some modules trainable, and register them in the model."""
    found: dict[str, TrainableWeight] = {}
    for module in modules:
        for decoder, tensors in module.shared_decoder_tensors().items():
            if decoder not in found:
                found[decoder] = _trainable_decoder(module.fmt, decoder, strip_prefix(decoder_store.PREFIX, tensors))
                model.get_submodule(SHARED).add_module(f"trainable_{decoder}", found[decoder])
    return dict(sorted(found.items()))


def _trainable_decoder(fmt: WeightFormat, decoder: str, stored: Tensors) -> TrainableWeight:
    """Return the weights of a decoder as one row; `fmt` is the format of a matrix that references it."""
    while decoder not in fmt.own_shared_decoders():
        fmt = fmt.base
    storage, shape = decoder_store.storage(fmt.decoder_bits), (1, fmt.num_decoder_parameters)
    names = list(named_tensors(storage.unpack(stored, shape)))
    return TrainableWeight(storage, shape, stored, names, None)


def choose_new_residuals(
    model: nn.Module,
    walked: Walk,
    rank: int,
    seed: int,
    *,
    constant_dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
) -> Trainables:
    """Add a trainable residual of `rank`, initially zero, to every block matrix; everything else is frozen.

    Right factors are drawn at random and left factors are zero, as in LoRA (Hu et al., arXiv:2106.09685).
    """
    model.requires_grad_(False)
    kinds = {matrix.name: matrix.kind for matrix in walked.matrices}
    generator = torch.Generator().manual_seed(seed)
    matrices, parameters = {}, {}
    for path, module in compressed_modules(model).items():
        if kinds[path] != "block" or not isinstance(module, CompressedLinear) or rank > min(module.shape):
            module.decode_once()
            continue
        rows, columns = module.shape
        fmt = LowRankPlus(module.fmt, rank)
        right = torch.randn(columns, rank, generator=generator) / math.sqrt(columns)
        factors = fmt.pack_factor("left", torch.zeros(rows, rank)) | fmt.pack_factor("right", right)
        stored = factors | add_prefix("base", module.packed_tensors())
        with use_shared_decoders(module.shared_decoder_tensors()):
            matrices[path] = _make_trainable(fmt, module.shape, stored, ("left", "right"), constant_dtype, device)
        module.attach_trainable(matrices[path])
        parameters |= {f"{path}.{side}": matrices[path].get_parameter(_leaf(side)) for side in ("left", "right")}
    if not parameters:
        raise RecipeError(f"--adapter {rank}: no block matrix has both dimensions that large; lower the rank")
    return Trainables(parameters, {"adapter": sum(p.numel() for p in parameters.values())}, matrices, {}, model)


def _make_trainable(
    fmt: WeightFormat,
    shape: Shape,
    stored: Tensors,
    chosen: Sequence[str],
    constant_dtype: torch.dtype | None,
    device: str | torch.device,
    shared_decoders: Mapping[str, TrainableWeight] | None = None,
) -> TrainableWeight:
    """Build a TrainableWeight on `device`, as decoding 210 trellises takes a CPU minutes, and move it back."""
    home = next(iter(stored.values())).device
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    return TrainableWeight(fmt, shape, moved, chosen, constant_dtype, shared_decoders).to(home)


def trainable_roles(fmt: WeightFormat, stored: Tensors, shape: Shape) -> dict[str, str]:
    """Return the ledger role of every trainable tensor by local name: float tensors, and the weights of decoders."""
    roles = {name: (fmt.role(name), tensor) for name, tensor in named_tensors(fmt.unpack(stored, shape)).items()}
    return {n: role for n, (role, t) in roles.items() if t.is_floating_point() or role == decoder_store.ROLE}


def power_of_two_unit(values: Tensor) -> float:
    """Return the power of two nearest to the root mean square; a small one for zeros."""
    size = values.float().square().mean().sqrt().item() if values.numel() else 0.0
    return 2.0 ** round(math.log2(size)) if size > _ZERO_SIZE else _UNIT_FOR_ZEROS


def _train_unquantized(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf)
    parametrize.register_parametrization(module, leaf, _UnquantizedTensor(power_of_two_unit(tensor), dtype))
    parameter = module.parametrizations[leaf].original
    return parameter.requires_grad_()


def _get_tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _fold_constants(
    fmt: WeightFormat, unpacked: Unpacked, shape: Shape, trained: set[str], dtype: torch.dtype
) -> tuple[WeightFormat, Unpacked, dict[str, str]]:
    """Decode everything that no trained tensor changes into an inner `dense` format (constant folding).

    An inner format in which a single trained number scales the whole matrix is decoded without that number, as in
    trellis, e8 and entropy_coded, also inside `rotated`. Returns the format, the unpacked tensors, and a map from the
    dense values to the number that multiplies them.
    """
    values = named_tensors(unpacked)
    trained_here = trained & set(values)
    if not trained_here:
        return _FOLDED, UnpackedDense(fmt.decode(unpacked, shape).to(dtype)), {}
    if len(trained_here) == 1 and (name := next(iter(trained_here))) and values[name].numel() == 1:
        once, twice = (
            fmt.decode(replace_tensors(unpacked, {name: torch.full_like(values[name], n)}), shape) for n in (1, 2)
        )
        if torch.equal(twice, 2 * once):  # the number scales the whole matrix: doubling it doubles every weight exactly
            return _FOLDED, UnpackedDense(once.to(dtype)), {"values": name}
    base = fmt.children().get("base")
    if base is None:
        return fmt, unpacked, {}
    inner_names = set(strip_prefix("base", {name: values[name] for name in trained_here}))
    folded_fmt, folded, factors = _fold_constants(base, unpacked.base, fmt.inner_shape(shape), inner_names, dtype)
    if folded is unpacked.base:
        return fmt, unpacked, {}
    return (
        dataclasses.replace(fmt, base=folded_fmt),
        dataclasses.replace(unpacked, base=folded),
        {f"base.{place}": f"base.{name}" for place, name in factors.items()},
    )


def _narrow(tensor: Tensor) -> Tensor:
    """Return the same integers in the narrowest dtype that holds them; floats unchanged."""
    if tensor.is_floating_point() or not tensor.numel():
        return tensor.clone()
    least, largest = tensor.min().item(), tensor.max().item()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= least and largest <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor.clone()


def _leaf(name: str, kind: str = "parameter") -> str:
    """Return a name without dots, which names of parameters and buffers may not contain."""
    return f"{kind}/{name.replace('.', '/')}"
