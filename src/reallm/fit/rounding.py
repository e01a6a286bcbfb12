"""Formats whose codes follow from the weight by rounding: dense, uniform, normal_float."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from reallm.errors import FormatError
from reallm.fit.dispatch import fit
from reallm.fit.feedback import Coder, assign_codes, importance_in_feedback
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.formats import Unpacked, WeightFormat
from reallm.formats import scales as scale_store
from reallm.formats.dense import Dense, UnpackedDense
from reallm.formats.normal_float import NormalFloat, UnpackedNormalFloat
from reallm.formats.uniform import Uniform, UnpackedUniform
from reallm.kernels import nearest_level

_ROUNDS = 1  # of sweeps and refits; the second gains a tenth of the first
# Shares of a group's range that its levels may span. With a hessian the best one lowers the error of 3 bits by 20 to
# 30 %; without, a few outliers carry the model and nothing is clipped (docs/experiments/range-of-scalar-codes.md).
_SHARES = tuple(share / 20 for share in range(20, 7, -1))


_AnyCoder = TypeVar("_AnyCoder", bound="_LevelCoder | _GridCoder")


@fit.register
def fit_dense(
    fmt: Dense, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedDense:
    """Round to the stored dtype.

    Errors: FormatError if a weight is beyond the dtype's range.
    """
    largest = weight.abs().max().item()
    if largest > torch.finfo(fmt.torch_dtype).max:
        raise FormatError(f"dense: {fmt.dtype} cannot hold a weight of {largest:.3g}; use bfloat16")
    return UnpackedDense(weight.to(fmt.torch_dtype).to(torch.float32))


@fit.register
def fit_uniform(
    fmt: Uniform, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedUniform:
    """Levels span each group's range, or with a hessian the share of it that costs least."""
    grid = _symmetric_grid if fmt.symmetric else _asymmetric_grid
    coder = _search_clipping(lambda share: _GridCoder(fmt, *grid(fmt, weight, share)), weight, objective)
    unpacked = UnpackedUniform(
        assign_codes(weight, coder, objective), coder.scales, None if fmt.symmetric else coder.zeros
    )
    return _refine(fmt, unpacked, weight, objective, lambda p: _GridCoder(fmt, p.scales, coder.zeros))


