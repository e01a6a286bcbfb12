"""One candidate for every matrix, least summed loss within a budget of bytes. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reallm.errors import RecipeError

# The exact search rounds every matrix up to a step of the budget: good for few, wasteful for many.
_GRID = 1 << 14
_FEW = 32
# A matrix whose choice moves more than this share of the budget is tried in each of its candidates: beside it prices
# are too coarse. An embedding is such a matrix.
_LARGE = 0.02


@dataclass(frozen=True)
class Candidate:
    """One way to store one matrix: what it costs and what it is predicted to lose."""

    nbytes: int
    loss: float


def choose(tables: Sequence[Sequence[Candidate]], budget: int, least: int = 0) -> list[int]:
    """Index of the chosen candidate of every table: summed nbytes <= budget, summed loss small.

    Lagrangian relaxation (Everett 1963; Shoham & Gersho 1988): bisect the price of a byte, which is exact on
    the convex hull, spend what is left by the best affordable exchanges, and search together the few candidates that
    can still be in a better choice. A matrix that is large beside the budget is tried in each of its candidates. A
    handful of matrices, where the hull is coarse, are also searched as they are; `least` bytes are then met if any
    choice meets them.

    Errors: RecipeError if even the smallest candidates exceed the budget.
    """
    if not tables:
        return []
    kept = [_undominated(table) for table in tables]
    useful = [[table[i] for i in few] for table, few in zip(tables, kept, strict=True)]
    numbers = _Numbers.of(useful)
    smallest = numbers.smallest()
    if (fewest := numbers.bytes_of(smallest)) > budget:
        raise RecipeError(f"the smallest possible plan takes {fewest:,} bytes, the budget is {budget:,}")
    chosen = min(_relaxed(numbers, budget, split=len(tables) > _FEW), key=numbers.loss_of, default=smallest)
    if numbers.bytes_of(chosen) < least:
        # What is large for its loss may be what fills the budget.
        found = _searched(tables, budget, least)
        if found is not None:
            return found
    elif len(tables) <= _FEW:
        found = _searched(useful, budget, least)
        if found is not None and numbers.loss_of(found) < numbers.loss_of(chosen):
            chosen = np.asarray(found)
    return [few[i] for few, i in zip(kept, chosen, strict=True)]


def _undominated(table: Sequence[Candidate]) -> list[int]:
    """Candidates than which none is as small and loses as little: of SmolLM2's 115 a matrix some 40."""
    found: list[int] = []
    least = float("inf")
    for i in sorted(range(len(table)), key=lambda i: (table[i].nbytes, table[i].loss)):
        if table[i].loss < least:
            found, least = [*found, i], table[i].loss
    return found


@dataclass(frozen=True)
class _Numbers:
    """Tables as arrays (matrices, candidates); what a shorter one has too few of costs infinitely much."""

    nbytes: np.ndarray
    loss: np.ndarray

    @staticmethod
    def of(tables: Sequence[Sequence[Candidate]]) -> _Numbers:
        width = max(len(table) for table in tables)
        nbytes, loss = np.full((len(tables), width), 1e18), np.full((len(tables), width), np.inf)
        for row, table in enumerate(tables):
            nbytes[row, : len(table)] = [candidate.nbytes for candidate in table]
            loss[row, : len(table)] = [candidate.loss for candidate in table]
        return _Numbers(nbytes, loss)

    def smallest(self) -> np.ndarray:
        """The fewest bytes, and of those the least loss."""
        fewest = self.nbytes == self.nbytes.min(1, keepdims=True)
        return np.where(fewest, self.loss, np.inf).argmin(1)

    def at_price(self, price: float) -> np.ndarray:
        """Each matrix by itself takes what costs least at `price` loss a byte; among equals what has fewest bytes."""
        cost = self.loss + price * self.nbytes
        return np.where(cost == cost.min(1, keepdims=True), self.nbytes, np.inf).argmin(1)

    def bytes_of(self, chosen: Sequence[int] | np.ndarray) -> int:
        return int(self.nbytes[np.arange(len(self.nbytes)), np.asarray(chosen)].sum())

    def loss_of(self, chosen: Sequence[int] | np.ndarray) -> float:
        return float(self.loss[np.arange(len(self.loss)), np.asarray(chosen)].sum())

    def only(self, row: int, candidate: int) -> _Numbers:
        """The matrix `row` has no other candidate."""
        nbytes, loss = self.nbytes.copy(), self.loss.copy()
        others = np.arange(nbytes.shape[1]) != candidate
        nbytes[row, others], loss[row, others] = 1e18, np.inf
        return _Numbers(nbytes, loss)


