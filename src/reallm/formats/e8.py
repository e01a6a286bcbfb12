"""`e8`: words of the E8 lattice for eight neighbouring weights, made for entries that look Gaussian.

The E8P code of QuIP# (Tseng et al., arXiv:2402.04396) at 2 bits per weight, and its residual forms at 3 and 4.
The words follow from their definition and are never stored. Among equally short lattice points, more than fit into
a code, the choice is our own: those far from each other. It is meant for weights after a Hadamard transform.

    code (16 bits) -> pattern of magnitudes (8 bits), signs of the first seven (7), shift by ±1/4 (1)
    word           =  pattern · signs + shift;  the eighth sign makes the sum of pattern · signs even
    3, 4 bits      -> word + ratio · word of a second code
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register

VECTOR_DIM = 8
FIRST_BITS = 16
SHIFT = 0.25
# Size of the second stage's words in units of the first's, by `bits`. Measured on Gaussian vectors with the best scale
# for each: a ratio 10 % larger or smaller costs 2 to 4 % of the error.
RATIOS = {3: 0.5625, 4: 0.2734375}


@dataclass(frozen=True)
class UnpackedE8:
    """weight = value(code) · scale: bits 0 … 15 of a code are the first stage's, those above the second's."""

    codes: Int[Tensor, "out vectors"]
    scales: Float[Tensor, " 1"]


@register
@dataclass(frozen=True)
class E8(WeightFormat):
    """E8-lattice words for eight weights of a row, 2, 3 or 4 bits per weight, and one float32 scale per matrix.

    Rows that 8 does not divide are padded with zeros by one short vector, which is counted.
    Errors: FormatError for other `bits`.
    """

    bits: int = 2

    name: ClassVar[str] = "e8"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "scales": "scales"}
    examples: ClassVar[tuple[dict, ...]] = ({"bits": 2}, {"bits": 3}, {"bits": 4})

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"e8: bits={self.bits} is not 2, 3 or 4")

    def vectors_per_row(self, in_features: int) -> int:
        """Codes of one row."""
        return -(-in_features // VECTOR_DIM)

    def block_width(self) -> int:
        """Return the weights of a lattice point."""
        return 8

    def check(self, shape: Shape) -> None:
        """Every shape fits: the last vector of a row may be short."""

    def layout(self, shape: Shape) -> Tensors:
        """`codes`: `bits` bytes per vector, lowest first, row-major; `scales` (1,) float32."""
        count = shape[0] * self.vectors_per_row(shape[1])
        return {"codes": empty((count * self.bits,), torch.uint8), "scales": empty((1,), torch.float32)}

    def pack(self, unpacked: UnpackedE8, shape: Shape) -> Tensors:
        """Eight weights of `bits` bits are `bits` whole bytes."""
        planes = [(unpacked.codes >> 8 * i & 0xFF).to(torch.uint8) for i in range(self.bits)]
        return {"codes": torch.stack(planes, -1).reshape(-1), "scales": unpacked.scales.detach()}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedE8:
        """The inverse of `pack`; codes as int64."""
        planes = tensors["codes"].view(shape[0], self.vectors_per_row(shape[1]), self.bits).to(torch.int64)
        return UnpackedE8(sum(planes[..., i] << 8 * i for i in range(self.bits)), tensors["scales"])

    def decode(self, unpacked: UnpackedE8, shape: Shape) -> Float[Tensor, "out in"]:
        """value(code) · scale."""
        return decode_codes(unpacked.codes, self.bits).flatten(1)[:, : shape[1]] * unpacked.scales


def decode_codes(codes: Int[Tensor, "..."], bits: int) -> Float[Tensor, "... 8"]:
    """The vectors that codes of 8 · `bits` bits stand for, before the scale."""
    values = e8p_words(codes.device)[codes & 0xFFFF]
    if bits == 2:
        return values
    second = short_words(codes.device) if bits == 3 else e8p_words(codes.device)
    return values + RATIOS[bits] * second[codes >> FIRST_BITS]


# All that follows is made on the CPU whatever torch's default device is, and outside inference mode: it is made once
# for all later uses, and the first may be under either.


@functools.cache
def e8p_words(device: torch.device) -> Float[Tensor, "65536 8"]:
    """Word of every 16-bit code: bits 0-7 the pattern, 8-14 minus signs, 15 a shift of -1/4 instead of 1/4.

    The words are points of E8 + 1/4 (QuIP#'s E8P): patterns with signs that make an even sum are D8 + 1/2.
    """
    with torch.inference_mode(False):
        codes = torch.arange(1 << FIRST_BITS, device="cpu")
        patterns = e8p_patterns(torch.device("cpu"))[codes & 0xFF]
        minus = codes[:, None] >> torch.arange(8, 8 + VECTOR_DIM, device="cpu") & 1
        minus[:, 7] = (patterns.sum(1).long() + minus[:, :7].sum(1)) % 2
        shift = SHIFT * (1 - 2 * (codes >> 15))
        return (patterns * (1 - 2 * minus) + shift[:, None]).to(device)


@functools.cache
def e8p_patterns(device: torch.device) -> Float[Tensor, "256 8"]:
    """Magnitudes of D8 + 1/2: the 227 of squared norm <= 10 in lexicographic order, then 29 of the 224 of 12."""
    with torch.inference_mode(False):
        doubled = _grid([1, 3, 5])
        norms = doubled.square().sum(1)
        patterns = torch.cat([doubled[norms <= 40], _farthest_point_sampling(doubled[norms == 48], 29)])
        return (patterns / 2).to(device)


@functools.cache
def short_words(device: torch.device) -> Float[Tensor, "256 8"]:
    """Words of the 8-bit code: 0, the 240 shortest points of E8 in lexicographic order, 15 of squared norm 4."""
    with torch.inference_mode(False):
        doubled = torch.cat([_grid([-4, -2, 0, 2, 4]), _grid([-3, -1, 1, 3])])
        doubled = doubled[doubled.sum(1) % 4 == 0]
        norms = doubled.square().sum(1)
        zero, shortest, longer = (_sort_points(doubled[norms == norm]) for norm in (0, 8, 16))
        return (torch.cat([zero, shortest, _farthest_point_sampling(longer, 15)]) / 2).to(device)


def _grid(values: list[int]) -> Int[Tensor, "n 8"]:
    """All vectors of eight of the values, which rise, in lexicographic order."""
    return torch.cartesian_prod(*[torch.tensor(values, device="cpu")] * VECTOR_DIM)


def _sort_points(points: Int[Tensor, "n 8"]) -> Int[Tensor, "n 8"]:
    """In lexicographic order."""
    return points.unique(dim=0)


def _farthest_point_sampling(points: Int[Tensor, "n 8"], count: int) -> Int[Tensor, "count 8"]:
    """`count` of the points: the first, then always the one farthest from its nearest chosen one, the first of equals.

    Of 29 patterns the choice matters little: errors at 2 bits are 0.09109 so, 0.09132 with the first 29 of five 3/2,
    and 0.09167 with the last 29.
    """
    chosen = [0]
    distance = (points - points[0]).square().sum(1)
    for _ in range(count - 1):
        # Not argmax, which may return any of several equals.
        chosen.append(int((distance == distance.max()).nonzero()[0]))
        distance = distance.minimum((points - points[chosen[-1]]).square().sum(1))
    return points[chosen]
