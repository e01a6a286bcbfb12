"""What trains: float parts of compressed matrices, their decoders and kept tensors, chosen by the ledger's words.

stored tensors ── unpack ──▶ parts: codes stay, chosen floats become parameters ── decode, at every use ──▶ matrix

A parameter is its part divided by a power of two near the part's size, which changes no bit of it. So one learning
rate serves scales of 0.01 and codebook entries of 3 alike.

The numbers of a decoder net are codes of a grid of few bits and its scales. Both train: the codes as real numbers that
are rounded on the way forwards. A decoder that matrices share is one such matrix of numbers, which all of them look at.
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
    Parts,
    Shape,
    Tensors,
    WeightFormat,
    from_spec,
    map_tensors,
    named_tensors,
    rounding_of,
    table_of,
    tables_at_hand,
    with_tensors,
    zero_of,
)
from reallm.formats import parameters as decoder_store
from reallm.formats.dense import DenseParts
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.shared import PREFIX as SHARED
from reallm.formats.waist import inner, under
from reallm.kernels import straight_through
from reallm.model import CompressedLinear, Walk
from reallm.model.decoder import decoder_blocks
from reallm.model.swap import compressed_modules
from reallm.tune.settings import PARTS

_SETTLED = from_spec({"format": "dense", "dtype": "float32"})
_KEPT_WORDS = {"norm": "norms", "bias": "biases"}
_UNIT_OF_ZEROS = 2.0**-3  # a residual that starts from nothing: steps of 1e-4 at the usual rate
_NOTHING = 2.0**-40


class LiveMatrix(nn.Module):
    """A matrix whose chosen parts are parameters; calling it decodes.

    `tables` are shared decoders that train, by their name: live matrices of one row, of numbers. They are nobody's
    children, so that each is listed once.
    """

    def __init__(
        self,
        fmt: WeightFormat,
        shape: Shape,
        stored: Tensors,
        chosen: Sequence[str],
        rounded: bool,
        kept_dtype: torch.dtype | None,
        tables: Mapping[str, LiveMatrix] | None = None,
    ) -> None:
        """`chosen` are local names; `kept_dtype` is that of what no trained part changes, None decodes it each time."""
        super().__init__()
        self.fmt, self.shape, self.rounded = fmt, shape, rounded
        parts = fmt.unpack(stored, shape)
        values = named_tensors(parts)
        # (part, table, part of the table), in a tuple that is no module's.
        self._common = tuple(
            (name, tables[table], name.rpartition(".")[2])
            for name in values
            if (table := table_of(fmt, name)) and tables is not None and table in tables
        )
        moving = {*chosen, *(name for name, _, _ in self._common)}
        self.zeros = {name: zero_of(fmt, name) for name in chosen}
        self.units = {name: unit_of(values[name].float() - self.zeros[name]) for name in chosen}
        self._chosen_types = {name: values[name].dtype for name in chosen}
        self._rounding = {name: rounding_of(fmt, name, shape) for name in chosen}
        self._rounded: dict[str, tuple[int, Tensor]] = {}
        for name in chosen:
            scaled = (values[name].float() - self.zeros[name]) / self.units[name]
            self.register_parameter(_leaf(name), nn.Parameter(scaled))
        self.form, self.factors = fmt, {}
        if kept_dtype is not None:
            self.form, parts, self.factors = _settled(fmt, parts, shape, moving, kept_dtype)
        self._types: dict[str, torch.dtype] = {}
        for name, tensor in named_tensors(parts).items():
            if name not in moving:
                self._types[name] = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self.register_buffer(_leaf(name, "kept"), _narrow(tensor), persistent=False)
        self._frame = map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), parts)

    def part(self, name: str) -> Tensor:
        """A trained part in natural units, float32."""
        values = self.get_parameter(_leaf(name)) * self.units[name]
        return values + self.zeros[name] if self.zeros[name] else values  # to add 0 is a launch more, twice a step

    def parts_to_store(self) -> Tensors:
        """The trained parts as they come back from the file."""
        return {n: self._rounding[n](self.part(n).detach()).to(dtype) for n, dtype in self._chosen_types.items()}

    def parts(self) -> Parts:
        """All parts as they are stored, of a matrix of which everything trains."""
        return with_tensors(self._frame, self.parts_to_store())

    def forward(self) -> Float[Tensor, "out in"]:
        """The matrix in float32, differentiable in the parameters."""
        device = next(itertools.chain(self.buffers(), self.parameters())).device
        with torch.autocast(device.type, enabled=False):
            trained = {name: self.seen(name) for name in self.units}
            # Block by block a block is on another device than what no block owns.
            trained |= {name: table.seen(part).to(device) for name, table, part in self._common}
            tensors = {name: self.get_buffer(_leaf(name, "kept")).to(dtype) for name, dtype in self._types.items()}
            for place, name in self.factors.items():
                tensors[place] = tensors[place] * trained[name]
            return self.form.decode(with_tensors(self._frame, tensors | trained), self.shape)

    def seen(self, name: str) -> Tensor:
        """A trained part as training sees it: rounded, with gradients as if it were not."""
        values = self.part(name)
        if not self.rounded:
            return values
        # Once a step: a step runs every block twice, and its micro-batches and validation do so again.
        parameter = self.get_parameter(_leaf(name))
        version, rounded = self._rounded.get(name, (-1, values))
        if version != parameter._version or rounded.device != values.device:
            rounded = self._rounding[name](values.detach())
            self._rounded[name] = parameter._version, rounded
        return straight_through(values, rounded)


class _KeptTensor(nn.Module):
    """A kept tensor that trains: parameter · unit, rounded as it is stored."""

    def __init__(self, unit: float, dtype: torch.dtype, rounded: bool) -> None:
        super().__init__()
        self.unit, self.dtype, self.rounded = unit, dtype, rounded

    def forward(self, parameter: Tensor) -> Tensor:
        values = parameter * self.unit
        return straight_through(values, values.detach().to(self.dtype).to(values.dtype)) if self.rounded else values

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / self.unit


@dataclass(frozen=True)
class Trainables:
    """What trains in a model, by the name of its stored tensor; `counts` are numbers by the ledger's word."""

    parameters: dict[str, nn.Parameter]
    counts: dict[str, int]
    matrices: dict[str, LiveMatrix]
    kept: dict[str, torch.dtype]
    model: nn.Module
    tables: dict[str, LiveMatrix] = field(default_factory=dict)  # decoders that matrices share, by their name

    def within(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Those of one module, a block for instance."""
        ours = {id(parameter) for parameter in module.parameters()}
        return {name: p for name, p in self.parameters.items() if id(p) in ours}

    def to_store(self) -> Tensors:
        """Every part and kept tensor that trained, in natural units, as it comes back from the file.

        Shared decoders are packed, under the names they have in the file.
        """
        tensors: Tensors = {}
        for path, live in self.matrices.items():
            tensors |= under(path, live.parts_to_store())
        for name, dtype in self.kept.items():
            tensors[name] = _value_of(self.model, name).detach().to(dtype)
        for table, live in self.tables.items():
            packed = live.fmt.pack(live.parts(), live.shape)
            tensors |= under(f"{SHARED}.{table}.{decoder_store.PREFIX}", packed)
        return tensors

    @contextlib.contextmanager
    def tables_at_rest(self) -> Iterator[None]:
        """In here shared decoders get no gradients: they belong to no block."""
        shared = [parameter for live in self.tables.values() for parameter in live.parameters()]
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
    rounded: bool,
    kept_dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
    blocks_alone: bool = False,
) -> Trainables:
    """Make the chosen parts of a compressed model, loaded undecoded, parameters; everything else is frozen.

    `stored_dtypes` are those of the kept tensors in the file. With `blocks_alone` no kept tensor outside the decoder
    blocks trains: the last norm has no block. Matrices are decoded on `device` one at a time, and stay where they are.
    Errors: RecipeError if the model has none of the parts named.
    """
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    counts: dict[str, int] = defaultdict(int)
    matrices, kinds, there = {}, {m.name: m.kind for m in walked.matrices}, set()
    modules = compressed_modules(model)
    wanted = [path for path in modules if kinds[path] == "block" or kinds[path] in train]
    tables = _live_tables(model, [modules[path] for path in wanted], rounded) if decoder_store.ROLE in train else {}
    for table, live in tables.items():
        for name in live.units:
            stored_name = f"{SHARED}.{table}.{decoder_store.PREFIX}.{name}"
            parameters[stored_name] = live.get_parameter(_leaf(name))
            counts[decoder_store.ROLE] += parameters[stored_name].numel()
    for path, module in modules.items():
        with tables_at_hand(module.shared_tables()):
            roles = part_roles(module.fmt, module.stored(), module.shape)
        there |= set(roles.values()) if path in wanted else set()
        own = [name for name in roles if not table_of(module.fmt, name)]
        chosen = [name for name in own if path in wanted and roles[name] in train]
        if not chosen and not set(module.fmt.tables()) & set(tables):
            module.decode_once()
            continue
        with tables_at_hand(module.shared_tables()):
            live = _made(module.fmt, module.shape, module.stored(), chosen, rounded, kept_dtype, device, tables)
        module.come_alive(live)
        matrices[path] = live
        for name in chosen:
            parameters[f"{path}.{name}"] = live.get_parameter(_leaf(name))
            counts[roles[name]] += parameters[f"{path}.{name}"].numel()
    kept = {}
    homes = _block_prefixes(model) if blocks_alone else ("",)
    for entry in (one for one in walked.kept if one.name.startswith(homes)):
        word = _KEPT_WORDS.get(entry.reason)
        there |= {word} if word else set()
        if word in train:
            parameters[entry.name] = _train_kept(model, entry.name, stored_dtypes[entry.name], rounded)
            kept[entry.name] = stored_dtypes[entry.name]
            counts[word] += parameters[entry.name].numel()
    if not parameters:
        known = ", ".join(sorted(word for word in there if word in (*PARTS, *_KEPT_WORDS.values())))
        raise RecipeError(f"--train {','.join(train)}: this model has none of them; it has {known or 'nothing'}")
    return Trainables(parameters, dict(counts), matrices, kept, model, tables)


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of tensors in decoder blocks begin with."""
    blocks = {id(block) for block in decoder_blocks(model)}
    return tuple(f"{path}." for path, module in model.named_modules() if id(module) in blocks)


def _live_tables(model: nn.Module, modules: Sequence[Any], rounded: bool) -> dict[str, LiveMatrix]:
    """The shared decoders that some modules name, as parameters; they become a part of the model."""
    found: dict[str, LiveMatrix] = {}
    for module in modules:
        for table, tensors in module.shared_tables().items():
            if table not in found:
                found[table] = _live_table(module.fmt, table, inner(decoder_store.PREFIX, tensors), rounded)
                model.get_submodule(SHARED).add_module(f"live_{table}", found[table])
    return dict(sorted(found.items()))


def _live_table(fmt: WeightFormat, table: str, stored: Tensors, rounded: bool) -> LiveMatrix:
    """The numbers of a decoder as one row; `fmt` is that of a matrix that names it."""
    while table not in fmt.own_tables():
        fmt = fmt.base
    storage, shape = decoder_store.storage(fmt.decoder_bits), (1, fmt.decoder_numbers)
    names = list(named_tensors(storage.unpack(stored, shape)))
    return LiveMatrix(storage, shape, stored, names, rounded, None)


def choose_new_residuals(
    model: nn.Module,
    walked: Walk,
    rank: int,
    seed: int,
    *,
    rounded: bool,
    kept_dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
) -> Trainables:
    """Give every block matrix of a compressed model a residual of `rank` that is nothing yet, and train only these.

    Right factors are drawn, left ones are zero, as in LoRA (Hu et al., arXiv:2106.09685).
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
        stored = factors | under("base", module.stored())
        with tables_at_hand(module.shared_tables()):
            matrices[path] = _made(fmt, module.shape, stored, ("left", "right"), rounded, kept_dtype, device)
        module.come_alive(matrices[path])
        parameters |= {f"{path}.{side}": matrices[path].get_parameter(_leaf(side)) for side in ("left", "right")}
    if not parameters:
        raise RecipeError(f"--adapter {rank}: no block matrix has both sides that large; lower the rank")
    return Trainables(parameters, {"adapter": sum(p.numel() for p in parameters.values())}, matrices, {}, model)


def _made(
    fmt: WeightFormat,
    shape: Shape,
    stored: Tensors,
    chosen: Sequence[str],
    rounded: bool,
    kept_dtype: torch.dtype | None,
    device: str | torch.device,
    tables: Mapping[str, LiveMatrix] | None = None,
) -> LiveMatrix:
    """A live matrix where the stored tensors are, made on `device`: to decode 210 trellises takes a CPU minutes."""
    home = next(iter(stored.values())).device
    there = {name: tensor.to(device) for name, tensor in stored.items()}
    return LiveMatrix(fmt, shape, there, chosen, rounded, kept_dtype, tables).to(home)


def part_roles(fmt: WeightFormat, stored: Tensors, shape: Shape) -> dict[str, str]:
    """Ledger role of every part that can train, by local name: floats, and the numbers of decoders."""
    roles = {name: (fmt.role(name), part) for name, part in named_tensors(fmt.unpack(stored, shape)).items()}
    return {n: role for n, (role, part) in roles.items() if part.is_floating_point() or role == decoder_store.ROLE}


def unit_of(values: Tensor) -> float:
    """The power of two nearest to the root mean square; a small one for zeros."""
    size = values.float().square().mean().sqrt().item() if values.numel() else 0.0
    return 2.0 ** round(math.log2(size)) if size > _NOTHING else _UNIT_OF_ZEROS


def _train_kept(model: nn.Module, name: str, dtype: torch.dtype, rounded: bool) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf)
    parametrize.register_parametrization(module, leaf, _KeptTensor(unit_of(tensor), dtype, rounded))
    parameter = module.parametrizations[leaf].original
    return parameter.requires_grad_()


def _value_of(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _settled(
    fmt: WeightFormat, parts: Parts, shape: Shape, trained: set[str], dtype: torch.dtype
) -> tuple[WeightFormat, Parts, dict[str, str]]:
    """Format and parts with what no trained part changes decoded, as a `dense` inner format.

    An inner format of which one number alone trains, and in which it is a factor of everything, is decoded without
    it. Such are the trellis, e8 and entropy_coded, inside `rotated` too. Third: dense values to be multiplied -> that
    number.
    """
    values = named_tensors(parts)
    inside = trained & set(values)
    if not inside:
        return _SETTLED, DenseParts(fmt.decode(parts, shape).to(dtype)), {}
    if len(inside) == 1 and (name := next(iter(inside))) and values[name].numel() == 1:
        once, twice = (fmt.decode(with_tensors(parts, {name: torch.full_like(values[name], n)}), shape) for n in (1, 2))
        if torch.equal(twice, 2 * once):  # a factor of the whole matrix: doubled, it doubles every bit exactly
            return _SETTLED, DenseParts(once.to(dtype)), {"values": name}
    base = getattr(fmt, "base", None)
    if not isinstance(base, WeightFormat):
        return fmt, parts, {}
    inner_names = set(inner("base", {name: values[name] for name in inside}))
    form, settled, factors = _settled(base, parts.base, fmt.inner_shape(shape), inner_names, dtype)
    if settled is parts.base:
        return fmt, parts, {}
    return (
        dataclasses.replace(fmt, base=form),
        dataclasses.replace(parts, base=settled),
        {f"base.{place}": f"base.{name}" for place, name in factors.items()},
    )


def _narrow(tensor: Tensor) -> Tensor:
    """The same integers in the narrowest type that holds them; floats as they are."""
    if tensor.is_floating_point() or not tensor.numel():
        return tensor.clone()
    least, largest = tensor.min().item(), tensor.max().item()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= least and largest <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor.clone()


def _leaf(name: str, kind: str = "part") -> str:
    """A name for a parameter or buffer, which may hold no dot."""
    return f"{kind}/{name.replace('.', '/')}"
