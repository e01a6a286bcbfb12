"""Randomised Hadamard transforms of any size.

A size n = 2^a · m with m odd is turned by (Hadamard of 2^a) ⊗ (an orthogonal matrix of m) after random signs:
2^a additions a value for the first, m products for the second (576 = 64 · 9, 11008 = 256 · 43). The odd part is
the type-II discrete cosine transform, which has a formula for every m. On a GPU, where a launch costs more than
arithmetic, it is two or three products with factors of the same matrix. What it is for: after it the weights
of a matrix look like independent Gaussians, whatever they were before (QuIP#, Tseng et al., arXiv:2402.04396).
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.kernels.ordered import one_thread

_MASK = (1 << 64) - 1
# Values that a processor transforms at once: three copies of them lie in its cache, not three of a hessian in memory.
_CHUNK = 1 << 17
_FACTOR = 64  # columns of a factor on a GPU


def rotate(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """The last axis times signs of `seed`, then transformed: an orthogonal map."""
    return _mixed(values * _signs_on(values.shape[-1], seed, values.device, values.dtype), transposed=False)


def rotate_back(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """The inverse of `rotate`."""
    return _mixed(values, transposed=True) * _signs_on(values.shape[-1], seed, values.device, values.dtype)


def rotate_by_products(values: Float[Tensor, "*rows n"], seed: int) -> Float[Tensor, "*rows n"]:
    """`rotate` up to rounding, as a GPU does it: on a CPU faster for many rows, but no format's bytes go by it."""
    return by_products(values * _signs_on(values.shape[-1], seed, values.device, values.dtype), transposed=False)


@functools.lru_cache(maxsize=256)
def _signs_on(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " n"]:
    with torch.inference_mode(False):
        return signs(n, seed).to(device, dtype)


@functools.lru_cache(maxsize=256)
def signs(n: int, seed: int) -> Float[Tensor, " n"]:
    """n signs by the top bit of splitmix64 (Steele, Lea, Flood 2014): the same on every machine."""
    state, found = seed & _MASK, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        found.append(-1.0 if (mixed ^ (mixed >> 31)) >> 63 else 1.0)
    return torch.tensor(found)


def _mixed(values: Tensor, transposed: bool) -> Tensor:
    """(H ⊗ C) of the last axis, seen as (2^a, m); H is symmetric, C goes by its transpose on the way back."""
    if values.device.type != "cpu":
        return by_products(values, transposed)
    n = values.shape[-1]
    power = n & -n
    shape = values.shape
    flat = values.reshape(-1, power, n // power)
    if n > power:
        cosines = _cosines(n // power).to(values)
        with one_thread():  # products of m columns depend on how threads share them
            flat = flat @ (cosines if transposed else cosines.T)
    rows = max(1, _CHUNK // n)
    if flat.device.type == "cpu" and len(flat) > rows:
        return torch.cat([_added(part) for part in flat.split(rows)]).reshape(shape)
    return _added(flat).reshape(shape)


def by_products(values: Float[Tensor, "*rows n"], transposed: bool) -> Float[Tensor, "*rows n"]:
    """`_mixed` as products with the factors of a Kronecker product, one after the other."""
    found, after = values, values.shape[-1]
    for factor in factors(values.shape[-1], values.device, values.dtype):
        after //= len(factor)
        factor = factor.T if transposed else factor
        if after == 1:
            found = found.reshape(-1, len(factor)) @ factor.T
        else:
            found = factor @ found.reshape(-1, len(factor), after)
    return found.reshape(values.shape)


@functools.lru_cache(maxsize=64)
def factors(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "m m"], ...]:
    """Orthogonal matrices whose Kronecker product is the transform; of at most 64 columns unless the odd part has more.

    n = 576 has two, of 16 and of 4 · 9.
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
    """The Hadamard matrix of 2^a, orthonormal, float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < power:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2), found)
    return found


def _added(flat: Float[Tensor, "rows power odd"]) -> Float[Tensor, "rows power odd"]:
    """The Hadamard matrix of 2^a by sums and differences of halves."""
    rows, power, odd = flat.shape
    half = 1
    while half < power:
        pairs = flat.reshape(rows, power // (2 * half), 2, half, odd)
        flat = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return flat.reshape(rows, power, odd) / math.sqrt(power)


@functools.lru_cache(maxsize=64)
def _cosines(m: int) -> Float[Tensor, "m m"]:
    """Orthonormal type-II cosine transform: row k is cos(π k (2 j + 1) / 2 m), scaled."""
    angles = torch.arange(m, dtype=torch.float64)[:, None] * (2 * torch.arange(m, dtype=torch.float64) + 1)
    matrix = torch.cos(angles * (math.pi / (2 * m))) * math.sqrt(2 / m)
    matrix[0] = 1 / math.sqrt(m)
    return matrix