def _relaxed(numbers: _Numbers, budget: int, split: bool) -> list[np.ndarray]:
    """Choices by a price of bytes; with `split` one for each candidate of a matrix that is large beside the budget."""
    real = np.where(np.isfinite(numbers.loss), numbers.nbytes, np.nan)
    spread = np.nanmax(real, 1) - np.nanmin(real, 1)
    row = int(spread.argmax())
    if split and spread[row] > _LARGE * budget:
        found = []
        for candidate in np.flatnonzero(np.isfinite(numbers.loss[row])).tolist():
            found += _relaxed(numbers.only(row, candidate), budget, split=False)
        return found
    smallest = numbers.smallest()
    if numbers.bytes_of(smallest) > budget:
        return []
    chosen, price = _cheapest_affordable_price(numbers, budget, smallest)
    chosen = _spend_rest(numbers, chosen, budget)
    better = _near(numbers, chosen, price, budget)
    return [chosen if better is None else _spend_rest(numbers, better, budget)]


def _cheapest_affordable_price(numbers: _Numbers, budget: int, smallest: np.ndarray) -> tuple[np.ndarray, float]:
    """The choice at a price of bytes that is just high enough, and the price."""
    if numbers.bytes_of(free := numbers.at_price(0.0)) <= budget:
        return free, 0.0
    low, high = 0.0, float(numbers.loss[np.isfinite(numbers.loss)].max()) + 1e-12
    best = smallest
    for _ in range(100):  # the price spans many decades: bisect until the interval is the float's own step
        # Between decades by the geometric mean, which halves the number of decades in question.
        price = (low * high) ** 0.5 if low > 0 else high * 1e-3
        if not low < price < high or high < 1e-30:
            break
        chosen = numbers.at_price(price)
        if numbers.bytes_of(chosen) <= budget:
            best, high = chosen, price
        else:
            low = price
    return best, high


def _spend_rest(numbers: _Numbers, chosen: np.ndarray, budget: int) -> np.ndarray:
    """Exchange candidates one at a time, best gain per byte first, while any exchange that gains is affordable."""
    chosen, rows = chosen.copy(), np.arange(len(chosen))
    left = budget - numbers.bytes_of(chosen)
    while True:
        more = numbers.nbytes - numbers.nbytes[rows, chosen][:, None]
        gain = numbers.loss[rows, chosen][:, None] - numbers.loss
        worth = np.where((gain > 0) & (more <= left), gain / np.maximum(more, 1), -np.inf)
        row, index = np.unravel_index(worth.argmax(), worth.shape)
        if not np.isfinite(worth[row, index]):
            return chosen
        left -= int(more[row, index])
        chosen[row] = index


