"""`dense`: the weights themselves in a 16- or 32-bit float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class UnpackedDense:
    """`values` in float32, already rounded to the stored dtype."""

    values: Float[Tensor, "out in"]


@register
@dataclass(frozen=True)
class Dense(WeightFormat):
    """One float a weight; `dtype` is bfloat16, float16 or float32."""

    dtype: str = "bfloat16"

    name: ClassVar[str] = "dense"
    roles: ClassVar[dict[str, str]] = {"values": "dense"}
    examples: ClassVar[tuple[dict, ...]] = ({},)

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise FormatError(f"dense: dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The stored dtype."""
        return _DTYPES[self.dtype]

    def check(self, shape: Shape) -> None:
        """Every shape fits."""

    def layout(self, shape: Shape) -> Tensors:
        """`values` (out, in) in `dtype`."""
        return {"values": empty(shape, self.torch_dtype)}

    def pack(self, unpacked: UnpackedDense, shape: Shape) -> Tensors:
        """Cast to the stored dtype."""
        return {"values": unpacked.values.detach().to(self.torch_dtype)}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedDense:
        """Cast back to float32."""
        return UnpackedDense(tensors["values"].to(torch.float32))

    def decode(self, unpacked: UnpackedDense, shape: Shape) -> Float[Tensor, "out in"]:
        """The values."""
        return unpacked.values
