"""`scaled`: any format of the matrix after its columns, and its rows, were brought to one size.

A transform and a code with one scale treat all columns alike; in trained networks their sizes differ, weights being
small where inputs are large. Balancing both sides in turn is the iteration of Sinkhorn and Knopp (1967), which
SINQ (Müller et al., arXiv:2509.22944) uses for uniform grids. Where it is known how much an error of each row costs,
scales of rows do something else: they move errors from the rows that matter to those that do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, Unpacked, WeightFormat, add_prefix, register, strip_prefix

BOTH, INPUTS, OUTPUTS = "both", "inputs", "outputs"
_AXES = {"row": OUTPUTS, "column": INPUTS}
_ROLES = {f"{side}_{name}": role for side in ("row", "column") for name, role in scale_store.ROLES.items()}


@dataclass(frozen=True)
class UnpackedScaled:
    """weight = scale of the row · base · scale of the column; scales are not negative, None on a side without."""

    row_scales: Float[Tensor, "out 1"] | None
    column_scales: Float[Tensor, "1 in"] | None
    base: Unpacked


@register
@dataclass(frozen=True)
class Scaled(WeightFormat):
    """`base` with a scale for every column, every row, or both: `sides` is inputs, outputs or both.

    Scales are stored as those of groups, by default in 8 bits: the base is found for the rounded ones, so that
    rounding costs nothing.
    """

    base: WeightFormat
    sides: str = BOTH
    scales: str = scale_store.TWO_LEVEL

    name: ClassVar[str] = "scaled"
    predicted_by_role: ClassVar[bool] = False
    roles: ClassVar[dict[str, str]] = _ROLES
    examples: ClassVar[tuple[dict, ...]] = ({"base": {"format": "rotated", "base": {"format": "e8", "bits": 2}}},)

    def __post_init__(self) -> None:
        if self.sides not in (BOTH, INPUTS, OUTPUTS):
            raise FormatError(f"scaled: sides={self.sides!r} is not one of {BOTH}, {INPUTS}, {OUTPUTS}")
        scale_store.check_groups(self.name, 0, self.scales)

    def error_model(self) -> str:
        """Return the base's, and before a rotation also which channels are scaled: `inputs_rotated_N`."""
        inside = self.base.error_model()
        return f"{self.sides}_{inside}" if inside.startswith("rotated_") else inside

    def check(self, shape: Shape) -> None:
        """Fits whatever the base fits."""
        self.base.check(shape)

    def sizes(self, shape: Shape) -> dict[str, Shape]:
        """Shape of the scales of each side."""
        sizes = {"row": (shape[0], 1), "column": (1, shape[1])}
        return {side: size for side, size in sizes.items() if self.sides in (BOTH, _AXES[side])}

    def layout(self, shape: Shape) -> Tensors:
        """`row_scales` (out,), `column_scales` (in,) and the largest ones of each; the base under `base.`"""
        tensors = {}
        for side, (rows, columns) in self.sizes(shape).items():
            tensors |= _prefix_axis(side, scale_store.layout(self.scales, rows * columns))
        return tensors | add_prefix("base", self.base.layout(shape))

    def pack(self, unpacked: UnpackedScaled, shape: Shape) -> Tensors:
        """Pack scales and base."""
        tensors = {}
        for side in self.sizes(shape):
            tensors |= _prefix_axis(side, scale_store.pack(self.scales, getattr(unpacked, f"{side}_scales")))
        return tensors | add_prefix("base", self.base.pack(unpacked.base, shape))

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedScaled:
        """The inverse of `pack`."""
        found = {
            side: scale_store.unpack(self.scales, _select_axis(side, tensors), size)
            for side, size in self.sizes(shape).items()
        }
        return UnpackedScaled(
            found.get("row"), found.get("column"), self.base.unpack(strip_prefix("base", tensors), shape)
        )

    def decode(self, unpacked: UnpackedScaled, shape: Shape) -> Float[Tensor, "out in"]:
        """scale of the row · base · scale of the column."""
        weight = self.base.decode(unpacked.base, shape)
        for scales in (unpacked.column_scales, unpacked.row_scales):
            weight = weight if scales is None else weight * scales
        return weight


def _prefix_axis(side: str, tensors: Tensors) -> Tensors:
    return {f"{side}_{name}": tensor for name, tensor in tensors.items()}


def _select_axis(side: str, tensors: Tensors) -> Tensors:
    return {name: tensors[f"{side}_{name}"] for name in scale_store.ROLES if f"{side}_{name}" in tensors}
