"""One flat vector of numbers as named tensors."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def count(shapes: Shapes) -> int:
    """Numbers of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())


def split(flat: Float[Tensor, " parameters"], shapes: Shapes) -> dict[str, Tensor]:
    """Views of the vector, one tensor after the other, each row-major."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
