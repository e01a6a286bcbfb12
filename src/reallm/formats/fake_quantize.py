"""What storing does to a part that trains, without packing the codes beside it: for training that knows what it loses.

Float parts train, and the numbers of decoders, which are codes of a grid: those train as if they were floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.formats import parameters
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, WeightFormat
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.uniform import Uniform


def fake_quantize(fmt: WeightFormat, name: str, values: Float[Tensor, "*size"], shape: Shape) -> Float[Tensor, "*size"]:
    """A part as it comes back from the file, floats; `name` is its local name, `shape` that of the matrix.

    Numbers that the stored type cannot hold go to the nearest that it can: a scale without a sign below 0 to 0.
    """
    return fake_quantizer(fmt, name, shape)(values)


def fake_quantizer(fmt: WeightFormat, name: str, shape: Shape) -> Callable[[Tensor], Tensor]:
    """`fake_quantize` of one part, for many calls."""
    owner, local = _owner(fmt, name)
    if local in parameters.ROLES:  # of a decoder, shared or not
        return fake_quantizer(
            parameters.storage(owner.decoder_bits), local.removeprefix(f"{parameters.PREFIX}."), (1, 1)
        )
    if isinstance(owner, Uniform) and local == "codes":
        return functools.partial(_round_codes, bits=owner.bits)
    layout = fmt.layout(shape)
    stored = layout[name]
    if stored.is_floating_point():
        return functools.partial(_round_float, dtype=stored.dtype)
    if f"{name}_max" in layout:
        return functools.partial(_round_scales, signed=stored.dtype == torch.int8)
    assert isinstance(owner, LowRankPlus), f"{owner.name}: no rule for the integers of {name}"
    return owner.fake_quantize_factor


def zero_value(fmt: WeightFormat, name: str) -> float:
    """What stands for 0 in a part: a code in the numbers of a decoder, else 0."""
    owner, local = _owner(fmt, name)
    if local in parameters.ROLES:
        return zero_value(parameters.storage(owner.decoder_bits), local.removeprefix(f"{parameters.PREFIX}."))
    return owner.zero_code if isinstance(owner, Uniform) and local == "codes" else 0.0


def shared_decoder_name(fmt: WeightFormat, name: str) -> str:
    """The shared decoder that a part belongs to; "" for all other parts."""
    owner, local = _owner(fmt, name)
    return owner.shared if local in parameters.ROLES else ""


def _round_codes(values: Float[Tensor, "*size"], bits: int) -> Float[Tensor, "*size"]:
    return values.round().clamp(0, 2**bits - 1)


def _round_scales(values: Float[Tensor, "out groups"], signed: bool) -> Float[Tensor, "out groups"]:
    return scale_store.fake_quantize(scale_store.TWO_LEVEL, values if signed else values.clamp(min=0), signed)


def _round_float(values: Float[Tensor, "*size"], dtype: torch.dtype) -> Float[Tensor, "*size"]:
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).to(torch.float32)


def _owner(fmt: WeightFormat, name: str) -> tuple[WeightFormat, str]:
    """The format, this one or an inner one, that a local name belongs to, and the name there."""
    head, _, rest = name.partition(".")
    base = getattr(fmt, head, None)
    return _owner(base, rest) if rest and isinstance(base, WeightFormat) else (fmt, name)
