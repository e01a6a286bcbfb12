"""The allocation problem: choose one option per matrix with the least predicted loss in a range of bytes.

A multiple-choice knapsack with fixed costs, solved as a mixed-integer linear program by HiGHS
(`scipy.optimize.milp`): x_ij = 1 if matrix i takes option j, y_s = 1 if any chosen option needs the shared item s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, vstack

from reallm.errors import RecipeError

# Relative gap to the optimum at which the search stops. Predicted losses are accurate to about 5 %.
_GAP = 1e-4
# With the choices of a real model the last tenth of a percent takes most of the time: 9 s of a dry run in place of 2.
_MANY, _GAP_OF_MANY = 3000, 1e-3
# Limit on nodes of the search tree, not on seconds: the same problem has the same solution on every machine.
_NODES = 2000


@dataclass(frozen=True)
class Choice:
    """An option for one matrix: its bytes, its predicted loss, and the shared items (decoders) that it needs."""

    nbytes: int
    loss: float
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Problem:
    """Choose one option for every matrix with the least summed loss and `least` <= bytes <= `most`.

    `options[i]` are the choices of matrix i. Bytes are the sum of the chosen options, `overhead`, and `shared[s]` once
    for every shared item s that a chosen option needs. With a `base` plan (an option index per matrix) each matrix that
    deviates from its base option costs `swap_penalty` in addition, and at most `max_changes` matrices may deviate.
    """

    options: Sequence[Sequence[Choice]]
    most: int
    least: int = 0
    overhead: int = 0
    shared: Mapping[str, int] = field(default_factory=dict)
    base: Sequence[int] | None = None
    max_changes: int | None = None
    swap_penalty: float = 0.0

    def nbytes(self, chosen: Sequence[int]) -> int:
        """Return the bytes of a solution, overhead and shared items included."""
        picked = [options[j] for options, j in zip(self.options, chosen, strict=True)]
        needed = frozenset().union(*(choice.needs for choice in picked))
        return self.overhead + sum(c.nbytes for c in picked) + sum(self.shared[item] for item in needed)

    def loss(self, chosen: Sequence[int]) -> float:
        """Return the summed predicted loss of a solution; penalties for changes are not part of it."""
        return sum(options[j].loss for options, j in zip(self.options, chosen, strict=True))

    @property
    def smallest(self) -> int:
        """Return an upper bound on the bytes of the smallest solution.

        The smaller of two: options with the fewest shared items first, or each matrix's smallest option.
        """
        chosen = [
            min(range(len(options)), key=lambda j, o=options: (len(o[j].needs), o[j].nbytes))
            for options in self.options
        ]
        cheapest = [min(range(len(options)), key=lambda j, o=options: o[j].nbytes) for options in self.options]
        return min(self.nbytes(chosen), self.nbytes(cheapest))

    def solve(self) -> list[int]:
        """Return the index of the chosen option of every matrix.

        Errors: RecipeError if no solution meets the range of bytes and the number of changes.
        """
        if not self.options:
            return []
        candidates = [_non_dominated(options, self, row) for row, options in enumerate(self.options)]
        found = self._solve_subset(candidates)
        if found is None and self.least:  # a dominated option may be the one that reaches the least bytes
            found = self._solve_subset([list(range(len(options))) for options in self.options])
        if found is None:
            raise RecipeError(self._reason())
        return found

    def _solve_subset(self, candidates: Sequence[Sequence[int]]) -> list[int] | None:
        """Solve with a subset of every matrix's options; None if there is no solution."""
        most, program = self.most, _Program(self, candidates)
        for _ in range(4):
            solution = program.solve(most)
            if solution is None:
                return None
            if (excess := self.nbytes(solution) - self.most) <= 0:
                return solution if self.nbytes(solution) >= self.least else None
            most -= max(excess, 1)  # the solver accepts solutions that exceed a row by a millionth of its bound
        return None

    def _reason(self) -> str:
        if (fewest := self.smallest) > self.most:
            return f"the smallest possible plan takes {fewest:,} bytes, the budget is {self.most:,}"
        changes = "" if self.max_changes is None else f" with {self.max_changes:,} changed matrices at most"
        return f"no plan takes {self.least:,} to {self.most:,} bytes{changes}"


