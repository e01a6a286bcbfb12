"""Named tensors as views of one flat parameter vector."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def count(shapes: Shapes) -> int:
    """Return the total number of elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def split(flat: Float[Tensor, " parameters"], shapes: Shapes) -> dict[str, Tensor]:
    """Split the vector into views in the order of `shapes`, each row-major."""
    views = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: view.view(shape) for (name, shape), view in zip(shapes.items(), views, strict=True)}
