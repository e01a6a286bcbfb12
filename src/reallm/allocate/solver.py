"""One candidate for every matrix, least summed loss within a budget of bytes. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reallm.errors import RecipeError

# The exact search rounds every matrix up to a step of the budget: good for few, wasteful for many.
_GRID = 1 << 14
_FEW = 32


@dataclass(frozen=True)
class Candidate:
    """One way to store one matrix: what it costs and what it is predicted to lose."""

    nbytes: int
    loss: float


def choose(tables: Sequence[Sequence[Candidate]], budget: int, least: int = 0) -> list[int]:
    """Index of the chosen candidate of every table: summed nbytes <= budget, summed loss small.

    Lagrangian relaxation (Everett 1963; Shoham & Gersho 1988): bisect the price of a byte, which is exact on
    the convex hull, then spend what is left by the best affordable exchanges. A handful of matrices, where the
    hull is coarse, are also searched together; `least` bytes are then met if any choice meets them.

    Errors: RecipeError if even the smallest candidates exceed the budget.
    """
    smallest = [min(range(len(t)), key=lambda i: (t[i].nbytes, t[i].loss)) for t in tables]
    if (fewest := _bytes(tables, smallest)) > budget:
        raise RecipeError(f"the smallest possible plan takes {fewest:,} bytes, the budget is {budget:,}")
    chosen = _cheapest_affordable_price(tables, budget, smallest)
    chosen = _spend_rest(tables, chosen, budget)
    short = _bytes(tables, chosen) < least
    if not short and len(tables) > _FEW:
        return chosen
    found = _searched(tables, budget, least)
    return found if found and (short or _loss(tables, found) < _loss(tables, chosen)) else chosen


def _bytes(tables: Sequence[Sequence[Candidate]], chosen: Sequence[int]) -> int:
    return sum(table[i].nbytes for table, i in zip(tables, chosen, strict=True))


def _loss(tables: Sequence[Sequence[Candidate]], chosen: Sequence[int]) -> float:
    return sum(table[i].loss for table, i in zip(tables, chosen, strict=True))


def _at_price(tables: Sequence[Sequence[Candidate]], price: float) -> list[int]:
    """Each matrix by itself takes what costs least at `price` loss per byte."""
    return [min(range(len(t)), key=lambda i: (t[i].loss + price * t[i].nbytes, t[i].nbytes)) for t in tables]


def _cheapest_affordable_price(tables: Sequence[Sequence[Candidate]], budget: int, smallest: list[int]) -> list[int]:
    if _bytes(tables, free := _at_price(tables, 0.0)) <= budget:
        return free
    low, high = 0.0, max(c.loss for t in tables for c in t) + 1e-12
    best = smallest
    for _ in range(200):  # the price spans many decades: bisect until the interval is the float's own step
        price = (low + high) / 2
        if not low < price < high:
            break
        chosen = _at_price(tables, price)
        if _bytes(tables, chosen) <= budget:
            best, high = chosen, price
        else:
            low = price
    return best


def _spend_rest(tables: Sequence[Sequence[Candidate]], chosen: list[int], budget: int) -> list[int]:
    """Exchange candidates one at a time, best gain per byte first, while any exchange that gains is affordable."""
    chosen = list(chosen)
    left = budget - _bytes(tables, chosen)
    while True:
        exchanges = [
            ((now.loss - new.loss) / max(new.nbytes - now.nbytes, 1), m, i)
            for m, table in enumerate(tables)
            for now in (table[chosen[m]],)
            for i, new in enumerate(table)
            if new.loss < now.loss and new.nbytes - now.nbytes <= left
        ]
        if not exchanges:
            return chosen
        _, matrix, index = max(exchanges)
        left -= tables[matrix][index].nbytes - tables[matrix][chosen[matrix]].nbytes
        chosen[matrix] = index


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
