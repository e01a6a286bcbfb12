"""What tuning gives at 2 to 3 bits: block-wise, end to end, what trains, which loss, which rank at equal bytes.

    python benchmarks/tune.py --model MODEL --data-dir DATA --work FOLDER --jobs N

Bases are compressed with calibration (c4/c4-train-sample.jsonl) into FOLDER once and tuned from there. Text for tuning:
a mix of DATA/tune and C4, of which Wikipedia is a third at most. Scored on WikiText-2 raw test, all windows, context
2,048; early stopping on WikiText-2 raw validation. Writes results/tune.json after every arm; --resume keeps the arms
that are there. --tokens sets the length of all arms but those of group `length`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lab import Lab, Workers, arguments, save

import reallm
from reallm.artifact import read_ledger
from reallm.errors import ReallmError
from reallm.evaluate.measure import measure
from reallm.formats import to_spec
from reallm.formats.waist import from_spec
from reallm.model.text import load_text

C4 = ("c4", "c4-train-sample.jsonl")
PLAIN = (
    "sample_arxiv1.jsonl sample_book2.jsonl sample_cc1.jsonl sample_cc2.jsonl sample_stackexchange1.jsonl "
    "austen-emma.txt carroll-alice.txt chesterton-brown.txt"
).split()
SEVERAL = "residual,scales,gains,codebooks,norms"


def every(base: dict[str, Any]) -> dict[str, Any]:
    """Compression of all block matrices in one format, as a recipe."""
    return {"rules": [{"match": "*", "format": base}]}


def gain(base: dict[str, Any]) -> dict[str, Any]:
    return {"format": "gain", "base": base}


def trellis(bits: int) -> dict[str, Any]:
    return gain({"format": "rotated", "base": {"format": "trellis", "bits": bits}})


def vectors(index_bits: int = 8, vector_dim: int = 4) -> dict[str, Any]:
    return {"format": "codebook", "index_bits": index_bits, "vector_dim": vector_dim}


def budget(bits: float, rank: int | None = None) -> dict[str, Any]:
    return {"bits": bits, "objective": "guided", **({} if rank is None else {"rank": rank})}


# Name -> settings of reallm.compress; a dict under `recipe` is written to a file. Calibration is added to all.
BASES: dict[str, dict[str, Any]] = {
    "bits 2": budget(2.0),
    "bits 2.5": budget(2.5),
    "bits 3": budget(3.0),
    "gain, trellis 2": {"recipe": every(trellis(2)), "objective": "guided"},
    "gain, trellis 3": {"recipe": every(trellis(3)), "objective": "guided"},
    "gain, codebook d=4": {"recipe": every(gain(vectors())), "objective": "guided"},
    "gain, additive": {"recipe": every(gain({"format": "additive", "scales": "two_level"}))},
    "gain, entropy 2": {"recipe": every(gain({"format": "entropy_coded", "bits": 2.0})), "objective": "guided"},
    "reallm-vq": {"recipe": every({"format": "low_rank_plus", "rank": 32, "base": vectors()})},
    **{f"bits 3, rank {rank}": budget(3.0, rank) for rank in (8, 16, 32)},
    **{f"bits 4, rank {rank}": budget(4.0, rank) for rank in (0, 8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Task:
    """One arm: a base, and how it is tuned; no settings at all score the base itself."""

    group: str
    name: str
    base: str
    settings: dict[str, Any] = field(default_factory=dict)


def methods(base: str) -> list[Task]:
    group = f"methods, {base}"
    arms = {"before": {}} | {name: {"method": name} for name in ("blockwise", "end-to-end", "both")}
    return [Task(group, name, base, settings) for name, settings in arms.items()]


def end_to_end(group: str, base: str, **arms: dict[str, Any]) -> list[Task]:
    return [Task(group, name.replace("_", " "), base, {"method": "end-to-end", **s}) for name, s in arms.items()]


VECTORS, TRELLIS, PUBLISHED = "gain, codebook d=4", "gain, trellis 2", "reallm-vq"
# In this order, so that a run that is cut short has the arms of interest.
TASKS: list[Task] = [
    *methods("bits 2"),
    *methods("bits 2.5"),
    *methods("bits 3"),
    *methods(TRELLIS),
    *methods(VECTORS),
    *end_to_end("rate, codebook", VECTORS, **{str(r): {"learning_rate": r} for r in (3e-4, 1e-3, 3e-3, 1e-2)}),
    *end_to_end("rate, trellis", TRELLIS, **{str(r): {"learning_rate": r} for r in (3e-4, 1e-3, 3e-3, 1e-2)}),
    *end_to_end(
        "what trains, codebook", VECTORS, **{w: {"train": w} for w in ("norms", "gains", "scales", "codebooks")}
    ),
    *[
        Task("block rate", str(rate), VECTORS, {"method": "blockwise", "block_learning_rate": rate})
        for rate in (1e-3, 5e-3, 2e-2)
    ],
    *end_to_end("what trains, trellis", TRELLIS, **{w: {"train": w} for w in ("norms", "gains", "scales")}),
    *end_to_end("what trains, rank 32", PUBLISHED, **{w: {"train": w} for w in ("norms", "residual", SEVERAL)}),
    *end_to_end("loss", VECTORS, kl={"loss": "kl"}, ce={"loss": "ce"}, mix={"loss": "mix"}, top_64={"top_k": 64}),
    *end_to_end("rounding", VECTORS, every_step={}, at_the_end={"round_at_end": True}),
    *[Task("target", t, VECTORS, {"method": "blockwise", "target": t}) for t in ("original", "compressed")],
    *end_to_end("length", VECTORS, **{f"{m} M": {"tokens": m * 1_000_000} for m in (1, 2, 4, 8)}),
    *[Task("rank at 3 bits", base, base, s) for base in ("bits 3", *(f"bits 3, rank {r}" for r in (8, 16, 32)))
      for s in ({}, {"method": "both"})],
    *[Task("rank at 4 bits", f"bits 4, rank {r}", f"bits 4, rank {r}", s) for r in (0, 8, 16, 32, 64)
      for s in ({}, {"method": "both"})],
    *methods("gain, trellis 3"),
    *methods("gain, additive"),
    *methods("gain, entropy 2"),
    *methods(PUBLISHED),
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One measured arm: true bits, test perplexity, and how the tuning went."""

    key: str
    bits: float
    nbytes: int
    perplexity: float
    kl: float | None
    top1: float | None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)  # step, loss


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    model: str
    data: Path
    work: Path
    device: str
    windows: int | None
    sizes: dict[str, int]

    def compress(self, name: str) -> str | None:
        """Make a base unless it is there; what was wrong, if it cannot be made."""
        out = self.base(name)
        if out.is_dir():
            return None
        settings = dict(BASES[name])
        if isinstance(settings.get("recipe"), dict):
            path = out.with_suffix(".yaml")
            path.write_text(json.dumps(settings["recipe"]), encoding="utf-8")  # JSON is YAML
            settings["recipe"] = str(path)
        calibration = {"calibration": (str(self.data.joinpath(*C4)),), "calibration_windows": self.sizes["calibration"]}
        calibration["calibration_context"] = self.sizes["calibration_context"]
        try:
            reallm.compress(self.model, out, device=self.device, resume=True, **calibration, **settings)
        except ReallmError as error:
            return str(error)
        return None

    def base(self, name: str) -> Path:
        return self.work / re.sub(r"[^a-z0-9.]+", "-", name)

    def run(self, task: Task) -> Arm:
        """Tune and score."""
        if not task.settings:
            return self.score(task, self.base(task.base), 0.0, 0, None)
        out = self.base(f"{task.group}-{task.name}-tuned")
        shutil.rmtree(out, ignore_errors=True)
        settings = {
            "text": (str(self.work / "mix.jsonl"),),
            "validation": (str(self.data / "wikitext2-raw" / "wiki.valid.raw"),),
            "reference": self.model,
            "device": self.device,
            **{key: self.sizes[key] for key in ("tokens", "context", "batch", "block_windows", "validation_windows")},
            **task.settings,
        }
        settings["train"] = tuple(settings.get("train", SEVERAL).split(","))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        tuned = reallm.tune(self.base(task.base), out, **settings)
        seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        arm = self.score(task, out, seconds, peak, tuned)
        shutil.rmtree(out)
        return arm

    def score(self, task: Task, folder: Path, seconds: float, peak: int, tuned: Any) -> Arm:
        text = self.data / "wikitext2-raw" / "wiki.test.raw"
        options = {"max_windows": self.windows, "context": self.sizes["test_context"], "batch_size": 4}
        found = measure(str(folder), text, reference=self.model, device=self.device, dtype="float32", **options)
        ledger = read_ledger(folder)
        curve = [[e["step"], e["loss"]] for e in tuned.events if e["phase"] == "end-to-end"] if tuned else []
        arm = Arm(
            key_of(task),
            ledger.bits_per_weight,
            ledger.total_bytes,
            found["perplexity"],
            found["kl"],
            found["top1"],
            seconds,
            peak,
            tuned.counts if tuned else {},
            {"end_to_end": tuned.end_to_end, "blocks": _block_errors(tuned)} if tuned else {},
            curve[:: max(1, len(curve) // 50)],
        )
        figures = f"{arm.bits:7.4f} b  ppl {arm.perplexity:9.3f}  KL {arm.kl:7.4f}  {seconds:7.1f} s"
        print(f"{arm.key:60s} {figures}", flush=True)
        return arm


def key_of(task: Task) -> str:
    return f"{task.group} | {task.name}" + (" | before" if not task.settings and task.name != "before" else "")


def _block_errors(tuned: Any) -> list[list[float]]:
    """(before, least after) of each block."""
    errors: dict[int, list[float]] = {}
    for event in tuned.events:
        if event["phase"] == "block" and "validation" in event:
            errors.setdefault(event["block"], []).append(event["validation"])
    return [[found[0], min(found)] for found in errors.values()]


def mixed_text(data: Path, path: Path) -> None:
    """Documents of all sources in turn; Wikipedia, without its <doc> lines, is cut to half of the rest."""
    sources = [list(load_text(data / "tune" / name)) for name in PLAIN if (data / "tune" / name).is_file()]
    sources.append(list(load_text(data.joinpath(*C4))))
    rest = sum(len(document) for documents in sources for document in documents)
    sources.append(list(_wikipedia(data / "tune", rest // 2)))
    with path.open("w", encoding="utf-8") as file:
        for documents in sources:
            for document in documents:
                file.write(json.dumps({"text": document}) + "\n")


def _wikipedia(folder: Path, most: int) -> Iterator[str]:
    for file in sorted(folder.glob("AA_wiki_*.txt")):
        for article in re.split(r"^</doc>\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            text = re.sub(r"^<doc .*>\n", "", article, flags=re.MULTILINE).strip()
            if text and (most := most - len(text)) >= 0:
                yield text


def _compress(name: str) -> str | None:
    """In a worker process."""
    return Workers.state.compress(name)


def _run(task: Task, latest: float | None) -> Arm | None:
    """In a worker process."""
    return None if latest is not None and time.time() > latest else Workers.state.run(task)


def bench_of(model: str, data: Path, work: Path, windows: int | None, sizes: dict[str, int], device: str) -> Bench:
    return Bench(model, data, work, device, windows, sizes)


def finished(path: Path) -> dict[str, Arm]:
    """Arms of an earlier run that was cut short."""
    if not path.is_file():
        return {}
    names = {f.name for f in fields(Arm)}
    rows = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return {row["key"]: Arm(**{k: v for k, v in row.items() if k in names}) for row in rows}


def _more(parser: Any) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder for bases and text; kept")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of end-to-end tuning")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block-windows", type=int, default=128)
    parser.add_argument("--validation-windows", type=int, default=16)
    parser.add_argument("--test-context", type=int, default=2048)


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/tune.json", jobs=True, calibration=True, more=_more)
    args.work.mkdir(parents=True, exist_ok=True)
    mixed_text(args.data_dir, args.work / "mix.jsonl")
    sizes = {"calibration": args.calibration_windows, "calibration_context": args.calibration_context}
    for key in ("tokens", "context", "batch", "block_windows", "validation_windows", "test_context"):
        sizes[key] = getattr(args, key)
    lab = Lab(args.model, args.text, args.device, args.windows, args.test_context)
    original = lab.evaluate(kl=False)
    arms = finished(args.output) if args.resume else {}
    failed: dict[str, str] = {}

    def keep() -> None:
        done = [(task, arms[key_of(task)]) for task in TASKS if key_of(task) in arms]
        rows = [{"group": t.group, "base": t.base, "settings": t.settings, **asdict(arm)} for t, arm in done]
        command = "python benchmarks/tune.py --model MODEL --data-dir DATA --work FOLDER --jobs N"
        left_out = [key_of(task) for task in TASKS if key_of(task) not in arms]
        bases = {name: _plain(settings) for name, settings in BASES.items()}
        save(args.output, lab, command, original, sizes=sizes, jobs=args.jobs, bases=bases, failed=failed,
             left_out=left_out, arms=rows)  # fmt: skip

    todo = [task for task in TASKS if key_of(task) not in arms and (not args.groups or task.group in args.groups)]
    make = functools.partial(bench_of, args.model, args.data_dir, args.work, args.windows, sizes)
    run = functools.partial(_run, latest=args.deadline and begun + args.deadline)
    with Workers(args.jobs, args.device, make) as pool:
        making = {pool.submit(_compress, name): name for name in dict.fromkeys(task.base for task in todo)}
        tuning: dict[concurrent.futures.Future, Task] = {}
        for future in concurrent.futures.as_completed(making):
            if problem := future.result():
                failed[making[future]] = problem
            else:
                tuning |= {pool.submit(run, task): task for task in todo if task.base == making[future]}
        for future in concurrent.futures.as_completed(tuning):
            try:
                arm = future.result()
            except ReallmError as error:
                failed[key_of(tuning[future])] = str(error)
                continue
            if arm is not None:
                arms[arm.key] = arm
                keep()
    keep()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Formats with all their fields."""
    if not isinstance(recipe := settings.get("recipe"), dict):
        return settings
    return {**settings, "recipe": [to_spec(from_spec(rule["format"])) for rule in recipe["rules"]]}


if __name__ == "__main__":
    main()
