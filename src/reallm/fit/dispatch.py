"""`fit`: find the parts of a weight in a format. Each way of finding registers itself for its format."""

from __future__ import annotations

from functools import singledispatch

from jaxtyping import Float
from torch import Tensor

from reallm.fit.objective import Objective
from reallm.formats import Shape, Unpacked, WeightFormat
from reallm.kernels import total


@singledispatch
def fit(
    fmt: WeightFormat,
    weight: Float[Tensor, "out in"],
    objective: Objective | None = None,
    seed: int = 0,
    start: Unpacked | None = None,
) -> Unpacked:
    """Parts whose decoding is close to `weight` by `objective`, or in squared error; float32, on its device.

    They are *stored* parts: scales and factors are already rounded to what the file keeps, and codes are
    chosen against the rounded values. `start` is an earlier result for nearly the same weight: methods that
    iterate begin there. The same weight, seed and device give the same parts.
    """
    raise NotImplementedError(f"no way to fit {type(fmt).__name__} is registered")


def matrix_shape(weight: Float[Tensor, "out in"]) -> Shape:
    """(out_features, in_features)."""
    return weight.shape[0], weight.shape[1]


def decode_unpacked(fmt: WeightFormat, unpacked: Unpacked, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The matrix that `unpacked` of `weight` stand for."""
    return fmt.decode(unpacked, matrix_shape(weight))


def squared_error(weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"]) -> float:
    """Sum of squared differences, accumulated in float64 so that iterates can be compared."""
    return total((weight - approximation).double().square()).item()


def relative_error(weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"]) -> float:
    """Squared error over the sum of squared weights; 0 for a zero matrix that is met exactly."""
    energy = total(weight.double().square()).item()
    error = squared_error(weight, approximation)
    return error / energy if energy else error
