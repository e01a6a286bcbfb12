"""Which magnitudes float16 holds, and what to take where it does not: formats have scales (or weights) of that type.

It reaches from 6e-8 to 65,504. bfloat16 takes as many bytes and reaches as far as float32, with steps eight times as
wide; so ordinary matrices stay with float16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.formats.dense import Dense
from reallm.formats.scales import BFLOAT16, FLOAT16
from reallm.formats.waist import WeightFormat

# Scales are as small as 1/30 of the root mean square at 8 bits: 3e-6, which float16 has to 1 %, and as large as twice
# the largest weight.
SMALLEST, LARGEST = 1e-4, 3e4
# Rows as small as these are lost at 4 bits too, where scales are half of the root mean square. A few of an embedding
# are of tokens that no text has; they may.
SMALLEST_ROW, SHARE_OF_ROWS = 2e-6, 0.01


def is_beyond_float16(weight: Float[Tensor, "out in"]) -> bool:
    """Whether what float16 stores of a matrix, its scales for instance, could be lost; not of one of zeros."""
    rows = weight.double().square().mean(1).sqrt()  # in float32 squares of 1e-30 are 0
    size = rows.square().mean().sqrt().item()
    small = ((rows > 0) & (rows < SMALLEST_ROW)).double().mean().item()
    return weight.abs().max().item() > LARGEST or 0 < size < SMALLEST or small > SHARE_OF_ROWS


def with_wide_range(fmt: WeightFormat) -> WeightFormat:
    """The same format, inner ones too, with bfloat16 for float16: as many bytes."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(fmt):  # type: ignore[arg-type]
        value = getattr(fmt, field.name)
        if isinstance(value, WeightFormat):
            changes[field.name] = with_wide_range(value)
        elif value == FLOAT16 and (field.name == "scales" or isinstance(fmt, Dense)):
            changes[field.name] = BFLOAT16
    return dataclasses.replace(fmt, **changes)  # type: ignore[type-var]


def ordinary_magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The matrix times the power of two that brings its root mean square near 1."""
    size = weight.double().square().mean().sqrt()
    return (weight.double() * torch.exp2(-size.log2().round())).to(weight.dtype)
