"""`codeword`: vector quantisation with a codebook that is not stored: a small net makes it of the indices.

The decoder D of ReALLM (Leconte et al., arXiv:2405.13155) that acts codeword by codeword: it is run once over all
indices and is a plain table from then on, so that it costs nothing where the matrix is used. A table of 2^16 vectors
of 8 in float16 is 1 MiB, a net of 4 digits and 32 hidden numbers is 2.8 KB at 8 bits. One decoder can serve many
matrices (`shared`), and is then charged once.

    index -> net (decoders/codebook_net.py), b_φ bits per parameter -> codebook -> look-up -> scale of row or group
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.decoders import CodebookNet
from reallm.errors import FormatError
from reallm.formats import parameters
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, SharedDecoder, Tensors, WeightFormat, empty, register
from reallm.formats.shared_decoders import check_shared_name, shared_decoder_tensors
from reallm.kernels import entries, pack_bits, packed_nbytes, unpack_bits

VECTOR_DIMS = (2, 4, 8, 16, 32)
MAX_HIDDEN = 128


@dataclass(frozen=True)
class UnpackedNeuralCodebook:
    """vector = net(decoder)[code] · scale of each weight's group."""

    codes: Int[Tensor, "out vectors"]
    decoder: parameters.UnpackedParameters
    scales: Float[Tensor, "out groups"]


@register
@dataclass(frozen=True)
class NeuralCodebook(WeightFormat):
    """`index_bits` bits per vector of `vector_dim` weights; the codebook is a net of the index, not a stored table.

    The index is cut into digits of `digit_bits` bits, each with a table of its own; `hidden` numbers beside the sum of
    their entries pass a GELU (0: the decoder is linear in the digits). Parameters take `decoder_bits` bits (3, 4, 6,
    8, 16). `shared` names a decoder for all matrices that name it. `group_size` (0: one scale per row) and `scales` as
    in     `scales.py`.
    """

    index_bits: int = 16
    vector_dim: int = 8
    digit_bits: int = 4
    hidden: int = 32
    decoder_bits: int = 8
    shared: str = ""
    group_size: int = 0
    scales: str = scale_store.FLOAT16

    name: ClassVar[str] = "codeword"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", **parameters.ROLES, **scale_store.ROLES}
    examples: ClassVar[tuple[dict, ...]] = ({"index_bits": 12}, {"index_bits": 12, "vector_dim": 4})

    books: ClassVar[int] = 1  # it is searched as one codebook of `additive`

    def __post_init__(self) -> None:
        if self.vector_dim not in VECTOR_DIMS:
            raise FormatError(f"codeword: vector_dim={self.vector_dim} is not one of {VECTOR_DIMS}")
        for name, most in (("index_bits", 16), ("digit_bits", 16)):
            if not 1 <= getattr(self, name) <= most:
                raise FormatError(f"codeword: {name}={getattr(self, name)} is not in 1 … {most}")
        if not 0 <= self.hidden <= MAX_HIDDEN:
            raise FormatError(f"codeword: hidden={self.hidden} is not in 0 … {MAX_HIDDEN}")
        parameters.check_bits(self.name, self.decoder_bits)
        check_shared_name(self.name, self.shared)
        scale_store.check_groups(self.name, self.group_size, self.scales)

    @property
    def net(self) -> CodebookNet:
        """The decoder."""
        return CodebookNet(self.index_bits, self.vector_dim, self.digit_bits, self.hidden)

    @property
    def num_decoder_parameters(self) -> int:
        """Parameters of a stored decoder, scales apart."""
        return self.net.parameters

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
        """The last vector and the last group of a row may be short; 1/8 bit per weight is the least."""
        codes = packed_nbytes(shape[0] * self.vectors_per_row(shape[1]), self.index_bits)
        parameters.check_rate(self.name, codes, shape)

    def own_shared_decoders(self) -> dict[str, SharedDecoder]:
        """The decoder, if it is shared."""
        if not self.shared:
            return {}
        decoder: tuple[Any, ...] = (self.name, *vars(self.net).values(), self.decoder_bits)
        return {self.shared: SharedDecoder(decoder, parameters.layout(self.decoder_bits, self.num_decoder_parameters))}

    def own_multiply_adds(self, shape: Shape) -> int:
        """Those of the whole table: it is made once a matrix."""
        return self.net.multiply_adds

    def layout(self, shape: Shape) -> Tensors:
        """`codes` packed row-major, the parameters under `decoder.` unless they are shared, scales."""
        rows, groups = scale_store.grid(shape, self.group_size)
        count = rows * self.vectors_per_row(shape[1])
        own = {} if self.shared else parameters.layout(self.decoder_bits, self.num_decoder_parameters)
        return {
            "codes": empty((packed_nbytes(count, self.index_bits),), torch.uint8),
            **own,
            **scale_store.layout(self.scales, rows * groups),
        }

    def pack(self, unpacked: UnpackedNeuralCodebook, shape: Shape) -> Tensors:
        """Pack indices, the decoder if it is the matrix's own, and scales."""
        own = {} if self.shared else parameters.pack(self.decoder_bits, unpacked.decoder, self.num_decoder_parameters)
        return {
            "codes": pack_bits(unpacked.codes, self.index_bits),
            **own,
            **scale_store.pack(self.scales, unpacked.scales),
        }

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedNeuralCodebook:
        """The inverse of `pack`. Errors: FormatError if a shared decoder is not loaded."""
        vectors = self.vectors_per_row(shape[1])
        codes = unpack_bits(tensors["codes"], self.index_bits, shape[0] * vectors).view(shape[0], vectors)
        scales = scale_store.unpack(self.scales, tensors, scale_store.grid(shape, self.group_size))
        return UnpackedNeuralCodebook(codes, self.decoder(tensors), scales)

    def pack_decoder(self, decoder: parameters.UnpackedParameters) -> Tensors:
        """A shared decoder's tensors."""
        return parameters.pack(self.decoder_bits, decoder, self.num_decoder_parameters)

    def decoder(self, tensors: Tensors) -> parameters.UnpackedParameters:
        """The decoder's parts, on the device of the codes."""
        if self.shared:
            device = tensors["codes"].device
            tensors = {name: tensor.to(device) for name, tensor in shared_decoder_tensors(self.shared).items()}
        return parameters.unpack(self.decoder_bits, tensors, self.num_decoder_parameters)

    def decode(self, unpacked: UnpackedNeuralCodebook, shape: Shape) -> Float[Tensor, "out in"]:
        """net(code) · scale."""
        vectors = entries(self.codebook(unpacked.decoder, unpacked.scales.dtype), unpacked.codes).flatten(1)[
            :, : shape[1]
        ]
        return scale_store.apply_scales(vectors, unpacked.scales, self.group_size)

    def codebook(
        self, decoder: parameters.UnpackedParameters, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "codewords vector_dim"]:
        """All codewords, computed in float64: rounded to float32 they are the same on all devices but for rare ties."""
        return self.net.codebook(
            parameters.values(self.decoder_bits, decoder, self.num_decoder_parameters).double()
        ).to(dtype)
