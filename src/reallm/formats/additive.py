"""`additive`: a vector of neighbouring inputs is a sum of entries, one of each codebook.

The format of AQLM (Egiazarian et al., arXiv:2401.06118): M codebooks of K entries stand for K^M vectors, and store
M · K.

    codes (M numbers of `index_bits` bits) -> Σ_m codebooks[m, code_m] -> times the scale of the row or group

The tables belong to the matrix and are charged to it: M · 2^index_bits · vector_dim · 16 bits. Two codebooks of 256
entries for vectors of 8 are 2 bits per weight and 8 KiB: 0.20 bits per weight of 576 x 576, 0.07 of 1536 x 576,
0.004 of 4096 x 4096. Smaller matrices want fewer entries or shorter vectors: four codebooks of 16 for vectors of 8 are
2 bits too, and 1 KiB.
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

VECTOR_DIMS = (4, 8, 16)
MAX_CODEBOOKS = 16


@dataclass(frozen=True)
class UnpackedAdditive:
    """vector = sum of its entries · scale of each weight's group; codes of a vector lie side by side."""

    codes: Int[Tensor, "out codes"]
    codebooks: Float[Tensor, "books entries vector_dim"]
    scales: Float[Tensor, "out groups"]


@register
@dataclass(frozen=True)
class Additive(WeightFormat):
    """`books` indices of `index_bits` bits for `vector_dim` weights: books · index_bits / vector_dim bits per weight.

    1 to 16 codebooks of 2^index_bits float16 entries, 1 to 16 index bits, vectors of 4, 8 or 16. Rows that
    `vector_dim` does not divide are padded with zeros by one short vector, which is counted. `group_size` (0: one
    scale per row) and `scales` as in `scales.py`.
    """

    books: int = 2
    index_bits: int = 8
    vector_dim: int = 8
    group_size: int = 0
    scales: str = scale_store.FLOAT16

    name: ClassVar[str] = "additive"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "codebooks": "codebooks", **scale_store.ROLES}
    examples: ClassVar[tuple[dict, ...]] = ({}, {"books": 4, "index_bits": 4}, {"index_bits": 4, "vector_dim": 4})

    def __post_init__(self) -> None:
        if self.vector_dim not in VECTOR_DIMS:
            raise FormatError(f"additive: vector_dim={self.vector_dim} is not one of {VECTOR_DIMS}")
        if not 1 <= self.books <= MAX_CODEBOOKS:
            raise FormatError(f"additive: books={self.books} is not in 1 … {MAX_CODEBOOKS}")
        if not 1 <= self.index_bits <= 16:
            raise FormatError(f"additive: index_bits={self.index_bits} is not in 1 … 16")
        scale_store.check_groups(self.name, self.group_size, self.scales)

    def codes_per_row(self, in_features: int) -> int:
        """Indices of one row: `books` for each vector."""
        return -(-in_features // self.vector_dim) * self.books

    def block_width(self) -> int:
        """Return the weights of a vector."""
        return self.vector_dim

    def codes_vectors(self) -> bool:
        """Return whether vectors are longer than one weight."""
        return self.vector_dim > 1

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last vector and the last group of a row may be short."""

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed row-major, vector by vector; `codebooks` (books, entries, vector_dim) float16; scales."""
        rows, groups = scale_store.grid(shape, self.group_size)
        return {
            "codes": empty((packed_nbytes(rows * self.codes_per_row(shape[1]), self.index_bits),), torch.uint8),
            "codebooks": empty((self.books, 2**self.index_bits, self.vector_dim), torch.float16),
            **scale_store.layout(self.scales, rows * groups),
        }

    def pack(self, unpacked: UnpackedAdditive, shape: Shape) -> Tensors:
        """Pack indices, codebooks and scales."""
        return {
            "codes": pack_bits(unpacked.codes, self.index_bits),
            "codebooks": unpacked.codebooks.detach().to(torch.float16),
            **scale_store.pack(self.scales, unpacked.scales),
        }

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedAdditive:
        """The inverse of `pack`."""
        count = self.codes_per_row(shape[1])
        codes = unpack_bits(tensors["codes"], self.index_bits, shape[0] * count).view(shape[0], count)
        scales = scale_store.unpack(self.scales, tensors, scale_store.grid(shape, self.group_size))
        return UnpackedAdditive(codes, tensors["codebooks"].to(torch.float32), scales)

    def decode(self, unpacked: UnpackedAdditive, shape: Shape) -> Float[Tensor, "out in"]:
        """Σ codebooks[m, code_m] · scale."""
        vectors = sum_of_entries(unpacked.codes.unflatten(1, (-1, self.books)), unpacked.codebooks)
        return scale_store.apply_scales(vectors.flatten(1)[:, : shape[1]], unpacked.scales, self.group_size)


def sum_of_entries(
    codes: Int[Tensor, "*vectors books"], codebooks: Float[Tensor, "books entries dim"]
) -> Float[Tensor, "*vectors dim"]:
    """One entry of each codebook, added up in their order."""
    total = entries(codebooks[0], codes[..., 0])
    for book in range(1, len(codebooks)):
        total = total + entries(codebooks[book], codes[..., book])
    return total
