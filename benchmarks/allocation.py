"""The solver alone: seconds for a model of the shape of a 7B Llama, and how far from the optimum small choices are.

    python benchmarks/allocation.py

224 matrices (32 blocks of q, k, v, o, gate, up, down at width 4,096 and 11,008) with 20 candidates each, five budgets,
against the bound of the relaxed problem; then 5 matrices as large as SmolLM2-135M's, every choice of which is tried.
Losses fall about four times a bit, with noise, times a number for each matrix that spans a factor of 25, as measured
ones do. Writes results/allocation.json. A CPU is enough; no model is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lab import commit, machine

from reallm.allocate import Choice, Problem
from reallm.evaluate.measure import versions

Tables = Sequence[Sequence[Choice]]
WIDTH, INNER, BLOCKS, CANDIDATES = 4096, 11008, 32, 20
SHAPES = {role: (WIDTH, WIDTH) for role in "qkvo"} | {
    "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)
}  # fmt: skip
BUDGETS = (1.5, 2.0, 3.0, 4.0, 6.0)  # bits per weight
SMALL_TABLES, SMALL_SHARES = 200, (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SMALL_MATRICES, SMALL_CANDIDATES = 5, 6


def of_7b(seed: int) -> list[list[Choice]]:
    """Candidates of all matrices, at 1 to 8 bits."""
    rng = random.Random(seed)
    return [_table(rng, rows * columns, CANDIDATES) for _ in range(BLOCKS) for rows, columns in SHAPES.values()]


def small(seed: int) -> list[list[Choice]]:
    """Few matrices of very different sizes, where the hull of all choices is coarse."""
    rng = random.Random(seed)
    sizes = (110_592, 331_776, 884_736, 28_311_552)
    return [_table(rng, rng.choice(sizes), SMALL_CANDIDATES) for _ in range(SMALL_MATRICES)]


def _table(rng: random.Random, weights: int, count: int) -> list[Choice]:
    sensitivity = rng.uniform(0.2, 5)
    bits = sorted(rng.uniform(1, 8) for _ in range(count))
    return [Choice(int(b * weights / 8), sensitivity * 4**-b * rng.uniform(0.8, 1.2)) for b in bits]


def loss_of(tables: Tables, chosen: Sequence[int]) -> float:
    """Summed loss of a choice."""
    return sum(table[i].loss for table, i in zip(tables, chosen, strict=True))


def lower_bound(tables: Tables, budget: int) -> float:
    """No choice loses less: the best of the dual bounds at many prices of a byte (weak duality)."""
    prices = [10 ** -(step / 64) for step in range(256, 1024)]
    return max(sum(min(c.loss + p * c.nbytes for c in t) for t in tables) - p * budget for p in prices)


def optimum(tables: Tables, budget: int) -> float:
    """By trying every choice."""
    choices = itertools.product(*tables)
    return min(sum(c.loss for c in choice) for choice in choices if sum(c.nbytes for c in choice) <= budget)


def large_rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and distance from the bound, by model and budget."""
    rows = []
    weights = BLOCKS * sum(rows * columns for rows, columns in SHAPES.values())
    for seed, bits in itertools.product(seeds, BUDGETS):
        tables, budget = of_7b(seed), int(bits * weights / 8)
        start = time.perf_counter()
        chosen = Problem(tables, budget).solve()
        seconds = time.perf_counter() - start
        above = loss_of(tables, chosen) / lower_bound(tables, budget) - 1
        rows.append({"seed": seed, "bits": bits, "seconds": seconds, "above_bound": above})
    return rows


def small_ratios() -> list[float]:
    """Loss / least possible loss - 1 of every small table at every budget."""
    found = []
    for seed in range(SMALL_TABLES):
        tables = small(seed)
        least, most = (sum(pick(c.nbytes for c in table) for table in tables) for pick in (min, max))
        for share in SMALL_SHARES:
            budget = int(least + share * (most - least))
            found.append(loss_of(tables, Problem(tables, budget).solve()) / optimum(tables, budget) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models of the shape of a 7B one")
    parser.add_argument("--output", type=Path, default=Path("results/allocation.json"))
    args = parser.parse_args()
    rows, ratios = large_rows(range(args.seeds)), small_ratios()
    result = {
        "command": "python benchmarks/allocation.py",
        "commit": commit(),
        "machine": f"{machine(torch.device('cpu'))}, {os.cpu_count()} cores",
        "versions": versions(),
        "large": {
            "matrices": BLOCKS * len(SHAPES),
            "candidates": CANDIDATES,
            "seconds_longest": max(row["seconds"] for row in rows),
            "above_bound_largest": max(row["above_bound"] for row in rows),
            "rows": rows,
        },
        "small": {
            "matrices": SMALL_MATRICES,
            "candidates": SMALL_CANDIDATES,
            "choices_tried": SMALL_CANDIDATES**SMALL_MATRICES,
            "budgets": len(ratios),
            "above_optimum_largest": max(ratios),
            "above_optimum_mean": statistics.mean(ratios),
            "exactly_optimal": sum(ratio < 1e-9 for ratio in ratios) / len(ratios),
        },
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for part in ("large", "small"):
        print(part, {name: value for name, value in result[part].items() if name != "rows"})


if __name__ == "__main__":
    main()
