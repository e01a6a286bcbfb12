"""`codebook`: vector quantisation. Every `vector_dim` neighbouring inputs share one index into a codebook.

With `vector_dim=1` a learned scalar code; with more a learned vector code, the VQ of ReALLM (Leconte et al.,
arXiv:2405.13155) and the format of ClusComp. The codebook belongs to the matrix and is charged to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register
from reallm.kernels import entries, pack_bits, packed_nbytes, unpack_bits

VECTOR_DIMS = (1, 2, 4, 8)


@dataclass(frozen=True)
class UnpackedCodebook:
    """vector = codebook[code] · scale of each weight's group; scales are signed."""

    codes: Int[Tensor, "out vectors"]
    codebook: Float[Tensor, "codebook_size vector_dim"]
    scales: Float[Tensor, "out groups"]


@register
@dataclass(frozen=True)
class Codebook(WeightFormat):
    """`index_bits` bits per vector of `vector_dim` weights: index_bits / vector_dim bits per weight.

    2^index_bits entries in float16, 1 to 16 index bits. Rows that `vector_dim` does not divide are padded
    with zeros by one short vector, which is counted. `group_size` and `scales` as in `scales.py`.
    """

    index_bits: int
    vector_dim: int = 2
    group_size: int = 64
    scales: str = scale_store.TWO_LEVEL

    name: ClassVar[str] = "codebook"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "codebook": "codebooks", **scale_store.ROLES}
    examples: ClassVar[tuple[dict, ...]] = (
        {"index_bits": 3, "vector_dim": 1},
        {"index_bits": 6, "vector_dim": 2},
        {"index_bits": 8, "vector_dim": 4},
    )

    def __post_init__(self) -> None:
        if self.vector_dim not in VECTOR_DIMS:
            raise FormatError(f"codebook: vector_dim={self.vector_dim} is not one of {VECTOR_DIMS}")
        if not 1 <= self.index_bits <= 16:
            raise FormatError(f"codebook: index_bits={self.index_bits} is not in 1 … 16")
        scale_store.check_groups(self.name, self.group_size, self.scales)

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return 2**self.index_bits

    def vectors_per_row(self, in_features: int) -> int:
        """Indices of one row."""
        return -(-in_features // self.vector_dim)

    def block_width(self) -> int:
        """Return the weights of a vector."""
        return self.vector_dim

    def codes_vectors(self) -> bool:
        """Return whether vectors are longer than one weight."""
        return self.vector_dim > 1

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last vector and the last group of a row may be short."""

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed row-major, `codebook` float16, scales as in `scales.py`."""
        rows, groups = scale_store.grid(shape, self.group_size)
        count = rows * self.vectors_per_row(shape[1])
        return {
            "codes": empty((packed_nbytes(count, self.index_bits),), torch.uint8),
            "codebook": empty((self.codebook_size, self.vector_dim), torch.float16),
            **scale_store.layout(self.scales, rows * groups, signed=True),
        }

    def pack(self, unpacked: UnpackedCodebook, shape: Shape) -> Tensors:
        """Pack indices, codebook and scales."""
        return {
            "codes": pack_bits(unpacked.codes, self.index_bits),
            "codebook": unpacked.codebook.detach().to(torch.float16),
            **scale_store.pack(self.scales, unpacked.scales, signed=True),
        }

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedCodebook:
        """The inverse of `pack`."""
        vectors = self.vectors_per_row(shape[1])
        codes = unpack_bits(tensors["codes"], self.index_bits, shape[0] * vectors).view(shape[0], vectors)
        grid = scale_store.grid(shape, self.group_size)
        scales = scale_store.unpack(self.scales, tensors, grid)
        return UnpackedCodebook(codes, tensors["codebook"].to(torch.float32), scales)

    def decode(self, unpacked: UnpackedCodebook, shape: Shape) -> Float[Tensor, "out in"]:
        """codebook[code] · scale."""
        normalised = entries(unpacked.codebook, unpacked.codes).flatten(1)[:, : shape[1]]
        return scale_store.apply_scales(normalised, unpacked.scales, self.group_size)
