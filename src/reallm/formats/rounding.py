"""What storing does to a float part, without packing the codes beside it: for training that knows what it will lose."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.formats import scales as scale_store
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.waist import Shape, WeightFormat


def as_stored(fmt: WeightFormat, name: str, values: Float[Tensor, "*size"], shape: Shape) -> Float[Tensor, "*size"]:
    """A float part as it comes back from the file; `name` is its local name, `shape` that of the matrix.

    Numbers that the stored type cannot hold go to the nearest that it can: a scale without a sign below 0 to 0.
    """
    return rounding_of(fmt, name, shape)(values)


def rounding_of(fmt: WeightFormat, name: str, shape: Shape) -> Callable[[Tensor], Tensor]:
    """`as_stored` of one part, for many calls."""
    layout = fmt.layout(shape)
    stored = layout[name]
    if stored.is_floating_point():
        return functools.partial(_as_float, dtype=stored.dtype)
    if f"{name}_max" in layout:
        return functools.partial(_as_scales, signed=stored.dtype == torch.int8)
    owner = _owner(fmt, name)
    assert isinstance(owner, LowRankPlus), f"{owner.name}: no rule for the integers of {name}"
    return owner.stored_factor


def _as_scales(values: Float[Tensor, "out groups"], signed: bool) -> Float[Tensor, "out groups"]:
    return scale_store.stored(scale_store.TWO_LEVEL, values if signed else values.clamp(min=0), signed)


def _as_float(values: Float[Tensor, "*size"], dtype: torch.dtype) -> Float[Tensor, "*size"]:
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).to(torch.float32)


def _owner(fmt: WeightFormat, name: str) -> WeightFormat:
    """The format, this one or an inner one, that a local name belongs to."""
    head, _, rest = name.partition(".")
    return _owner(getattr(fmt, head), rest) if rest else fmt
