"""`linear_latents`: a few latents for each patch of weights, stored in any format, and a linear map back to the patch.

Transform coding: where neighbouring weights are alike, a few coefficients of a cosine transform say most of a patch;
where they are not, keeping k of d loses (d - k) / d of the energy. The map is a fixed transform, or learned and stored.

    latents (a matrix in `base`) -> times the basis (kept x patch) -> patches, side by side
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.decoders.linear import DCT, HADAMARD, LEARNED, TRANSFORMS, fixed_basis
from reallm.errors import FormatError
from reallm.formats import parameters
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
from reallm.formats.shared_decoders import check_shared_name, shared_decoder_tensors

MAX_PATCH = 256  # weights; a learned basis has 65,536 numbers then


@dataclass(frozen=True)
class UnpackedLinearLatents:
    """Patch (i, j) is base[i, j · kept … (j + 1) · kept - 1] times the basis; a fixed transform has no `decoder`."""

    decoder: parameters.UnpackedParameters | None
    base: Unpacked


@register
@dataclass(frozen=True)
class LinearLatents(WeightFormat):
    """`kept` latents in `base` for each patch of `patch_rows` × `patch_columns` weights, and a linear map back.

    `transform`: dct or hadamard (patterns of lowest frequency first, nothing stored), or learned (`decoder_bits` bits a
    number, by itself or `shared`). Matrices that patches do not divide are filled up, which is counted.
    """

    base: WeightFormat
    patch_rows: int = 1
    patch_columns: int = 8
    kept: int = 8
    transform: str = DCT
    decoder_bits: int = 8
    shared: str = ""

    name: ClassVar[str] = "linear_latents"
    roles: ClassVar[dict[str, str]] = parameters.ROLES
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "codebook", "index_bits": 6}, "transform": LEARNED},)

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise FormatError(f"linear_latents: transform={self.transform!r} is not one of {', '.join(TRANSFORMS)}")
        for name in ("patch_rows", "patch_columns"):
            if (side := getattr(self, name)) < 1 or (self.transform == HADAMARD and side & (side - 1)):
                raise FormatError(f"linear_latents: {name}={side} is not at least 1, or a power of two for hadamard")
        if self.patch > MAX_PATCH:
            raise FormatError(f"linear_latents: a patch of {self.patch} weights is larger than {MAX_PATCH}")
        if not 1 <= self.kept <= self.patch:
            raise FormatError(f"linear_latents: kept={self.kept} is not in 1 … {self.patch}, the weights of a patch")
        parameters.check_bits(self.name, self.decoder_bits)
        check_shared_name(self.name, self.shared)
        if self.shared and self.transform != LEARNED:
            raise FormatError(
                f"linear_latents: shared={self.shared!r} needs transform=learned; {self.transform} is free"
            )

    @property
    def patch(self) -> int:
        """Weights of a patch."""
        return self.patch_rows * self.patch_columns

    @property
    def num_decoder_parameters(self) -> int:
        """Parameters of a stored decoder, scales apart."""
        return self.kept * self.patch

    def inner_shape(self, shape: Shape) -> Shape:
        """Rows of patches, and the latents of all patches in one."""
        return -(-shape[0] // self.patch_rows), -(-shape[1] // self.patch_columns) * self.kept

    def check(self, shape: Shape) -> None:
        """Fits where the base fits the latents, down to 1/8 bit per weight."""
        self.base.check(self.inner_shape(shape))
        parameters.check_rate(self.name, self.base.nbytes(self.inner_shape(shape)), shape)

    def own_shared_decoders(self) -> dict[str, SharedDecoder]:
        """The basis, if it is shared."""
        if not self.shared:
            return {}
        decoder = (self.name, self.patch_rows, self.patch_columns, self.kept, self.decoder_bits)
        return {self.shared: SharedDecoder(decoder, parameters.layout(self.decoder_bits, self.num_decoder_parameters))}

    def own_multiply_adds(self, shape: Shape) -> int:
        """`kept` for each weight."""
        return shape[0] * shape[1] * self.kept

    def layout(self, shape: Shape) -> Tensors:
        """The basis under `decoder.` if it is learned and the matrix's own; the base under `base.`"""
        own = parameters.layout(self.decoder_bits, self.num_decoder_parameters) if self._has_own else {}
        return {**own, **add_prefix("base", self.base.layout(self.inner_shape(shape)))}

    def pack(self, unpacked: UnpackedLinearLatents, shape: Shape) -> Tensors:
        """Pack basis and base."""
        own = self.pack_decoder(unpacked.decoder) if self._has_own else {}
        return {**own, **add_prefix("base", self.base.pack(unpacked.base, self.inner_shape(shape)))}

    def pack_decoder(self, decoder: parameters.UnpackedParameters | None) -> Tensors:
        """The tensors of a learned basis."""
        assert decoder is not None
        return parameters.pack(self.decoder_bits, decoder, self.num_decoder_parameters)

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedLinearLatents:
        """The inverse of `pack`. Errors: FormatError if a shared basis is not loaded."""
        base = self.base.unpack(strip_prefix("base", tensors), self.inner_shape(shape))
        return UnpackedLinearLatents(self.decoder(tensors, next(iter(tensors.values())).device), base)

    def decoder(self, tensors: Tensors, device: torch.device) -> parameters.UnpackedParameters | None:
        """The stored basis, None for a fixed transform."""
        if self.transform != LEARNED:
            return None
        if self.shared:
            tensors = {name: tensor.to(device) for name, tensor in shared_decoder_tensors(self.shared).items()}
        return parameters.unpack(self.decoder_bits, tensors, self.num_decoder_parameters)

    def decode(self, unpacked: UnpackedLinearLatents, shape: Shape) -> Float[Tensor, "out in"]:
        """latents · basis, patch by patch."""
        latents = self.base.decode(unpacked.base, self.inner_shape(shape))
        patches = latents.unflatten(1, (-1, self.kept)) @ self.basis(unpacked.decoder, latents)
        return self.join_patches(patches, shape)

    def basis(self, decoder: parameters.UnpackedParameters | None, like: Tensor) -> Float[Tensor, "kept patch"]:
        """The map, of the dtype and on the device of `like`."""
        if decoder is None:
            return fixed_basis(self.transform, self.patch_rows, self.patch_columns, self.kept).to(like)
        flat = parameters.values(self.decoder_bits, decoder, self.num_decoder_parameters)
        return flat.view(self.kept, self.patch).to(like)

    def patches(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "rows columns patch"]:
        """A matrix cut into patches, each row-major; what is missing at the ends is zero."""
        h, w = self.patch_rows, self.patch_columns
        filled = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % w, 0, -matrix.shape[0] % h))
        return filled.unflatten(0, (-1, h)).unflatten(2, (-1, w)).transpose(1, 2).flatten(2)

    def join_patches(self, patches: Float[Tensor, "rows columns patch"], shape: Shape) -> Float[Tensor, "out in"]:
        """The inverse of `patches`."""
        h, w = self.patch_rows, self.patch_columns
        matrix = patches.unflatten(2, (h, w)).transpose(1, 2).flatten(2).flatten(0, 1)
        return matrix[: shape[0], : shape[1]]

    @property
    def _has_own(self) -> bool:
        return self.transform == LEARNED and not self.shared
