"""`rotated`: any format of the matrix after randomised Hadamard transforms of its inputs and outputs.

The incoherence processing of QuIP# (Tseng et al., arXiv:2402.04396): weights become nearly Gaussian, outliers
are spread over a whole row and column, and one scale serves the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, register, strip_prefix
from reallm.kernels import rotate, rotate_back

SIDES = ("both", "inputs", "outputs")
MAX_ODD = 4096  # sizes of models have 1 to 255; a cosine transform of 4096 takes 134 MB in float64
_OUTPUTS_SEED = 0x5851F42D4C957F2D  # the two sides have different signs


@dataclass(frozen=True)
class UnpackedRotated:
    """The parts of the transformed matrix: a transform has none of its own."""

    base: Unpacked


@register
@dataclass(frozen=True)
class Rotated(WeightFormat):
    """`base` of the transformed matrix; nothing is stored but `seed`, in the format itself.

    `sides`: transform the inputs (columns), the outputs (rows) or both.
    """

    base: WeightFormat
    sides: str = "both"
    seed: int = 0

    name: ClassVar[str] = "rotated"
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "codebook", "index_bits": 6}},)
    roles: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.sides not in SIDES:
            raise FormatError(f"rotated: sides={self.sides!r} is not one of {', '.join(SIDES)}")
        if not 0 <= self.seed < 1 << 63:
            raise FormatError(f"rotated: seed={self.seed} is not in 0 … 2^63 - 1")

    def error_model(self) -> str:
        """Return `rotated_N` with the columns N that the base decides together."""
        return f"rotated_{self.base.block_width()}"

    def check(self, shape: Shape) -> None:
        """Fits whatever the base fits, but for sizes whose odd part is huge: it takes a square matrix of its own."""
        turned = {"both": shape, "inputs": shape[1:], "outputs": shape[:1]}[self.sides]
        for size in turned:
            if (odd := size // (size & -size)) > MAX_ODD:
                raise FormatError(
                    f"rotated: {size} = {size // odd} · {odd} in a {shape} matrix: {odd} exceeds {MAX_ODD}"
                )
        self.base.check(shape)

    def layout(self, shape: Shape) -> Tensors:
        """The base's tensors under `base.`"""
        return add_prefix("base", self.base.layout(shape))

    def pack(self, unpacked: UnpackedRotated, shape: Shape) -> Tensors:
        """Pack the base."""
        return add_prefix("base", self.base.pack(unpacked.base, shape))

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedRotated:
        """The inverse of `pack`."""
        return UnpackedRotated(self.base.unpack(strip_prefix("base", tensors), shape))

    def decode(self, unpacked: UnpackedRotated, shape: Shape) -> Float[Tensor, "out in"]:
        """The base, turned back."""
        weight = self.base.decode(unpacked.base, shape)
        if self.sides != "outputs":
            weight = rotate_back(weight, self.seed)
        return rotate_back(weight.T, self.outputs_seed).T if self.sides != "inputs" else weight

    def rotate_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The matrix that the base stands for."""
        if self.sides != "outputs":
            weight = self.rotate_inputs(weight)
        return rotate(weight.T, self.outputs_seed).T if self.sides != "inputs" else weight

    def rotate_inputs(self, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """Rows over the inputs, turned as the matrix's are."""
        return rotate(rows, self.seed)

    @property
    def outputs_seed(self) -> int:
        """Seed of the signs of the rows."""
        return self.seed ^ _OUTPUTS_SEED
