"""What a fit minimises: squared errors, each weighted by what an error in that place costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.kernels import average, one_thread, total

# What calibration can minimise.
OUTPUTS, GUIDED = "outputs", "guided"
OBJECTIVES = {
    OUTPUTS: "squared error of every matrix's outputs",
    GUIDED: "the same, tokens weighted by the gradient of the end-to-end loss",
}

# A column that is (nearly) zero counts at most 1,000 times as much as the mean column.
_LEAST_ENERGY = 1e-3
# Inputs that calibration never saw (dead ones) count a millionth of the mean: rounding to nearest decides there.
_LEAST_INPUT = 1e-6
# Share of the mean diagonal that is added where exact weights answer for the errors of others. With 1e-4 the error on
# text not calibrated on is 1 % higher (docs/experiments/outliers-and-scales.md).
COMPENSATION_DAMPING = 1e-2


@dataclass(frozen=True)
class Objective:
    """What an error D = weight - decoded costs.

    Σ importance · D², `importance` by column: one row of it for all, or one for every output row. With
    `hessian` = XᵀX / n_tokens of the calibration inputs the cost is tr(D H Dᵀ), the squared error of the
    layer's output per token (the objective of GPTQ, Frantar et al., arXiv:2210.17323), and importance is its
    diagonal, for methods that treat columns apart: k-means of codebooks, and the choice of what is kept apart. Other
    weights stand there in place of the diagonal, one for every weight (SqueezeLLM, Kim et al., arXiv:2306.07629).

    `rows`: what an error of each output row costs beside, mean 1; None where all cost alike. Codes of one row do not
    depend on it, so that only formats that can move errors between rows look at it (`scaled`).
    """

    importance: Float[Tensor, "rows in"]
    hessian: Float[Tensor, "in in"] | None = None
    rows: Float[Tensor, " out"] | None = None

    @staticmethod
    def plain(weight: Float[Tensor, "out in"]) -> Objective:
        """The squared error itself."""
        return Objective(weight.new_ones(1, weight.shape[1]))

    @staticmethod
    def relative_columns(weight: Float[Tensor, "out in"]) -> Objective:
        """Errors relative to the energy of their column: what is known of the inputs without data.

        A network that was trained gives small weights to large inputs, so that equal errors hurt more where
        weights are small. On SmolLM2-135M this took vector codes at 3.13 bits from perplexity 80 to 51 and at
        2.16 bits from 1.4e5 to 1.9e3, at a weight error 2 % higher (docs/experiments/errors-relative-to-columns.md).
        """
        largest = weight.abs().max()
        if largest == 0:
            return Objective.plain(weight)
        energy = (weight / largest).square().mean(0, keepdim=True)  # squares of tiny weights would be 0
        importance = 1 / (energy + average(energy) * _LEAST_ENERGY)
        return Objective(importance / average(importance))

    @staticmethod
    def output_error(hessian: Float[Tensor, "in in"], rows: Float[Tensor, " out"] | None = None) -> Objective:
        """The squared error of the layer's outputs; `hessian` is XᵀX / n_tokens, symmetric, any rank, float32.

        `rows`: what errors of each output cost, in any unit.

        It is divided by its mean diagonal: only ratios matter, and no input size over- or underflows.
        Errors: FormatError if it is not finite.
        """
        if not torch.isfinite(hessian).all():
            raise FormatError("hessian: not finite; the calibration inputs overflowed")
        mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        scaled = hessian / mean
        floor = (_LEAST_INPUT - scaled.diagonal()).clamp(min=0)
        scaled = scaled + torch.diag(floor)
        return Objective(scaled.diagonal()[None].clone(), scaled, rows)

    def error(self, weight: Float[Tensor, "out in"], decoded: Float[Tensor, "out in"]) -> float:
        """The cost, accumulated in float64 so that iterates can be compared."""
        difference = weight - decoded
        if self.hessian is None:
            return total(difference.square() * self.importance, torch.float64).item()
        return total((difference @ self.hessian) * difference, torch.float64).item()

    def row_errors(self, weight: Float[Tensor, "out in"], decoded: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """The cost of each output row, float64."""
        difference = weight - decoded
        if self.hessian is None:
            return (difference.square() * self.importance).sum(1, dtype=torch.float64)
        return ((difference @ self.hessian) * difference).sum(1, dtype=torch.float64)

    def select_columns(self, order: Int[Tensor, " in"]) -> Objective:
        """The objective of the matrix whose columns are reordered: column j is the old column order[j]."""
        hessian = None if self.hessian is None else self.hessian[order][:, order]
        return Objective(self.importance[:, order], hessian, self.rows)

    def select_rows(self, rows: Int[Tensor, " rest"]) -> Objective:
        """The objective of the matrix that consists of these rows."""
        importance = self.importance if len(self.importance) == 1 else self.importance[rows]
        return dataclasses.replace(self, importance=importance, rows=None if self.rows is None else self.rows[rows])

    def schur_complement(self, kept: Int[Tensor, " kept"], rest: Int[Tensor, " rest"]) -> Objective:
        """The objective of the columns `rest` when the columns `kept` answer every error as well as they can.

        With a hessian that is its Schur complement, H_RR - H_RK H_KK⁻¹ H_KR.
        """
        if self.hessian is None:
            return self.select_columns(rest)
        before = self.hessian[rest][:, rest]
        explained = self.compensation(kept, rest) @ self.hessian[kept][:, rest].double()
        hessian = (before - (explained + explained.T) / 2).float()
        # What is explained in full still counts a little, as inputs do that were never seen.
        diagonal = hessian.diagonal()
        floor = (_LEAST_INPUT * before.diagonal().mean() - diagonal).clamp(min=0)
        hessian = hessian + torch.diag(floor)
        share = hessian.diagonal() / before.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
        return Objective(self.importance[:, rest] * share, hessian, self.rows)

    def compensation(self, kept: Int[Tensor, " kept"], rest: Int[Tensor, " rest"]) -> Float[Tensor, "rest kept"]:
        """What the columns `kept` best add for errors of the columns `rest`: H_RK H_KK⁻¹, float64; needs a hessian."""
        assert self.hessian is not None
        own = self.hessian[kept][:, kept].double()
        own.diagonal().add_(COMPENSATION_DAMPING * own.diagonal().mean())
        with one_thread():
            return torch.linalg.solve(own, self.hessian[kept][:, rest].double()).T

    def divide_rows(self, sizes: Float[Tensor, " out"]) -> Objective:
        """The objective of the matrix whose rows were divided by `sizes`. The hessian is the same for every row."""
        rows = None if self.rows is None else self.rows * sizes.square()
        return dataclasses.replace(self, importance=self.importance * sizes.square()[:, None], rows=rows)

    def divide_columns(self, sizes: Float[Tensor, " in"]) -> Objective:
        """The objective of the matrix whose columns were divided by `sizes`."""
        hessian = None if self.hessian is None else sizes[:, None] * self.hessian * sizes
        return dataclasses.replace(self, importance=self.importance * sizes.square(), hessian=hessian)

    def rotate(self, rotate: Callable[[Tensor], Tensor]) -> Objective:
        """The objective of the matrix whose rows `rotate` (orthogonal, on the last axis) has turned.

        What importance says beside the hessian is lost: behind a rotation every input is a mixture of all.
        """
        if self.hessian is None:
            # Errors spread over all inputs alike: what is left of importance is its mean.
            return Objective(self.importance.mean(1, keepdim=True).expand_as(self.importance))
        hessian = rotate(rotate(self.hessian).T)
        hessian = (hessian + hessian.T) / 2
        return Objective(hessian.diagonal()[None].clone(), hessian, self.rows)

    def to(self, device: torch.device) -> Objective:
        """The same on another device."""
        hessian, rows = (None if tensor is None else tensor.to(device) for tensor in (self.hessian, self.rows))
        return Objective(self.importance.to(device), hessian, rows)

    @property
    def column_importance(self) -> Float[Tensor, " in"]:
        """One importance a column, for methods that cannot tell rows apart."""
        return self.importance.mean(0)
