"""`gain`: any format times one number an output row, the magnitude of DoRA (Liu et al., arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, empty, register, strip_prefix


@dataclass(frozen=True)
class UnpackedGain:
    """weight = gain of the row · base."""

    gain: Float[Tensor, " out"]
    base: Unpacked


@register
@dataclass(frozen=True)
class Gain(WeightFormat):
    """`base` with every output row scaled by a bfloat16 number."""

    base: WeightFormat

    name: ClassVar[str] = "gain"
    roles: ClassVar[dict[str, str]] = {"gain": "gains"}
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "codebook", "index_bits": 6}},)

    def check(self, shape: Shape) -> None:
        """Fits whatever the base fits."""
        self.base.check(shape)

    def layout(self, shape: Shape) -> Tensors:
        """`gain` (out,) bfloat16; the base under `base.`"""
        return {"gain": empty((shape[0],), torch.bfloat16), **add_prefix("base", self.base.layout(shape))}

    def pack(self, unpacked: UnpackedGain, shape: Shape) -> Tensors:
        """Pack gain and base."""
        gain = unpacked.gain.detach().to(torch.bfloat16)
        return {"gain": gain, **add_prefix("base", self.base.pack(unpacked.base, shape))}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedGain:
        """The inverse of `pack`."""
        return UnpackedGain(tensors["gain"].to(torch.float32), self.base.unpack(strip_prefix("base", tensors), shape))

    def decode(self, unpacked: UnpackedGain, shape: Shape) -> Float[Tensor, "out in"]:
        """gain · base, row by row."""
        return unpacked.gain[:, None] * self.base.decode(unpacked.base, shape)
