"""What trains: float parts of compressed matrices and kept tensors, chosen by the ledger's words.

stored tensors ── unpack ──▶ parts: codes stay, chosen floats become parameters ── decode, at every use ──▶ matrix

A parameter is its part divided by a power of two near the part's size, which changes no bit of it. So one learning
rate serves scales of 0.01 and codebook entries of 3 alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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
    tables_at_hand,
    with_tensors,
)
from reallm.formats.dense import DenseParts
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.waist import inner, under
from reallm.kernels import straight_through
from reallm.model import CompressedLinear, Walk
from reallm.model.swap import compressed_modules
from reallm.tune.settings import PARTS

_SETTLED = from_spec({"format": "dense", "dtype": "float32"})
_KEPT_WORDS = {"norm": "norms", "bias": "biases"}
_UNIT_OF_ZEROS = 2.0**-3  # a residual that starts from nothing: steps of 1e-4 at the usual rate
_NOTHING = 2.0**-40


class LiveMatrix(nn.Module):
    """A matrix whose chosen float parts are parameters; calling it decodes."""

    def __init__(
        self,
        fmt: WeightFormat,
        shape: Shape,
        stored: Tensors,
        chosen: Sequence[str],
        rounded: bool,
        kept_dtype: torch.dtype | None,
    ) -> None:
        """`chosen` are local names; `kept_dtype` is that of what no trained part changes, None decodes it each time."""
        super().__init__()
        self.fmt, self.shape, self.rounded = fmt, shape, rounded
        parts = fmt.unpack(stored, shape)
        values = named_tensors(parts)
        self.units = {name: unit_of(values[name]) for name in chosen}
        self._rounding = {name: rounding_of(fmt, name, shape) for name in chosen}
        self._rounded: dict[str, tuple[int, Tensor]] = {}
        for name in chosen:
            self.register_parameter(_leaf(name), nn.Parameter(values[name].float() / self.units[name]))
        self.form, self.factors = fmt, {}
        if kept_dtype is not None:
            self.form, parts, self.factors = _settled(fmt, parts, shape, set(chosen), kept_dtype)
        self._types: dict[str, torch.dtype] = {}
        for name, tensor in named_tensors(parts).items():
            if name not in chosen:
                self._types[name] = torch.float32 if tensor.is_floating_point() else tensor.dtype
                self.register_buffer(_leaf(name, "kept"), _narrow(tensor), persistent=False)
        self._frame = map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), parts)

    def part(self, name: str) -> Tensor:
        """A trained part in natural units, float32."""
        return self.get_parameter(_leaf(name)) * self.units[name]

    def parts_to_store(self) -> Tensors:
        """The trained parts as they come back from the file."""
        return {name: self._rounding[name](self.part(name).detach()) for name in self.units}

    def forward(self) -> Float[Tensor, "out in"]:
        """The matrix in float32, differentiable in the parameters."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            trained = {name: self._seen(name) for name in self.units}
            tensors = {name: self.get_buffer(_leaf(name, "kept")).to(dtype) for name, dtype in self._types.items()}
            for place, name in self.factors.items():
                tensors[place] = tensors[place] * trained[name]
            return self.form.decode(with_tensors(self._frame, tensors | trained), self.shape)

    def _seen(self, name: str) -> Tensor:
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

    def within(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Those of one module, a block for instance."""
        ours = {id(parameter) for parameter in module.parameters()}
        return {name: p for name, p in self.parameters.items() if id(p) in ours}

    def to_store(self) -> Tensors:
        """Every part and kept tensor that trained, in natural units, as it comes back from the file."""
        tensors: Tensors = {}
        for path, live in self.matrices.items():
            tensors |= under(path, live.parts_to_store())
        for name, dtype in self.kept.items():
            tensors[name] = _value_of(self.model, name).detach().to(dtype)
        return tensors


def choose(
    model: nn.Module,
    walked: Walk,
    stored_dtypes: dict[str, torch.dtype],
    train: Sequence[str],
    *,
    rounded: bool,
    kept_dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
) -> Trainables:
    """Make the chosen parts of a compressed model, loaded undecoded, parameters; everything else is frozen.

    `stored_dtypes` are those of the kept tensors in the file. Matrices are decoded on `device` one at a time, and stay
    where they are.
    Errors: RecipeError if the model has none of the parts named.
    """
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    counts: dict[str, int] = defaultdict(int)
    matrices, kinds, there = {}, {m.name: m.kind for m in walked.matrices}, set()
    for path, module in compressed_modules(model).items():
        with tables_at_hand(module.shared_tables()):
            roles = float_roles(module.fmt, module.stored(), module.shape)
        there |= set(roles.values())
        wanted = kinds[path] == "block" or kinds[path] in train
        chosen = [name for name, role in roles.items() if wanted and role in train]
        if not chosen:
            module.decode_once()
            continue
        with tables_at_hand(module.shared_tables()):
            live = _made(module.fmt, module.shape, module.stored(), chosen, rounded, kept_dtype, device)
        module.come_alive(live)
        matrices[path] = live
        for name in chosen:
            parameters[f"{path}.{name}"] = live.get_parameter(_leaf(name))
            counts[roles[name]] += parameters[f"{path}.{name}"].numel()
    kept = {}
    for entry in walked.kept:
        word = _KEPT_WORDS.get(entry.reason)
        there |= {word} if word else set()
        if word in train:
            parameters[entry.name] = _train_kept(model, entry.name, stored_dtypes[entry.name], rounded)
            kept[entry.name] = stored_dtypes[entry.name]
            counts[word] += parameters[entry.name].numel()
    if not parameters:
        known = ", ".join(sorted(word for word in there if word in (*PARTS, *_KEPT_WORDS.values())))
        raise RecipeError(f"--train {','.join(train)}: this model has none of them; it has {known or 'nothing'}")
    return Trainables(parameters, dict(counts), matrices, kept, model)


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
) -> LiveMatrix:
    """A live matrix where the stored tensors are, made on `device`: to decode 210 trellises takes a CPU minutes."""
    home = next(iter(stored.values())).device
    there = {name: tensor.to(device) for name, tensor in stored.items()}
    return LiveMatrix(fmt, shape, there, chosen, rounded, kept_dtype).to(home)


def float_roles(fmt: WeightFormat, stored: Tensors, shape: Shape) -> dict[str, str]:
    """Ledger role of every float part by local name."""
    parts = fmt.unpack(stored, shape)
    return {name: fmt.role(name) for name, part in named_tensors(parts).items() if part.is_floating_point()}


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
