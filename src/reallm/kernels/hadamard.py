"""Randomised Hadamard transforms of any size.

After the transform the weights of a matrix look like independent Gaussians (QuIP#, Tseng et al., arXiv:2402.04396). A
size n = 2^a · m with m odd is multiplied by random signs, then by (Hadamard of 2^a) ⊗ (orthogonal matrix of m): 2^a
additions per value for the first factor, m products for the second (576 = 64 · 9, 11008 = 256 · 43). The odd factor is
the type-II discrete cosine transform, which is defined for every m. On a GPU, where a launch costs more than
arithmetic, the transform is two or three products with Kronecker factors of the same matrix.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.kernels.deterministic import one_thread

_MASK = (1 << 64) - 1
# Values per chunk on a CPU: three copies of a chunk fit in the cache, instead of three copies of a Hessian in memory.
_CHUNK = 1 << 17
_FACTOR = 64  # largest number of columns of a Kronecker factor


def rotate(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """Multiply the last axis by the signs of `seed` and transform it: an orthogonal map."""
    return _transform(values * _device_signs(values.shape[-1], seed, values.device, values.dtype), transposed=False)


def rotate_back(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """Invert `rotate`."""
    return _transform(values, transposed=True) * _device_signs(values.shape[-1], seed, values.device, values.dtype)


def rotate_by_products(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """Compute `rotate` up to rounding as on a GPU: faster on a CPU for many rows, but never used for stored bytes."""
    return kronecker_transform(
        values * _device_signs(values.shape[-1], seed, values.device, values.dtype), transposed=False
    )


@functools.lru_cache(maxsize=256)
def _device_signs(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " n"]:
    with torch.inference_mode(False):
        return signs(n, seed).to(device, dtype)


@functools.lru_cache(maxsize=256)
def signs(n: int, seed: int) -> Float[Tensor, " n"]:
    """Return n signs from the top bit of splitmix64 (Steele, Lea, Flood 2014): the same on every machine."""
    state, values = seed & _MASK, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        values.append(-1.0 if (mixed ^ (mixed >> 31)) >> 63 else 1.0)
    return torch.tensor(values)


def _transform(values: Tensor, transposed: bool) -> Tensor:
    """Apply H ⊗ C to the last axis, viewed as (2^a, m); H is symmetric, and `transposed` uses Cᵀ (the inverse)."""
    if values.device.type != "cpu":
        return kronecker_transform(values, transposed)
    n = values.shape[-1]
    power = n & -n
    shape = values.shape
    flat = values.reshape(-1, power, n // power)
    if n > power:
        cosines = _cosines(n // power).to(values)
        with one_thread():  # the rounding of products of m columns depends on the number of threads
            flat = flat @ (cosines if transposed else cosines.T)
    rows = max(1, _CHUNK // n)
    if flat.device.type == "cpu" and len(flat) > rows:
        return torch.cat([_fast_walsh_hadamard(chunk) for chunk in flat.split(rows)]).reshape(shape)
    return _fast_walsh_hadamard(flat).reshape(shape)


def kronecker_transform(values: Float[Tensor, "*rows n"], transposed: bool) -> Float[Tensor, "*rows n"]:
    """Compute `_transform` as successive products with the factors of a Kronecker product."""
    result, inner = values, values.shape[-1]
    for factor in kronecker_factors(values.shape[-1], values.device, values.dtype):
        inner //= len(factor)
        factor = factor.T if transposed else factor
        if inner == 1:
            result = result.reshape(-1, len(factor)) @ factor.T
        else:
            result = factor @ result.reshape(-1, len(factor), inner)
    return result.reshape(values.shape)


@functools.lru_cache(maxsize=64)
def kronecker_factors(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "m m"], ...]:
    """Return orthogonal matrices whose Kronecker product is the transform.

    Each has at most 64 columns, unless the odd factor m has more. n = 576 has two, of 16 and 4 · 9.
    """
    with torch.inference_mode(False):
        power = n & -n
        last, sizes = _cosines(n // power).double(), []
        while power > 1 and 2 * len(last) <= _FACTOR:
            last, power = torch.kron(_sylvester(2), last), power // 2
        while power > 1:
            sizes.append(min(power, _FACTOR))
            power //= sizes[-1]
        return tuple(factor.to(device, dtype) for factor in (*map(_sylvester, sizes), last))


def _sylvester(power: int) -> Float[Tensor, "m m"]:
    """Return the orthonormal Hadamard matrix of 2^a, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2), matrix)
    return matrix


def _fast_walsh_hadamard(flat: Float[Tensor, "rows power odd"]) -> Float[Tensor, "rows power odd"]:
    """Apply the Hadamard matrix of 2^a to axis 1 by sums and differences of halves."""
    rows, power, odd = flat.shape
    half = 1
    while half < power:
        pairs = flat.reshape(rows, power // (2 * half), 2, half, odd)
        flat = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return flat.reshape(rows, power, odd) / math.sqrt(power)


@functools.lru_cache(maxsize=64)
def _cosines(m: int) -> Float[Tensor, "m m"]:
    """Return the orthonormal type-II cosine transform: row k is cos(π k (2 j + 1) / 2 m), scaled."""
    angles = torch.arange(m, dtype=torch.float64)[:, None] * (2 * torch.arange(m, dtype=torch.float64) + 1)
    matrix = torch.cos(angles * (math.pi / (2 * m))) * math.sqrt(2 / m)
    matrix[0] = 1 / math.sqrt(m)
    return matrix
