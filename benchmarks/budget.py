"""One budget for the whole file: formats by matrix, the best fixed choice at the same bytes, and what each part adds.

    python benchmarks/budget.py --model MODEL --data-dir DATA --work FOLDER --jobs N

Plans and artifacts come from `reallm.pipeline` as `reallm compress --bits` and `--size` make them, calibrated on
c4/c4-train-sample.jsonl; no tuning. The analysis is made once, kept in FOLDER and shared by all arms. Perplexity and KL
to the original on WikiText-2 raw test, or on `--text wiki.valid.raw` where something is still to be chosen.
`--groups factors` compresses one role at a time and writes FOLDER/factors.json, which `--corrections` takes.
Writes results/budget.json after every arm; --resume keeps the arms that are there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lab import Lab, Workers, arguments, asked_for, earlier_runs, original_of, save

from reallm.allocate import Choice, Problem
from reallm.allocate.candidates import calibrated_candidates
from reallm.allocate.options import find_option, parse_size
from reallm.calibrate.loss_gradients import Guidance, guidance
from reallm.checkpoint import read_ledger
from reallm.errors import ReallmError
from reallm.evaluate.perplexity import evaluate
from reallm.formats import WeightFormat, from_spec, to_spec
from reallm.formats.codebook import Codebook
from reallm.formats.permuted import Permuted
from reallm.formats.uniform import Uniform
from reallm.hf import load
from reallm.pipeline import Job, Settings, prepare, run
from reallm.pipeline import teacher_outputs as of_original

C4 = ("c4", "c4-train-sample.jsonl")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Task:
    """One arm. `settings` of reallm.compress; `candidates` by their name below; `made` by whom a recipe is."""

    group: str
    name: str
    settings: dict[str, Any]
    candidates: str = "all"
    made: str = "solver"  # or fixed, by role, alone

    @property
    def key(self) -> str:
        return f"{self.group} | {self.name}"


def _named(words: str) -> Callable[[WeightFormat], bool]:
    return lambda fmt: re.fullmatch(words, _chain(fmt)) is not None


def _chain(fmt: WeightFormat) -> str:
    names = [fmt.name]
    while (base := getattr(fmt, "base", None)) is not None:
        names.append(base.name)
        fmt = base
    return " ".join(names)


# Which of the candidates of embedding and head a choice has.
ENDS: dict[str, Callable[[WeightFormat], bool]] = {"ends without residuals": _named(r"(?!low_rank_plus).*")}
# Which of the candidates of block matrices a choice has.
CANDIDATES: dict[str, Callable[[WeightFormat], bool]] = {
    "without scales around": _named(r"(?!scaled).*"),
    "without entropy-coded formats": _named(r"(?!.*entropy_coded).*"),
    "trellis, scaled or not": _named(r"(scaled )?rotated trellis"),
    "rotated trellis": _named(r"rotated trellis"),
    "without rotation": _named(r"(?!.*rotated).*"),
}
CODEBOOKS = [
    Codebook(index_bits=i, vector_dim=d, group_size=64) for d, i in ((4, 8), (4, 9), (4, 10), (2, 5), (2, 6), (2, 7))
]
LISTS: dict[str, list[WeightFormat]] = {
    "codebooks": CODEBOOKS,
    "codebooks, permuted": [Permuted(base=fmt) for fmt in CODEBOOKS],
}


def adaptive(
    goal: dict[str, Any], group: str, name: str = "chosen by matrix", candidates: str = "all", **more: Any
) -> Task:
    return Task(group, name, {"objective": "guided", **goal, **more}, candidates)


BITS = {f"{bits:g} bits": {"bits": bits} for bits in (2.0, 2.5, 3.0)}
SIZES = {f"{mb} MB": {"size": mb * 10**6} for mb in (60, 50, 80, 40)}
GOALS = BITS | SIZES
MIDDLE, FILE = GOALS["2.5 bits"], GOALS["60 MB"]
EIGHT = to_spec(Uniform(bits=8, symmetric=True))

# In this order, so that a run that is cut short has the arms of interest.
TASKS: list[Task] = [
    *[adaptive(goal, group) for group, goal in GOALS.items()],
    *[adaptive(goal, group, f"of {name}", name) for name in ENDS for group, goal in SIZES.items()],
    *[dataclasses.replace(adaptive(goal, group, "one format"), made="fixed") for group, goal in GOALS.items()],
    dataclasses.replace(adaptive(MIDDLE, "2.5 bits", "one format a role"), made="by role"),
    dataclasses.replace(adaptive(FILE, "60 MB", "one format a role"), made="by role"),
    *[adaptive(MIDDLE, "2.5 bits", f"of {name}", name) for name in CANDIDATES],
    adaptive(MIDDLE, "2.5 bits", "fits by outputs", objective="outputs"),
    adaptive(FILE, "60 MB", "without coding of stored tensors", coding=False),
    adaptive(FILE, "60 MB", "embedding in 8 bits", embedding=EIGHT),
    adaptive(FILE, "60 MB", "of without entropy-coded formats", "without entropy-coded formats"),
    adaptive(FILE, "60 MB", "fits by outputs", objective="outputs"),
    adaptive(MIDDLE, "2.5 bits", "analysis of 16 windows of 1,024", analysis_windows=16, analysis_context=1024),
    *[adaptive(MIDDLE, "2.5 bits", f"of {name}", name) for name in LISTS],
    adaptive(MIDDLE, "2.5 bits", "residual of rank 8 everywhere", "rotated trellis", rank=8),
    *[Task("factors", role, {"objective": "guided"}, made="alone") for role in ROLES],
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What was planned, what came of it, and where the seconds went."""

    key: str
    bits: float
    nbytes: int
    perplexity: float
    kl: float
    top1: float
    predicted: float | None  # KL, nats per token
    seconds: dict[str, float]
    peak_memory_bytes: int
    formats: dict[str, dict[str, int]] = field(default_factory=dict)  # matrices by role and format
    run: int = 0