def _near(numbers: _Numbers, chosen: np.ndarray, price: float, budget: int) -> np.ndarray | None:
    """The best choice among those candidates that can be part of a better one than `chosen`; None if there is none.

    At any price of bytes a candidate that costs more above its table's cheapest than `chosen` lies above the dual bound
    is in no better choice. Of 20 candidates this leaves one to three, which are searched together.
    """
    cost = numbers.loss + price * numbers.nbytes
    above = cost - cost.min(1, keepdims=True)
    gap = numbers.loss_of(chosen) - (float(cost.min(1).sum()) - price * budget)
    near = above <= gap
    near[np.arange(len(chosen)), chosen] = True  # whatever rounding makes of the gap
    kept = [np.flatnonzero(row).tolist() for row in near]
    least = [min(int(numbers.nbytes[row, i]) for i in few) for row, few in enumerate(kept)]
    open_rows = [row for row, few in enumerate(kept) if len(few) > 1]
    if not open_rows or sum(least) > budget:
        return None
    tables = [
        [Candidate(int(numbers.nbytes[row, i]) - least[row], float(numbers.loss[row, i])) for i in kept[row]]
        for row in open_rows
    ]
    room = min(budget - sum(least), sum(max(c.nbytes for c in table) for table in tables))
    found = _tried(tables, room, price, gap) if len(tables) <= _FEW else None
    if found is None:
        found = _searched(tables, room, 0)
    if found is None:
        return None
    better = np.array([few[0] for few in kept])
    better[open_rows] = [kept[row][place] for row, place in zip(open_rows, found, strict=True)]
    return better if numbers.loss_of(better) < numbers.loss_of(chosen) else None


def _tried(tables: Sequence[Sequence[Candidate]], budget: int, price: float, gap: float) -> list[int] | None:
    """The choice of least loss, to the byte; None if too many choices are in question, or none is.

    Sums of the matrices so far, without those that are larger and lose more than another, and without those whose cost
    at `price` lies more than `gap` above the least: no better choice goes on from there. Rounded sizes alone left 4 of
    1,400 choices for 5 matrices up to 11 % above the optimum, where one matrix is 250 times as large as another.
    """
    nbytes, loss, bound = np.zeros(1), np.zeros(1), 0.0
    steps: list[tuple[np.ndarray, int]] = []
    for table in tables:
        sizes, losses = np.array([c.nbytes for c in table], float), np.array([c.loss for c in table])
        bound += float((losses + price * sizes).min())
        nbytes, loss = (nbytes[:, None] + sizes).ravel(), (loss[:, None] + losses).ravel()
        open_ones = np.flatnonzero((nbytes <= budget) & (loss + price * nbytes - bound <= gap * (1 + 1e-9) + 1e-15))
        order = open_ones[np.lexsort((loss[open_ones], nbytes[open_ones]))]
        before = np.minimum.accumulate(np.concatenate(([np.inf], loss[order])))[:-1]
        order = order[loss[order] < before]
        if not 0 < len(order) <= _GRID:
            return None
        nbytes, loss = nbytes[order], loss[order]
        steps.append((order, len(table)))
    place, chosen = int(loss.argmin()), []
    for order, width in reversed(steps):
        place, candidate = divmod(int(order[place]), width)
        chosen.append(candidate)
    return chosen[::-1]


def _searched(tables: Sequence[Sequence[Candidate]], budget: int, least: int) -> list[int] | None:
    """Least loss with `least` <= bytes <= `budget`, sizes rounded up to a grid; None if there is no such choice.

    Dynamic programming over the bytes taken by the matrices so far (the multiple-choice knapsack).
    """
    step = max(1, budget // _GRID)
    room = budget // step
    costs = [[-(-candidate.nbytes // step) for candidate in table] for table in tables]
    loss = np.full(room + 1, np.inf)
    loss[0] = 0.0
    taken = []
    for table, sizes in zip(tables, costs, strict=True):
        following, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.int64)
        for index, (candidate, size) in enumerate(zip(table, sizes, strict=True)):
            if size <= room:
                reached = loss[: room + 1 - size] + candidate.loss
                better = reached < following[size:]
                following[size:][better], choice[size:][better] = reached[better], index
        loss = following
        taken.append(choice)
    # Every matrix was rounded up by less than a step.
    first = min(room, -(-least // step) + len(tables)) if least else 0
    place = first + int(loss[first:].argmin())
    if not np.isfinite(loss[place]):
        return None
    chosen = []
    for choice, sizes in zip(reversed(taken), reversed(costs), strict=True):
        chosen.append(int(choice[place]))
        place -= sizes[chosen[-1]]
    return chosen[::-1]
