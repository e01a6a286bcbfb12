"""Lattice codes by rate and distortion, at a step whose coded words fill the budget.

Codes minimise importance · (error / step)² + λ · bits, bits by the histogram of the codes themselves: code, count,
code again. The step follows from the rate: a step twice as wide takes about one bit per weight less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit, matrix_shape
from reallm.fit.feedback import assign_codes, importance_in_feedback
from reallm.fit.objective import Objective
from reallm.formats import Unpacked
from reallm.formats.entropy_coded import EntropyCoded, UnpackedEntropyCoded
from reallm.kernels import average
from reallm.kernels.ans import RAW_BITS
from reallm.kernels.backend import has_triton
from reallm.kernels.e8_points import cheapest_points, points_with_feedback
from reallm.kernels.e8_stream import DIM, largest_code

# Squared steps that one bit is worth. Theory at high rates says 2 ln 2 · D = 0.40, D = 4 · 0.0717 (E8 of spacing 2).
# 0.44 is best at 2 bits, 0.40 at 3 and 4, where the error hardly changes from 0.36 to 0.48
# (docs/experiments/entropy-coded-and-shannon.md).
BIT = 0.42
_ROUNDS = 3
# The step is sought on so many weights, and corrected on all.
_SAMPLE = 1 << 18
_SEARCHES = 12
_NEAR = 2e-3
# Passes over the whole matrix after the search: rounding is cheap, error feedback is not.
_PASSES, _FEEDBACK_PASSES = 6, 3
# Words that the budget has and the codes do not use.
_SLACK = 5e-4
_CHUNK = 1 << 18
_LARGEST_EXPONENT = 127.0


@dataclass(frozen=True)
class _Costs:
    """What a code costs in squared steps, by class of its column; `parities` is charged to a point as a whole."""

    codes: Float[Tensor, "classes codes"]
    parities: Float[Tensor, "2 classes"]
    column_classes: Int[Tensor, " in"]


@dataclass(frozen=True)
class _Coder:
    """E8 points of eight rows of a column: error feedback still goes column by column."""

    step: float
    costs: _Costs
    mean_importance: float
    largest: int

    width = 1

    def encode(
        self, columns: Float[Tensor, "out columns"], start: int, importance: Float[Tensor, "rows columns"]
    ) -> tuple[Int[Tensor, "out columns"], Float[Tensor, "out columns"]]:
        """Codes and code · step."""
        chunk = max(1, _CHUNK // len(columns))
        relative = importance / self.mean_importance
        parts = [
            self._codes(part / self.step, weight, self.costs.column_classes[start + chunk * number :][: part.shape[1]])
            for number, (part, weight) in enumerate(zip(columns.split(chunk, 1), relative.split(chunk, 1), strict=True))
        ]
        codes = torch.cat(parts, 1)
        return codes.to(torch.int32), codes * self.step

    def has_panels(self, device: torch.device) -> bool:
        return has_triton(device.type)

    def encode_panel(
        self, moving: Float[Tensor, "out panel"], columns: Int[Tensor, " panel"], factor: Float[Tensor, "panel panel"]
    ) -> tuple[Int[Tensor, "out panel"], Float[Tensor, "out panel"]]:
        """As column by column: `encode`, and what later columns answer."""
        return points_with_feedback(
            moving,
            factor,
            factor.diagonal().reciprocal().square() / self.mean_importance,
            self.costs.codes,
            self.costs.parities,
            self.costs.column_classes[columns],
            self.step,
            self._limit,
        )

    @property
    def _limit(self) -> int:
        """The largest target whose point can surely be written."""
        return largest_code(self.largest) - DIM

    def _codes(self, target: Tensor, importance: Tensor, classes: Tensor) -> Float[Tensor, "out columns"]:
        target = target.clamp(-self._limit, self._limit)
        return cheapest_points(target, importance, self.costs.codes, self.costs.parities, classes)


@fit.register
def fit_entropy_coded(
    fmt: EntropyCoded, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedEntropyCoded:
    """The smallest step found whose codes fit the budget; a sample of the matrix tells about where it lies."""
    objective = objective or Objective.plain(weight)
    largest = weight.abs().max().item()
    if largest < torch.finfo(torch.float32).tiny * 2**20:  # a step could be 0
        return UnpackedEntropyCoded(torch.zeros_like(weight, dtype=torch.int32), weight.new_zeros(1))
    sample = _Sample.draw(fmt, weight, objective, largest)
    # Squares of tiny weights would be 0.
    size = largest * average((weight / largest).square()).sqrt().item()
    exponent, costs = sample.search(math.log2(size) + 1 - sample.budget)
    return _fill_budget(weight, objective, sample, exponent, costs)


@dataclass(frozen=True)
class _Sample:
    """Some eights of rows, and all that a coder needs beside its step."""

    fmt: EntropyCoded
    weight: Float[Tensor, "rows in"]
    importance: Float[Tensor, "weighted in"]
    budget: float  # bits per weight that the words have
    least_step: float  # a finer one would clip the largest weight

    @staticmethod
    def draw(fmt: EntropyCoded, weight: Tensor, objective: Objective, largest: float) -> _Sample:
        importance = objective.importance
        if objective.hessian is not None:
            # What error feedback will weigh errors by.
            importance = importance_in_feedback(objective.hessian, _Coder.width)[None]
        eights = -(-len(weight) // DIM)
        wanted = min(eights, max(1, _SAMPLE // (DIM * weight.shape[1])))
        chosen = torch.linspace(0, eights - 1, wanted, device=weight.device).round().long()
        rows = (chosen[:, None] * DIM + torch.arange(DIM, device=weight.device)).view(-1)
        rows = rows[rows < len(weight)]
        if len(importance) > 1:
            importance = importance[rows]
        budget = 32 * fmt.words(matrix_shape(weight)) / weight.numel()
        return _Sample(fmt, weight[rows], importance, budget, largest / (largest_code(fmt.largest) - 2 * DIM))

    def step(self, exponent: float) -> float:
        """2^exponent in float32, neither too fine nor too large for it."""
        return torch.tensor(max(2.0 ** min(exponent, _LARGEST_EXPONENT), self.least_step)).item()

    def coder(self, step: float, costs: _Costs) -> _Coder:
        return _Coder(step, costs, average(self.importance).item(), self.fmt.largest)

    def costs(self, codes: Int[Tensor, "rows in"] | None = None) -> _Costs:
        """By the histogram of codes; nothing costs anything without one."""
        columns, classes, size = self.weight.shape[1], self.fmt.classes, 2 * self.fmt.largest + 1
        if codes is None:
            zeros = self.weight.new_zeros
            return _Costs(zeros(classes, size), zeros(2, classes), zeros(columns, dtype=torch.int64))
        column_classes = torch.from_numpy(self.fmt.assign_classes(codes.cpu().numpy())).to(codes.device).long()
        place = codes.clamp(-self.fmt.largest, self.fmt.largest) + self.fmt.largest + column_classes * size
        counts = torch.bincount(place.view(-1), minlength=classes * size).view(classes, size) + 0.5
        share = counts / counts.sum(1, keepdim=True)
        bits = -share.log2()
        bits[:, [0, -1]] += RAW_BITS
        # Seven of eight codes know their parity from the first.
        odd = share[:, (self.fmt.largest + 1) % 2 :: 2].sum(1)
        parities = (DIM - 1) * torch.stack([1 - odd, odd]).log2()
        return _Costs((BIT * bits).to(self.weight), (BIT * parities).to(self.weight), column_classes)

    def search(self, exponent: float) -> tuple[float, _Costs]:
        """log2(step) that about meets the budget, and the costs there; `exponent` is a first guess."""
        costs = self.costs()

        def rate(exponent: float) -> float:
            nonlocal costs
            costs = self.costs()
            for _ in range(_ROUNDS):
                codes = self.coder(self.step(exponent), costs).encode(self.weight, 0, self.importance)[0]
                costs = self.costs(codes)
            return _rate(self.fmt, codes)

        tried = None
        for _ in range(_SEARCHES):
            missed = rate(exponent) - self.budget
            if abs(missed) < _NEAR * self.budget:
                break
            tried, slope = (exponent, missed), _slope(tried, (exponent, missed))
            exponent += missed / slope
        return exponent, costs


def _fill_budget(
    weight: Tensor, objective: Objective, sample: _Sample, exponent: float, costs: _Costs
) -> UnpackedEntropyCoded:
    """Codes of the whole matrix that fill the budget: a few steps near `exponent`, the smallest that fits."""
    passes = _PASSES if objective.hessian is None else _FEEDBACK_PASSES
    best, best_exponent, number, tried = None, float("inf"), 0, None
    while number < passes or best is None:
        step = sample.step(exponent)
        codes = assign_codes(weight, sample.coder(step, costs), objective)
        missed = _rate(sample.fmt, codes) - sample.budget
        if missed <= 0 and exponent < best_exponent:
            best, best_exponent = UnpackedEntropyCoded(codes, weight.new_tensor([step])), exponent
            if missed > -_SLACK * sample.budget:
                break
        number += 1
        slope = _slope(tried, (exponent, missed))
        tried = (exponent, missed)
        # Aim within the slack. If that goes on to miss, ever wider steps must end in codes that fit.
        exponent += (missed + _SLACK / 2 * sample.budget) / slope
        if number >= passes:
            exponent = max(exponent, tried[0]) + 0.01 * 2.0 ** (number - passes)
    return best


def _slope(before: tuple[float, float] | None, now: tuple[float, float]) -> float:
    """Return the bits per weight that an exponent higher by 1 saves, from two tries; about 1 at high rates."""
    if before is None or before[0] == now[0]:
        return 1.0
    return min(max((before[1] - now[1]) / (now[0] - before[0]), 0.2), 2.0)


def _rate(fmt: EntropyCoded, codes: Int[Tensor, "rows in"]) -> float:
    """Bits per weight of the coded words."""
    return 32 * len(fmt.encode_codes(codes.cpu().numpy())[0]) / codes.numel()