class _Remembered:
    """`guidance`, which is one for all arms of a process: the windows are, and the original model is."""

    def __init__(self) -> None:
        self.found: dict[str, Guidance] = {}

    def __call__(
        self, model: Any, windows: Any, matrices: Sequence[Any], device: Any, told: Any = None
    ) -> dict[str, Guidance]:
        new = [matrix for matrix in matrices if matrix.name not in self.found]
        if new:
            self.found |= guidance(model, windows, new, device, told)
        return {matrix.name: self.found[matrix.name] for matrix in matrices if matrix.name in self.found}


@dataclass(frozen=True)
class Bench:
    """A worker's lab, and what all arms share."""

    model: str
    lab: Lab
    work: Path
    device: str
    shared: dict[str, Any]  # settings of every arm
    corrections: Path | None
    keep: bool = False  # artifacts, once they are scored

    def settings(self, task: Task) -> Settings:
        """With the candidates of the task beside what corrections there are."""
        values = {"device": self.device, **self.shared, **task.settings}
        found = json.loads(self.corrections.read_text(encoding="utf-8")) if self.corrections else {}
        if some := self._candidates(task):
            found = found | {"candidates": {kind: [to_spec(fmt) for fmt in some[kind]] for kind in some}}
        if found:
            values["corrections"] = str(self._written(task, "corrections", found))
        return Settings(**values)

    def _candidates(self, task: Task) -> dict[str, list[WeightFormat]]:
        """By the kinds of matrices that do not have all of theirs."""
        if task.candidates in LISTS:
            return {"block": LISTS[task.candidates]}
        if task.candidates in ENDS:
            return {kind: self._some(kind, ENDS[task.candidates]) for kind in ("embedding", "head")}
        if task.candidates in CANDIDATES:
            return {"block": self._some("block", CANDIDATES[task.candidates])}
        return {}

    def _some(self, kind: str, wanted: Callable[[WeightFormat], bool]) -> list[WeightFormat]:
        return [fmt for fmt in calibrated_candidates(kind, self.shared.get("state_bits") or 16) if wanted(fmt)]

    def _written(self, task: Task, what: str, content: Any) -> Path:
        path = self.work / f"{_slug(task.key)}-{what}.json"
        path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
        return path

    def job(self, task: Task) -> Job:
        """What the arm will make."""
        if task.made == "solver":
            return prepare(self.model, self.settings(task))
        if task.made == "alone":
            rules = [{"role": [task.name], "format": to_spec(self._trellis(2))}, {"match": "*", "format": "keep"}]
            return self._by_recipe(task, {"rules": rules, "embedding": "keep", "head": "keep"})
        chosen = prepare(self.model, self.settings(task))
        rules = _fixed(chosen, self._ladder()) if task.made == "fixed" else _by_role(chosen)
        ends = {e.matrix.kind: to_spec(e.fmt) for e in chosen.plan.entries if e.matrix.kind != "block"}
        return self._by_recipe(task, {"rules": rules, **ends, "coding": chosen.coding})

    def _by_recipe(self, task: Task, recipe: dict[str, Any]) -> Job:
        kept = {k: v for k, v in task.settings.items() if k not in ("bits", "size")}
        path = self._written(task, "recipe", recipe)
        return prepare(self.model, Settings(**{"device": self.device, **self.shared, **kept, "recipe": str(path)}))

    def _trellis(self, bits: int) -> WeightFormat:
        trellis = {"format": "trellis", "bits": bits, "state_bits": self.shared.get("state_bits") or 16}
        return from_spec({"format": "rotated", "base": trellis})

    def _ladder(self) -> list[WeightFormat]:
        """The strongest format of one rate everywhere, by falling error."""
        return [*(self._trellis(bits) for bits in (1, 2, 3, 4)), *(Uniform(bits=b, symmetric=True) for b in (5, 6, 8))]

    def run(self, task: Task) -> Arm:
        """Plan, compress and score."""
        out = self.work / _slug(task.key)
        for left in (out, out.with_name(out.name + ".work")):
            shutil.rmtree(left, ignore_errors=True)
        if self.lab.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [time.perf_counter()]
        job = self.job(task)
        times.append(time.perf_counter())
        run(job, out)
        times.append(time.perf_counter())
        model = load(out, device=None if self.lab.device.type == "cpu" else self.lab.device, dtype=torch.float32)
        found = evaluate(
            model, self.lab.tokens, self.lab.context, bos=self.lab.bos, max_windows=self.lab.max_windows,
            reference=self.lab.reference, batch_size=4 if self.lab.device.type == "cuda" else 1,
        )  # fmt: skip
        times.append(time.perf_counter())
        ledger = read_ledger(out)
        formats: dict[str, Counter] = defaultdict(Counter)
        for entry in job.plan.entries:
            formats[entry.matrix.role][json.dumps(to_spec(entry.fmt))] += 1
        arm = Arm(
            task.key, ledger.bits_per_weight, ledger.total_bytes, found.perplexity, found.kl, found.top1,
            self._predicted(task, job),
            {name: b - a for name, a, b in zip(("plan", "fit", "measure"), times, times[1:], strict=False)},
            torch.cuda.max_memory_allocated() if self.lab.device.type == "cuda" else 0,
            {role: dict(of) for role, of in formats.items()},
        )  # fmt: skip
        if not self.keep:
            shutil.rmtree(out)
        seconds = " + ".join(f"{s:.0f}" for s in arm.seconds.values())
        predicted = "" if arm.predicted is None else f" (predicted {arm.predicted:.4f})"
        sizes = f"{arm.bits:7.4f} b {arm.nbytes / 1e6:7.2f} MB"
        print(f"{arm.key:56s} {sizes}  ppl {arm.perplexity:9.3f}  KL {arm.kl:.4f}{predicted}  {seconds} s", flush=True)
        return arm

    def _predicted(self, task: Task, job: Job) -> float | None:
        """Of a recipe too, if all its formats are among the options of the solver."""
        if job.forecast is not None:
            return job.forecast.loss
        goal = task.settings if task.made != "alone" else {**task.settings, **MIDDLE}
        options = prepare(self.model, self.settings(dataclasses.replace(task, settings=goal))).forecast.options
        entries = [entry for entry in job.plan.entries if entry.matrix.kind == "block" or "size" in goal]
        losses = [{o.fmt: o.loss for o in options[entry.matrix.name]}.get(entry.fmt) for entry in entries]
        return None if None in losses else sum(losses)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())