@fit.register
def fit_normal_float(
    fmt: NormalFloat, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedNormalFloat:
    """The largest weight of a group takes the outermost level, or with a hessian the share of it that costs least."""
    span = (mean_magnitude if fmt.bits == 1 else largest_magnitude)(weight, fmt.group_size)
    coder = _search_clipping(
        lambda share: _LevelCoder(fmt, scale_store.fake_quantize(fmt.scales, share * span)), weight, objective
    )
    unpacked = UnpackedNormalFloat(assign_codes(weight, coder, objective), coder.scales)
    return _refine(fmt, unpacked, weight, objective, lambda p: _LevelCoder(fmt, p.scales))


def _search_clipping(
    clipped_coder: Callable[[float], _AnyCoder], weight: Tensor, objective: Objective | None
) -> _AnyCoder:
    """The coder of the whole range; with a hessian each group has the share at which rounding costs least."""
    best = clipped_coder(1.0)
    if objective is None or objective.hessian is None:
        return best
    importance = importance_in_feedback(objective.hessian, 1)[None]

    def costs(coder: _AnyCoder) -> Float[Tensor, "out groups"]:
        errors = coder.encode(weight, 0, importance)[1] - weight
        return scale_store.split_groups(importance * errors.square(), coder.fmt.group_size).sum(2)

    least = costs(best)
    for share in _SHARES[1:]:
        other = clipped_coder(share)
        found = costs(other)
        best, least = best.where(found >= least, other), torch.minimum(found, least)
    return best


def _refine(
    fmt: WeightFormat,
    unpacked: Unpacked,
    weight: Tensor,
    objective: Objective | None,
    make_coder: Callable[[Unpacked], Coder],
) -> Unpacked:
    """With a hessian scales and codes once more, by what all errors together cost."""
    if objective is None or objective.hessian is None:
        return unpacked
    return alternate(fmt, unpacked, weight, objective, (("scales",),), make_coder, _ROUNDS)


class GroupScaledCoder:
    """What coders share whose scales are those of groups: what scales alone decide is made once, not once a block."""

    fmt: WeightFormat  # with a `group_size`
    scales: Float[Tensor, "out groups"]

    @functools.cached_property
    def divisors(self) -> Float[Tensor, "out groups"]:
        """Of the scales."""
        return divisors(self.scales)

    @functools.cached_property
    def squares(self) -> Float[Tensor, "out groups"]:
        """Of the scales."""
        return self.scales.square()

    def expand_columns(self, values: Real[Tensor, "out groups"], start: int, count: int) -> Real[Tensor, "out count"]:
        """One value per weight of `count` columns from column `start` on."""
        return scale_store.expand_columns(values, start, count, self.fmt.group_size)


@dataclass(frozen=True)
class _LevelCoder(GroupScaledCoder):
    """Nearest levels of a NormalFloat."""

    fmt: NormalFloat
    scales: Float[Tensor, "out groups"]
    width: ClassVar[int] = 1

    def where(self, kept: Bool[Tensor, "out groups"], other: _LevelCoder) -> _LevelCoder:
        """Groups of this one where `kept`, else of the other."""
        return _LevelCoder(self.fmt, torch.where(kept, self.scales, other.scales))

    def encode(self, columns: Tensor, start: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Rounding is best for any importance: weights do not share a code."""
        codes = nearest_level(columns / self.expand_columns(self.divisors, start, columns.shape[1]), self.levels)
        return codes, self.levels[codes] * self.expand_columns(self.scales, start, columns.shape[1])

    @functools.cached_property
    def levels(self) -> Float[Tensor, " levels"]:
        """Of the format, where the scales are."""
        return self.fmt.levels(self.scales.device)


@dataclass(frozen=True)
class _GridCoder(GroupScaledCoder):
    """Nearest steps of an even grid; `zeros` is the code that stands for 0."""

    fmt: Uniform
    scales: Float[Tensor, "out groups"]
    zeros: Real[Tensor, "out groups"]
    width: ClassVar[int] = 1

    def where(self, kept: Bool[Tensor, "out groups"], other: _GridCoder) -> _GridCoder:
        """Groups of this one where `kept`, else of the other."""
        pairs = ((self.scales, other.scales), (self.zeros, other.zeros))
        return _GridCoder(self.fmt, *(torch.where(kept, one, two) for one, two in pairs))

    def encode(self, columns: Tensor, start: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Rounding, clamped to the codes there are."""
        scales, zeros, divided = (
            self.expand_columns(values, start, columns.shape[1]) for values in (self.scales, self.zeros, self.divisors)
        )
        codes = _round_clamped(columns / divided + zeros, self.fmt.bits)
        return codes, (codes - zeros) * scales


def largest_magnitude(weight: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "out groups"]:
    """Largest |weight| of each group."""
    return signed_largest(weight, group_size).abs()


def signed_largest(weight: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "out groups"]:
    """The weight of largest magnitude of each group, with its sign."""
    groups = scale_store.split_groups(weight, group_size)
    return groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]


def mean_magnitude(weight: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "out groups"]:
    """Mean |weight| of each group: the best level of a 1-bit code, where the largest weight would double the error.

    A short last group counts only the weights it holds.
    """
    sums = scale_store.split_groups(weight.abs(), group_size).sum(2)
    counts = scale_store.split_groups(torch.ones_like(weight[:1]), group_size).sum(2)
    return sums / counts


def normalize(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"], group_size: int
) -> Float[Tensor, "out in"]:
    """weight / scale of its group."""
    return weight / scale_store.expand_groups(divisors(scales), weight.shape[1], group_size)


def divisors(scales: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Scales with 1 for 0: a zero group (pruned heads), or one below the smallest stored scale, divides by it."""
    return torch.where(scales != 0, scales, 1.0)


def _symmetric_grid(fmt: Uniform, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(scales, zero codes) of a grid around 0 that spans a share of each group's range."""
    if fmt.bits == 1:
        scales = 2 * mean_magnitude(weight, fmt.group_size)
    else:
        scales = -signed_largest(weight, fmt.group_size) / fmt.zero_code
    scales = scale_store.fake_quantize(fmt.scales, share * scales, signed=True)
    return scales, torch.full_like(scales, fmt.zero_code)


def _asymmetric_grid(fmt: Uniform, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(scales, zero codes) of a grid from the smallest to the largest weight, times `share`."""
    groups = scale_store.split_groups(weight, fmt.group_size)
    # The range always holds 0, so that 0 (and the filling of a short group) is exact.
    low, high = share * groups.amin(2).clamp(max=0), share * groups.amax(2).clamp(min=0)
    scales = scale_store.fake_quantize(fmt.scales, (high - low) / (2**fmt.bits - 1))
    zeros = _round_clamped(-low / divisors(scales), fmt.bits)
    return scales, zeros


def _round_clamped(values: Tensor, bits: int) -> Int[Tensor, "..."]:
    return values.round().clamp(0, 2**bits - 1).to(torch.int32)
