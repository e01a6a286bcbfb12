"""What a fit minimises: squared errors, each weighted by what an error in that place costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.kernels import average, total

# A column that is (nearly) zero counts at most 1,000 times as much as the mean column.
_LEAST_ENERGY = 1e-3
# Inputs that calibration never saw (dead ones) count a millionth of the mean: rounding to nearest decides there.
_LEAST_INPUT = 1e-6


@dataclass(frozen=True)
class Objective:
    """What an error D = weight - decoded costs.

    Σ importance · D², `importance` by column: one row of it for all, or one for every output row. With
    `hessian` = XᵀX / n_tokens of the calibration inputs the cost is tr(D H Dᵀ), the squared error of the
    layer's output per token (the objective of GPTQ, Frantar et al., arXiv:2210.17323), and importance is its
    diagonal, for methods that treat columns apart.
    """

    importance: Float[Tensor, "rows in"]
    hessian: Float[Tensor, "in in"] | None = None

    @staticmethod
    def plain(weight: Float[Tensor, "out in"]) -> Objective:
        """The squared error itself."""
        return Objective(weight.new_ones(1, weight.shape[1]))

    @staticmethod
    def relative_columns(weight: Float[Tensor, "out in"]) -> Objective:
        """Errors relative to the energy of their column: what is known of the inputs without data.

        A network that was trained gives small weights to large inputs, so that equal errors hurt more where
        weights are small. On SmolLM2-135M this took vector codes at 3.13 bits from perplexity 80 to 51 and at
        2.16 bits from 1.4e5 to 1.9e3, at a weight error 2 % higher (docs/log.md, 2026-11-22).
        """
        largest = weight.abs().max()
        if largest == 0:
            return Objective.plain(weight)
        energy = (weight / largest).square().mean(0, keepdim=True)  # squares of tiny weights would be 0
        importance = 1 / (energy + average(energy) * _LEAST_ENERGY)
        return Objective(importance / average(importance))

    @staticmethod
    def of_outputs(hessian: Float[Tensor, "in in"]) -> Objective:
        """The squared error of the layer's outputs; `hessian` is XᵀX / n_tokens, symmetric, any rank, float32.

        It is divided by its mean diagonal: only ratios matter, and no input size over- or underflows.
        Errors: FormatError if it is not finite.
        """
        if not torch.isfinite(hessian).all():
            raise FormatError("hessian: not finite; the calibration inputs overflowed")
        mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        scaled = hessian / mean
        floor = (_LEAST_INPUT - scaled.diagonal()).clamp(min=0)
        scaled = scaled + torch.diag(floor)
        return Objective(scaled.diagonal()[None].clone(), scaled)

    def error(self, weight: Float[Tensor, "out in"], decoded: Float[Tensor, "out in"]) -> float:
        """The cost, accumulated in float64 so that iterates can be compared."""
        difference = weight - decoded
        if self.hessian is None:
            return total(difference.square() * self.importance, torch.float64).item()
        return total((difference @ self.hessian) * difference, torch.float64).item()

    def with_columns(self, order: Int[Tensor, " in"]) -> Objective:
        """The objective of the matrix whose columns are reordered: column j is the old column order[j]."""
        hessian = None if self.hessian is None else self.hessian[order][:, order]
        return Objective(self.importance[:, order], hessian)

    def with_rows_scaled(self, sizes: Float[Tensor, " out"]) -> Objective:
        """The objective of the matrix whose rows were divided by `sizes`. The hessian is the same for every row."""
        return dataclasses.replace(self, importance=self.importance * sizes.square()[:, None])

    def rotated(self, rotate: Callable[[Tensor], Tensor]) -> Objective:
        """The objective of the matrix whose rows `rotate` (orthogonal, on the last axis) has turned."""
        if self.hessian is None:
            # Errors spread over all inputs alike: what is left of importance is its mean.
            return Objective(self.importance.mean(1, keepdim=True).expand_as(self.importance))
        hessian = rotate(rotate(self.hessian).T)
        hessian = (hessian + hessian.T) / 2
        return Objective(hessian.diagonal()[None].clone(), hessian)

    def to(self, device: torch.device) -> Objective:
        """The same on another device."""
        return Objective(self.importance.to(device), None if self.hessian is None else self.hessian.to(device))

    @property
    def by_column(self) -> Float[Tensor, " in"]:
        """One importance a column, for methods that cannot tell rows apart."""
        return self.importance.mean(0)