def _blocks(job: Job) -> list[Any]:
    return [entry for entry in job.plan.entries if entry.matrix.kind == "block"]


def _fixed(chosen: Job, ladder: Sequence[WeightFormat]) -> list[dict[str, Any]]:
    """One format everywhere; between two rates whole blocks have one or the other, spread evenly, to the same bytes."""
    entries, options = _blocks(chosen), chosen.forecast.options
    # A trellis of 2 bits is one of 2.0001: without the thousandth a whole block would fall to 1 bit.
    budget = 1.001 * sum(find_option(entry, options).nbytes for entry in entries)
    total = [sum(fmt.nbytes(entry.matrix.shape) for entry in entries) for fmt in ladder]
    low = max((i for i, nbytes in enumerate(total) if nbytes <= budget), default=0)
    high = min(low + 1, len(ladder) - 1)
    share = (budget - total[low]) / (total[high] - total[low]) if high > low else 0.0
    depth = 1 + max(entry.matrix.block for entry in entries)
    better = [b for b in range(depth) if int((b + 1) * share + 1e-9) > int(b * share + 1e-9)]
    rules = [{"block": better, "match": "*", "format": to_spec(ladder[high])}] if better else []
    return [*rules, {"match": "*", "format": to_spec(ladder[low])}]


def _by_role(chosen: Job) -> list[dict[str, Any]]:
    """The best choice with one format for all matrices of a role, at the same bytes."""
    entries, options = _blocks(chosen), chosen.forecast.options
    budget = sum(find_option(entry, options).nbytes for entry in entries)
    names = {role: [e.matrix.name for e in entries if e.matrix.role == role] for role in ROLES}
    rows: list[list[tuple[WeightFormat, Choice]]] = []
    for role in ROLES:
        of_each = [{option.fmt: option for option in options[name]} for name in names[role]]
        common = set.intersection(*(set(of) for of in of_each))
        sums = [(f, sum(of[f].nbytes for of in of_each), sum(of[f].loss for of in of_each)) for f in common]
        rows.append([(fmt, Choice(nbytes, loss)) for fmt, nbytes, loss in sums])
    picked = Problem([[choice for _, choice in row] for row in rows], int(budget)).solve()
    return [
        {"role": [role], "format": to_spec(row[place][0])} for role, row, place in zip(ROLES, rows, picked, strict=True)
    ]


