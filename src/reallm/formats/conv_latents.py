"""`conv_latents`: a grid of latents, stored in any format, and a convolutional upsampler that makes the matrix of it.

The neural decoder of ReALLM (Leconte et al., arXiv:2405.13155), which took HNeRV's (arXiv:2304.02633) for patches of
512 weights. Here one net takes a matrix of any size, tile by tile without seams; it is run once at load. It is dear:
`reallm info` counts its multiply-adds, and its parameters weigh like all bytes unless many matrices share it.

    latents (a matrix in `base`) -> net (decoders/conv.py), b_φ bits per parameter -> times the scale of the row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.decoders import ConvNet
from reallm.errors import FormatError
from reallm.formats import parameters
from reallm.formats import scales as scale_store
from reallm.formats.base import (
    Shape,
    SharedDecoder,
    Tensors,
    Unpacked,
    WeightFormat,
    add_prefix,
    register,
    strip_prefix,
)
from reallm.formats.entropy_coded import EntropyCoded
from reallm.formats.shared_decoders import check_shared_name, shared_decoder_tensors
from reallm.kernels import one_thread

MAX_CHANNELS, MAX_WIDTH, MAX_STAGES = 256, 256, 4
MAX_MULTIPLY_ADDS = 600_000  # a weight: 445,000 are those of the authors' default; more is hours for a small file
AUTO_DECODER, ENCODER = "auto_decoder", "encoder"
METHODS = (AUTO_DECODER, ENCODER)
_MAX_STEPS = 1_000_000
_MAX_RATE = 100


@dataclass(frozen=True)
class UnpackedConvLatents:
    """weight = net(base) · scale of the row; row i of the base holds all channels of row i of the grid."""

    decoder: parameters.UnpackedParameters
    scales: Float[Tensor, "out 1"]
    base: Unpacked


@register
@dataclass(frozen=True)
class ConvLatents(WeightFormat):
    """`channels` latents in `base` for each square of 2^stages × 2^stages weights, and a net of `width` channels.

    Parameters take `decoder_bits` bits (3, 4, 6, 8, 16), by themselves or `shared`; rows have a float16 scale.
    `method`, `steps` and `rate` say how `fit` trains and are nothing to a decoder: auto_decoder moves latents and net
    by gradients, encoder first trains a net from weights to latents beside it, which is thrown away. With `rate` the
    loss also counts bits of latents that are `entropy_coded`; 1 is the price that their fixed bytes make, 0 leaves it
    out.
    """

    base: WeightFormat
    channels: int = 4
    width: int = 16
    stages: int = 1
    decoder_bits: int = 8
    shared: str = ""
    method: str = AUTO_DECODER
    steps: int = 200
    rate: int | float = 0

    name: ClassVar[str] = "conv_latents"
    roles: ClassVar[dict[str, str]] = {**parameters.ROLES, "scales": "scales"}
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "codebook", "index_bits": 6}, "steps": 50},)

    def __post_init__(self) -> None:
        for name, most in (("channels", MAX_CHANNELS), ("width", MAX_WIDTH), ("stages", MAX_STAGES)):
            if not 1 <= getattr(self, name) <= most:
                raise FormatError(f"conv_latents: {name}={getattr(self, name)} is not in 1 … {most}")
        if (multiply_adds := self.net.multiply_adds_per_weight) > MAX_MULTIPLY_ADDS:
            raise FormatError(
                f"conv_latents: width={self.width} and stages={self.stages} take {multiply_adds:,.0f} multiply-adds "
                f"per weight, more than {MAX_MULTIPLY_ADDS:,}"
            )
        if not 0 <= self.steps <= _MAX_STEPS:
            raise FormatError(f"conv_latents: steps={self.steps} is not in 0 … {_MAX_STEPS}")
        if self.method not in METHODS:
            raise FormatError(f"conv_latents: method={self.method!r} is not one of {', '.join(METHODS)}")
        if not 0 <= self.rate <= _MAX_RATE:  # also refuses nan
            raise FormatError(f"conv_latents: rate={self.rate} is not in 0 … {_MAX_RATE}")
        if self.rate and not isinstance(self.base, EntropyCoded):
            raise FormatError(
                f"conv_latents: rate={self.rate} needs base=entropy_coded; the bytes of {self.base.name} do not depend "
                "on how probable its codes are"
            )
        parameters.check_bits(self.name, self.decoder_bits)
        check_shared_name(self.name, self.shared)

    @property
    def net(self) -> ConvNet:
        """The decoder."""
        return ConvNet(self.channels, self.width, self.stages)

    @property
    def num_decoder_parameters(self) -> int:
        """Parameters of a stored decoder, scales apart."""
        return self.net.parameters

    def inner_shape(self, shape: Shape) -> Shape:
        """Rows of the grid, and the channels of all latents of one."""
        rows, columns = self.net.grid(*shape)
        return rows, columns * self.channels

    def check(self, shape: Shape) -> None:
        """Fits where the base fits the latents, down to 1/8 bit per weight."""
        self.base.check(self.inner_shape(shape))
        parameters.check_rate(self.name, self.base.nbytes(self.inner_shape(shape)), shape)

    def own_shared_decoders(self) -> dict[str, SharedDecoder]:
        """The net, if it is shared."""
        if not self.shared:
            return {}
        decoder: tuple[Any, ...] = (self.name, *vars(self.net).values(), self.decoder_bits)
        return {self.shared: SharedDecoder(decoder, self._decoder_layout())}

    def own_multiply_adds(self, shape: Shape) -> int:
        """Those of all weights."""
        return round(shape[0] * shape[1] * self.net.multiply_adds_per_weight)

    def layout(self, shape: Shape) -> Tensors:
        """The net under `decoder.` if it is the matrix's own, `scales` (out,) float16, the base under `base.`"""
        own = {} if self.shared else self._decoder_layout()
        scales = scale_store.layout(scale_store.FLOAT16, shape[0])
        return {**own, **scales, **add_prefix("base", self.base.layout(self.inner_shape(shape)))}

    def pack(self, unpacked: UnpackedConvLatents, shape: Shape) -> Tensors:
        """Pack net, scales and base."""
        own = {} if self.shared else self.pack_decoder(unpacked.decoder)
        scales = scale_store.pack(scale_store.FLOAT16, unpacked.scales)
        return {**own, **scales, **add_prefix("base", self.base.pack(unpacked.base, self.inner_shape(shape)))}

    def pack_decoder(self, decoder: parameters.UnpackedParameters) -> Tensors:
        """The tensors of a net."""
        return parameters.pack(self.decoder_bits, decoder, self.num_decoder_parameters)

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedConvLatents:
        """The inverse of `pack`. Errors: FormatError if a shared net is not loaded."""
        base = self.base.unpack(strip_prefix("base", tensors), self.inner_shape(shape))
        scales = scale_store.unpack(scale_store.FLOAT16, tensors, (shape[0], 1))
        return UnpackedConvLatents(self.decoder(tensors, scales.device), scales, base)

    def decoder(self, tensors: Tensors, device: torch.device) -> parameters.UnpackedParameters:
        """The stored net."""
        if self.shared:
            tensors = {name: tensor.to(device) for name, tensor in shared_decoder_tensors(self.shared).items()}
        return parameters.unpack(self.decoder_bits, tensors, self.num_decoder_parameters)

    def decode(self, unpacked: UnpackedConvLatents, shape: Shape) -> Float[Tensor, "out in"]:
        """net(latents) · scale of the row, tile by tile."""
        latents = self.matrix_to_grid(self.base.decode(unpacked.base, self.inner_shape(shape)))
        flat = parameters.values(self.decoder_bits, unpacked.decoder, self.num_decoder_parameters).to(latents.dtype)
        with one_thread(), plain_convolutions():  # else bits depend on threads, and on what a GPU chooses
            found = self.net.decode_tiled(flat, latents)
        return found[: shape[0], : shape[1]] * unpacked.scales

    def matrix_to_grid(self, matrix: Float[Tensor, "rows all"]) -> Float[Tensor, "channels down across"]:
        """The base's matrix as a grid."""
        return matrix.unflatten(1, (-1, self.channels)).permute(2, 0, 1)

    def grid_to_matrix(self, grid: Float[Tensor, "channels down across"]) -> Float[Tensor, "rows all"]:
        """The inverse of `matrix_to_grid`."""
        return grid.permute(1, 2, 0).flatten(1)

    def _decoder_layout(self) -> Tensors:
        return parameters.layout(self.decoder_bits, self.num_decoder_parameters)


def plain_convolutions(tf32: bool = False) -> Any:
    """The same algorithm in every run, and no TF32 unless it may."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
