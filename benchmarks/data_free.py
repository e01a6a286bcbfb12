"""Every data-free format at its true bits, with and without a residual, beside what the same bytes buy.

    python benchmarks/data_free.py --model MODEL --data-dir DATA --jobs 4

Block matrices only: embedding and head stay as they are, so that rows compare formats (the arm `embedding`
shows what 8 bits there cost). Writes results/data_free.json. WikiText-2 raw test, all windows, nothing chosen on it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lab import Arm, FormatOf, Lab, Workers, arguments, asked_for, earlier_runs, original_of, save

from reallm.allocate import Choice, MatrixInfo, Problem, load_recipe, plan_from_recipe
from reallm.fit import gaussian_error
from reallm.formats import WeightFormat, from_spec, to_spec
from reallm.pipeline import Settings
from reallm.pipeline.budget import format_options
from reallm.pipeline.byte_budget import plan_for_bits
from reallm.source import Walk

RANKS = (16, 32, 64)
BUDGETS = (2.0, 2.5, 3.0, 3.25, 3.5, 4.0)
RECIPES = ("mixed", "rtn3", "rtn4", "qlora", "lq-lora", "reallm-vq", "reallm-lean")


def uniform(bits: int, group_size: int = 64) -> dict[str, Any]:
    return {"format": "uniform", "bits": bits, "group_size": group_size}


def normal(bits: int) -> dict[str, Any]:
    return {"format": "normal_float", "bits": bits, "group_size": 64}


def vectors(dim: int, index_bits: int, group_size: int = 64) -> dict[str, Any]:
    return {"format": "codebook", "index_bits": index_bits, "vector_dim": dim, "group_size": group_size}


# Families without a residual, from which mixtures of the same bytes are made: neighbours on the ladder of bits.
LADDERS = {
    "uniform": [uniform(bits) for bits in range(2, 9)],
    "normal_float": [normal(bits) for bits in range(2, 9)],
    "codebook d=1": [vectors(1, bits) for bits in range(2, 9)],
    "codebook d=2": [vectors(2, bits) for bits in range(4, 13)],
    "codebook d=4": [vectors(4, bits) for bits in (8, 9, 10)] + [vectors(2, bits) for bits in range(6, 13)],
}
SINGLE = {
    "uniform": [uniform(b, g) for b in (4, 3, 2) for g in (64, 128)],
    "normal_float": [normal(b) for b in (4, 3, 2)],
    "codebook d=1": [vectors(1, 3), vectors(1, 2)],
    "codebook d=2": [vectors(2, 6), vectors(2, 4)],
    "codebook d=4": [vectors(4, 12), vectors(4, 8)],
}
RANKED = {
    "uniform": [uniform(4), uniform(3), uniform(2)],
    "normal_float": [normal(4), normal(3), normal(2)],
    "codebook d=1": [vectors(1, 3), vectors(1, 2)],
    "codebook d=2": [vectors(2, 6), vectors(2, 4)],
    "codebook d=4": [vectors(4, 8)],
}


INT8_TOO = [normal(3), vectors(1, 3), vectors(2, 6)]
# In this order, so that a run that is cut short has the arms of interest: at 2 bits a scalar code is lost anyway.
FIRST = [vectors(2, 6), vectors(4, 8), normal(3), uniform(3), vectors(1, 3)]


@dataclass(frozen=True)
class Task:
    """One arm to run; exactly one of the last three says how matrices get their formats."""

    group: str
    name: str
    spec: dict[str, Any] | None = None
    recipe: str | None = None
    budget: float | None = None
    ladder: str | None = None  # with `budget`: a mixture of this family at that many bits

    def format_of(self, infos: list[MatrixInfo]) -> FormatOf:
        """The format of each matrix."""
        if self.spec is not None:
            fmt = from_spec(self.spec)
            return lambda matrix: fmt
        if self.ladder is not None:
            assert self.budget is not None
            return _mixture(self.ladder, self.budget, infos).get
        if self.recipe is not None:
            plan = plan_from_recipe(load_recipe(self.recipe), infos)
        else:
            assert self.budget is not None
            options = format_options(infos, Walk(), Settings(bits=self.budget), None, False)
            plan = plan_for_bits(infos, options, self.budget, f"{self.budget:g} bits")
        chosen = {entry.matrix: entry.fmt for entry in plan.entries}
        return chosen.get


def _mixture(ladder: str, bits: float, infos: list[MatrixInfo]) -> dict[MatrixInfo, WeightFormat]:
    """Formats of one family, mixed over the matrices so that together they take `bits` a weight."""
    formats = [from_spec(spec) for spec in LADDERS[ladder]]
    blocks = [info for info in infos if info.kind == "block"]
    tables = [
        [Choice(fmt.nbytes(info.shape), info.weights * gaussian_error(fmt)) for fmt in formats] for info in blocks
    ]
    chosen = Problem(tables, int(bits * sum(info.weights for info in blocks) / 8)).solve()
    return {info: formats[i] for info, i in zip(blocks, chosen, strict=True)}


def true_bits(spec: dict[str, Any], infos: list[MatrixInfo]) -> float:
    """Stored bits per weight over the block matrices."""
    fmt = from_spec(spec)
    blocks = [info for info in infos if info.kind == "block"]
    return 8 * sum(fmt.nbytes(info.shape) for info in blocks) / sum(info.weights for info in blocks)


def set_rank(spec: dict[str, Any], rank: int, factors: str = "bfloat16") -> dict[str, Any]:
    return {"format": "low_rank_plus", "rank": rank, "factors": factors, "base": spec}


def label(spec: dict[str, Any]) -> str:
    """A short name of a format without residual."""
    if spec["format"] == "codebook":
        bits = spec["index_bits"] / spec["vector_dim"]
        return f"codebook d={spec['vector_dim']} {bits:g} bit g{spec['group_size']}"
    return f"{spec['format']} {spec['bits']} bit g{spec['group_size']}"


def ranked_tasks(infos: list[MatrixInfo]) -> list[tuple[Task, Task]]:
    """(with residual, the same bytes without) for every base and rank."""
    pairs = []
    for family, specs in RANKED.items():
        for spec in specs:
            for rank, factors in [(r, "bfloat16") for r in RANKS] + [(16, "int8")] * (spec in INT8_TOO):
                name = f"{label(spec)} + rank {rank}" + (" int8" if factors == "int8" else "")
                ranked = set_rank(spec, rank, factors)
                bits = true_bits(ranked, infos)
                same = Task(family, f"{family} mixed at {bits:.3f} bit", budget=bits, ladder=family)
                pairs.append((Task(family, name, spec=ranked), same))
    return sorted(pairs, key=lambda pair: _position((pair[0].spec or {})["base"]))


def _position(base: dict[str, Any]) -> int:
    return FIRST.index(base) if base in FIRST else len(FIRST)


def permutation_tasks(infos: list[MatrixInfo]) -> list[Task]:
    """No order, one order and an order per 64 rows, at equal bytes: `none` spends them on smaller groups."""
    base = vectors(2, 6)
    orders = [("sort", 0), ("greedy", 0), ("sort", 64), ("greedy", 64)]
    tasks = [Task("permutation", "none, g64", spec=base)]
    for method, rows in orders:
        spec = {"format": "permuted", "method": method, "block_rows": rows, "base": base}
        tasks.append(Task("permutation", f"{method}, {'one order' if not rows else 'per 64 rows'}, g64", spec=spec))
    tasks.append(Task("permutation", "none, g57 (bytes of one order)", spec=vectors(2, 6, 57)))
    tasks.append(Task("permutation", "none, g26 (bytes of orders per 64 rows)", spec=vectors(2, 6, 26)))
    return tasks


def _make(model: str, text: Path, windows: int | None, device: str) -> Lab:
    return Lab(model, text, device, windows)


def _run(task: Task, latest: float | None) -> Arm | None:
    """In a worker process."""
    if latest is not None and time.time() > latest:
        return None
    return Workers.state.arm(task.name, task.format_of(Workers.state.infos), kl=False)


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/data_free.json", jobs=True)
    lab = Lab(args.model, args.text, args.device, args.windows)
    original = original_of(lab, args)
    singles = [Task(family, label(spec), spec=spec) for family, specs in SINGLE.items() for spec in specs]
    others = [Task("recipes", name, recipe=name) for name in RECIPES]
    others += [Task("budget", f"--bits {bits:g}", budget=bits) for bits in BUDGETS]
    others += permutation_tasks(lab.infos)
    pairs = ranked_tasks(lab.infos)
    wanted = [task for task in singles + others if asked_for(args, task.group, task.name)]
    pairs = [pair for pair in pairs if asked_for(args, pair[0].group, pair[0].name)]
    tasks = wanted + [task for pair in pairs for task in pair]
    arms = finished(args.output) if args.resume else {}
    earlier = earlier_runs(args.output, args.resume)

    def keep() -> None:
        """After every arm: a run that is cut short has lost nothing."""
        mixed = [arms[key(same)] for _, same in pairs if key(same) in arms and same.group.startswith("codebook")]
        same_of = {key(task): arms.get(key(same)) or nearest_below(same, mixed) for task, same in pairs}
        shown = [task for task in wanted + [task for task, _ in pairs] if key(task) in arms]
        rows = [_row(task, arms[key(task)], same_of.get(key(task))) for task in shown]
        mixtures = [{"group": same.group, **asdict(arms[key(same)])} for _, same in pairs if key(same) in arms]
        left_out = [task.name for task in tasks if key(task) not in arms]
        command = "python benchmarks/data_free.py --model MODEL --data-dir DATA --jobs N"
        content = {"jobs": args.jobs, "left_out": left_out, "arms": rows, "mixtures": mixtures}
        save(args.output, lab, command, original, earlier, **content)

    make = functools.partial(_make, args.model, args.text, args.windows)
    run = functools.partial(_run, latest=args.deadline and begun + args.deadline)
    with Workers(args.jobs, args.device, make) as pool:
        open_tasks = {pool.submit(run, task): task for task in tasks if key(task) not in arms}
        for future in concurrent.futures.as_completed(open_tasks):
            if (arm := future.result()) is not None:
                arms[key(open_tasks[future])] = replace(arm, run=len(earlier))
                keep()
    keep()


def nearest_below(same: Task, mixed: Sequence[Arm]) -> Arm | None:
    """In place of a mixture that was not measured, that of another family of codebooks with up to 1 % fewer bytes."""
    assert same.budget is not None
    near = [arm for arm in mixed if 0.99 * same.budget <= arm.bits <= same.budget]
    return max(near, key=lambda arm: arm.bits, default=None) if same.group.startswith("codebook") else None


def key(task: Task) -> tuple[str, str]:
    """Tasks hold dicts and cannot be keys themselves."""
    return task.group, task.name


def finished(path: Path) -> dict[tuple[str, str], Arm]:
    """Arms of an earlier run that was cut short."""
    if not path.is_file():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Arm)}
    rows = result["arms"] + result.get("mixtures", [])
    return {(row["group"], row["name"]): Arm(**{k: v for k, v in row.items() if k in names}) for row in rows}


def _row(task: Task, arm: Arm, same: Arm | None) -> dict[str, Any]:
    spec = to_spec(from_spec(task.spec)) if task.spec else None
    beside = {"bits": same.bits, "perplexity": same.perplexity} if same else None
    return {"group": task.group, "format": spec, "recipe": task.recipe, **asdict(arm), "same_bytes": beside}


if __name__ == "__main__":
    main()