def bench_of(
    model: str,
    text: Path,
    work: Path,
    windows: int | None,
    shared: dict,
    corrections: Path | None,
    keep: bool,
    device: str,
) -> Bench:
    of_original.guidance = _Remembered()
    return Bench(model, Lab(model, text, device, windows), work, device, shared, corrections, keep)


def _run(task: Task, latest: float | None) -> Arm | None:
    """In a worker process."""
    return None if latest is not None and time.time() > latest else Workers.state.run(task)


def finished(path: Path) -> dict[str, Arm]:
    """Arms of an earlier run that was cut short."""
    if not path.is_file():
        return {}
    names = {f.name for f in dataclasses.fields(Arm)}
    rows = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return {row["key"]: Arm(**{k: v for k, v in row.items() if k in names}) for row in rows}


def factors_of(arms: dict[str, Arm]) -> dict[str, float]:
    """Realised loss / predicted loss of each role alone, relative to all of them together."""
    alone = {task.name: arms[task.key] for task in TASKS if task.made == "alone" and task.key in arms}
    alone = {role: arm for role, arm in alone.items() if arm.predicted}
    mean = sum(arm.kl for arm in alone.values()) / max(sum(arm.predicted for arm in alone.values()), 1e-12)
    return {role: round(arm.kl / arm.predicted / mean, 3) for role, arm in alone.items()}


