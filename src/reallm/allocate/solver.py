"""One candidate for every matrix, least summed loss within a budget of bytes. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reallm.errors import RecipeError


@dataclass(frozen=True)
class Candidate:
    """One way to store one matrix: what it costs and what it is predicted to lose."""

    nbytes: int
    loss: float


def choose(tables: Sequence[Sequence[Candidate]], budget: int) -> list[int]:
    """Index of the chosen candidate of every table: summed nbytes <= budget, summed loss small.

    Lagrangian relaxation (Everett 1963; Shoham & Gersho 1988): bisect the price of a byte, which is exact on
    the convex hull, then spend what is left by the best affordable exchanges.

    Errors: RecipeError if even the smallest candidates exceed the budget.
    """
    smallest = [min(range(len(t)), key=lambda i: (t[i].nbytes, t[i].loss)) for t in tables]
    least = _bytes(tables, smallest)
    if least > budget:
        raise RecipeError(f"the smallest possible plan takes {least:,} bytes, the budget is {budget:,}")
    chosen = _cheapest_affordable_price(tables, budget, smallest)
    return _spend_rest(tables, chosen, budget)


def _bytes(tables: Sequence[Sequence[Candidate]], chosen: Sequence[int]) -> int:
    return sum(table[i].nbytes for table, i in zip(tables, chosen, strict=True))


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
