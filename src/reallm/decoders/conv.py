"""Convolutional upsampler from a grid of latents to weights, after HNeRV (Chen et al., arXiv:2304.02633).

latents ──┬── 1×1 conv ── [3×3 conv, PixelShuffle, GELU] × stages ── 3×3 head ──┬──▶ weights
          └── linear map to the patch of each latent ── PixelShuffle ────────────┘

HNeRV does not have the lower path. With it the linear decoder is a special case, so that the convolutions are never
worse than it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reallm.decoders.flat_vector import Shapes, count, split

_TILE = 256  # weights along one side of a tile: activations of 256² · width values at a time
_HALO = 2  # receptive field around a tile in latents: 1 + 1/2 + 1/4 … + the head's share, less than 2


@dataclass(frozen=True)
class ConvNet:
    """`channels` latents per grid cell, `width` hidden channels, `stages` upsampling stages that double both axes."""

    channels: int
    width: int
    stages: int

    @property
    def factor(self) -> int:
        """Upsampling factor: weights along one side of the patch of a grid cell."""
        return 2**self.stages

    @property
    def shapes(self) -> Shapes:
        """Shapes of all parameters; convolutions are (out, in, height, width)."""
        ups = {}
        for stage in range(self.stages):
            ups |= {f"up{stage}": (4 * self.width, self.width, 3, 3), f"up{stage}_bias": (4 * self.width,)}
        return {
            "skip": (self.factor**2, self.channels),
            "stem": (self.width, self.channels),
            "stem_bias": (self.width,),
            **ups,
            "head": (1, self.width, 3, 3),
            "bias": (1,),
        }

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return count(self.shapes)

    @property
    def multiply_adds_per_weight(self) -> float:
        """Multiply-adds per decoded weight."""
        area = self.factor**2
        ups = sum(36 * self.width**2 * 4**stage for stage in range(self.stages))
        return self.channels + (self.channels * self.width + ups) / area + 9 * self.width

    def grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the grid size (rows, columns) for a matrix; the last cells may extend beyond the matrix."""
        return -(-out_features // self.factor), -(-in_features // self.factor)

    def decode(
        self, flat: Float[Tensor, " parameters"], latents: Float[Tensor, "channels down across"]
    ) -> Float[Tensor, "out in"]:
        """Decode all weights in one pass, as training does."""
        named = split(flat, self.shapes)
        values = latents[None]
        skip = F.pixel_shuffle(F.conv2d(values, named["skip"][:, :, None, None]), self.factor)
        values = F.conv2d(values, named["stem"][:, :, None, None], named["stem_bias"])
        for stage in range(self.stages):
            values = F.conv2d(values, named[f"up{stage}"], named[f"up{stage}_bias"], padding=1)
            values = F.gelu(F.pixel_shuffle(values, 2))
        return (skip + F.conv2d(values, named["head"], named["bias"], padding=1))[0, 0]

    def decode_tiled(
        self, flat: Float[Tensor, " parameters"], latents: Float[Tensor, "channels down across"]
    ) -> Float[Tensor, "out in"]:
        """Decode tile by tile with bounded memory; each tile sees its whole receptive field, so there are no seams."""
        side = max(4, _TILE // self.factor)
        rows = [
            torch.cat([self._tile(flat, latents, top, left, side) for left in range(0, latents.shape[2], side)], 1)
            for top in range(0, latents.shape[1], side)
        ]
        return torch.cat(rows)

    def _tile(self, flat: Tensor, latents: Tensor, top: int, left: int, side: int) -> Float[Tensor, "out in"]:
        first = [max(0, start - _HALO) for start in (top, left)]
        window = latents[:, first[0] : top + side + _HALO, first[1] : left + side + _HALO]
        decoded = self.decode(flat, window)
        crop = [(start - begin) * self.factor for start, begin in zip((top, left), first, strict=True)]
        length = side * self.factor
        return decoded[crop[0] : crop[0] + length, crop[1] : crop[1] + length]