def _more(parser: Any) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder for the analysis and artifacts")
    parser.add_argument("--text", dest="text_name", default="wiki.test.raw", help="wiki.valid.raw: while choosing")
    parser.add_argument("--corrections", type=Path, default=None, help="JSON file as `reallm compress --corrections`")
    parser.add_argument("--analysis-windows", type=int, default=64)
    parser.add_argument("--analysis-context", type=int, default=2048)
    parser.add_argument("--state-bits", type=int, default=None, help="of trellis codes; default 16 on a GPU")
    parser.add_argument("--sizes", nargs="*", default=None, help="in place of 60MB 50MB 80MB 40MB")
    parser.add_argument("--keep", action="store_true", help="leave the artifacts in the work folder")


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/budget.json", jobs=True, calibration=True, more=_more)
    text = args.data_dir / "wikitext2-raw" / args.text_name
    args.work.mkdir(parents=True, exist_ok=True)
    shared = {
        "calibration": (str(args.data_dir.joinpath(*C4)),),
        **{name: getattr(args, name) for name in ("calibration_windows", "calibration_context")},
        **{name: getattr(args, name) for name in ("analysis_windows", "analysis_context", "state_bits")},
        "analysis": str(args.work / "analysis"),
    }
    tasks = _with_sizes(args.sizes)
    if args.groups is None:
        tasks = [task for task in tasks if task.group != "factors"]
    lab = Lab(args.model, text, args.device, args.windows)
    original = original_of(lab, args)
    arms = finished(args.output) if args.resume else {}
    earlier = earlier_runs(args.output, args.resume)
    failed: dict[str, str] = {}
    make = functools.partial(bench_of, args.model, text, args.work, args.windows, shared, args.corrections, args.keep)
    analysing = time.perf_counter()
    todo = [task for task in tasks if task.key not in arms and asked_for(args, task.group, task.name)]
    for objective in ("guided", "outputs"):  # before any arm, so that none of them makes it twice
        wanted = [task for task in todo if task.settings["objective"] == objective]
        if objective == "guided" or wanted:
            device = args.device
            prepare(args.model, Settings(**{"device": device, **shared, "bits": 3.5, "objective": objective}))
        if objective == "guided":
            analysis_seconds = time.perf_counter() - analysing

    def keep() -> None:
        rows = [
            {"group": task.group, "settings": task.settings, "candidates": task.candidates, "made": task.made}
            | asdict(arms[task.key])
            for task in tasks
            if task.key in arms
        ]
        command = "python benchmarks/budget.py --model MODEL --data-dir DATA --work FOLDER --jobs N"
        corrections = json.loads(args.corrections.read_text(encoding="utf-8")) if args.corrections else None
        plain = {k: v for k, v in shared.items() if k not in ("calibration", "analysis")} | {"calibration": C4[-1]}
        left_out = [task.key for task in tasks if task.key not in arms]
        save(args.output, lab, command, original, earlier, shared=plain, corrections=corrections, jobs=args.jobs,
             analysis_seconds=analysis_seconds, failed=failed, left_out=left_out, arms=rows)  # fmt: skip
        if factors := factors_of(arms):
            (args.work / "factors.json").write_text(json.dumps({"factors": factors}, indent=1) + "\n")

    run_one = functools.partial(_run, latest=args.deadline and begun + args.deadline)
    with Workers(args.jobs, args.device, make) as pool:
        running = {pool.submit(run_one, task): task for task in todo}
        for future in concurrent.futures.as_completed(running):
            task = running[future]
            try:
                arm = future.result()
            except ReallmError as error:
                failed[task.key] = str(error)
                print(f"{task.key}: {error}", flush=True)
                continue
            if arm is not None:
                arms[task.key] = dataclasses.replace(arm, run=len(earlier))
                keep()
    keep()


def _with_sizes(words: Sequence[str] | None) -> list[Task]:
    """The tasks; with other sizes for tiny models, the arms of sizes at those alone."""
    if words is None:
        return TASKS
    others = [task for task in TASKS if "size" not in task.settings]
    goals = {word: {"size": parse_size(word)} for word in words}
    sized = [task for task in TASKS if task.group == "60 MB"]
    return others + [
        dataclasses.replace(task, group=word, settings={**task.settings, **goal})
        for word, goal in goals.items()
        for task in sized
    ]


if __name__ == "__main__":
    main()