def _non_dominated(options: Sequence[Choice], problem: Problem, row: int) -> list[int]:
    """Return the indices of options that no other dominates in bytes, loss and needs, plus the base option."""
    found: list[int] = []
    best: dict[frozenset[str], float] = {}
    for j in sorted(range(len(options)), key=lambda j: (options[j].nbytes, options[j].loss, len(options[j].needs))):
        option = options[j]
        dominated = any(needs <= option.needs and loss <= option.loss for needs, loss in best.items())
        if not dominated:
            best[option.needs] = option.loss
        if not dominated or (problem.base is not None and problem.base[row] == j):
            found.append(j)
    return found


class _Program:
    """The mixed-integer linear program of a problem over a subset of every matrix's options."""

    def __init__(self, problem: Problem, candidates: Sequence[Sequence[int]]) -> None:
        self.problem, self.candidates = problem, candidates
        self.items = sorted(
            {item for i, few in enumerate(candidates) for j in few for item in problem.options[i][j].needs}
        )
        pairs = [(i, j) for i, few in enumerate(candidates) for j in few]
        self.row = np.array([i for i, _ in pairs])
        self.choices = [problem.options[i][j] for i, j in pairs]
        self.changed = np.array([problem.base is not None and problem.base[i] != j for i, j in pairs], float)
        self.nbytes = np.array([c.nbytes for c in self.choices] + [problem.shared[item] for item in self.items], float)

    def solve(self, most: int) -> list[int] | None:
        """Return the best solution of at most `most` bytes; None if there is none."""
        options, items = len(self.choices), len(self.items)
        loss = np.array([c.loss for c in self.choices]) + self.problem.swap_penalty * self.changed
        # Losses are shifted by the least loss of their matrix and scaled by a typical difference: HiGHS ignores
        # differences below 1e-7 of a cost.
        least = np.full(len(self.candidates), np.inf)
        np.minimum.at(least, self.row, loss)
        above = loss - least[self.row]
        scale = float(np.median(above[above > 0])) if (above > 0).any() else 1.0
        result = milp(
            np.concatenate([above / scale, np.zeros(items)]),
            integrality=np.ones(options + items),
            bounds=Bounds(0, 1),
            constraints=self._constraints(most),
            options={"mip_rel_gap": _GAP if options < _MANY else _GAP_OF_MANY, "node_limit": _NODES},
        )
        return self._read(result)

    def _constraints(self, most: int) -> list[LinearConstraint]:
        """Return the constraints: one option per matrix, range of bytes, needed shared items, number of changes."""
        options, width = len(self.choices), len(self.choices) + len(self.items)
        places, problem = np.arange(options), self.problem
        one_each = coo_array((np.ones(options), (self.row, places)), shape=(len(self.candidates), width))
        unit = max(float(most - problem.overhead), 1.0)
        window = coo_array(self.nbytes[None] / unit)
        rows = [
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(
                window.tocsr(), (problem.least - problem.overhead) / unit, (most - problem.overhead) / unit
            ),
        ]
        if self.items:
            rows.append(LinearConstraint(self._needs(width), -np.inf, 0))
        if problem.max_changes is not None:
            changes = np.concatenate([self.changed, np.zeros(len(self.items))])
            rows.append(LinearConstraint(changes[None], 0, problem.max_changes))
        return rows

    def _needs(self, width: int) -> object:
        """Return rows of x_ij <= y_s, summed over the options of a matrix that need s: at most one is chosen."""
        blocks = []
        for place, item in enumerate(self.items):
            users = [k for k, choice in enumerate(self.choices) if item in choice.needs]
            rows = {row: number for number, row in enumerate(sorted({int(self.row[k]) for k in users}))}
            numbers = [rows[int(self.row[k])] for k in users]
            columns = [*users, *[len(self.choices) + place] * len(rows)]
            entries = [1.0] * len(users) + [-1.0] * len(rows)
            blocks.append(coo_array((entries, (numbers + list(rows.values()), columns)), shape=(len(rows), width)))
        return vstack(blocks).tocsr()

    def _read(self, result: OptimizeResult) -> list[int] | None:
        if result.x is None:
            return None
        values = result.x[: len(self.choices)]
        chosen: list[int] = []
        for i, few in enumerate(self.candidates):
            places = np.flatnonzero(self.row == i)
            chosen.append(few[int(values[places].argmax())])
        return chosen
