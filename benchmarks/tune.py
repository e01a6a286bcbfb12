"""What tuning gives at 2 to 3 bits: block-wise, end to end, what trains, which loss, which rank at equal bytes.

    python benchmarks/tune.py --model MODEL --data-dir DATA --work FOLDER --jobs N --tasks arc_easy,piqa,lambada

Bases are compressed with calibration (c4/c4-train-sample.jsonl) into FOLDER once and tuned from there;
`--base "bits 2=OUT"` takes a compressed model that is there. Text for tuning: a mix of DATA/tune and C4, of which
Wikipedia is a third at most. Scored on WikiText-2 raw test, all windows, context 2,048; early stopping on its raw
validation text, which also scores the groups that choose a setting (`rate`, `block rate`). Arms of group `target` and
named `mix` also write three answers, as the original does, and are scored on `--tasks` with the files in DATA/tasks.
--keep leaves their tuned models in FOLDER.
Writes results/tune.json after every arm; --resume keeps the arms that are there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from lab import Lab, Workers, arguments, asked_for, earlier_runs, original_of, save

import reallm
from reallm.calibrate.text import load_text
from reallm.checkpoint import read_ledger
from reallm.errors import ReallmError
from reallm.evaluate.generation import generate_stream
from reallm.evaluate.measure import measure
from reallm.formats import to_spec
from reallm.formats.base import from_spec
from reallm.formats.gain import Gain
from reallm.formats.rotated import Rotated
from reallm.hf import load, load_tokenizer
from reallm.integrations.lm_eval_tasks import score_tasks
from reallm.pipeline import Settings as PipelineSettings
from reallm.pipeline import prepare, run
from reallm.source import open_source, walk
from reallm.tuning.tune_settings import Settings

C4 = ("c4", "c4-train-sample.jsonl")
PLAIN = (
    "sample_arxiv1.jsonl sample_book2.jsonl sample_cc1.jsonl sample_cc2.jsonl sample_stackexchange1.jsonl "
    "austen-emma.txt carroll-alice.txt chesterton-brown.txt"
).split()
SEVERAL = "residual,scales,gains,codebooks,norms"
TIED = f"{SEVERAL},embedding"  # scales of the embedding, which is the head too
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain in three sentences why the sky is blue.",
)


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


# Of residuals in int8, 0.023 bits a rank: 64 leaves no byte for codes of 2 bits.
RANKS_OF_2_BITS, RANKS_OF_3_BITS = (4, 8, 16, 32), (8, 16, 32, 64)

# Name -> settings of reallm.compress; a dict under `recipe` is written to a file. All are calibrated. `gains`: rotated
# matrices are put into `gain`, for numbers to train, and the budget pays for it (0.023 bits).
BASES: dict[str, dict[str, Any]] = {
    "bits 2": budget(2.0),
    "bits 2.5": budget(2.5),
    "bits 3": budget(3.0),
    "60 MB": {"size": 60_000_000, "objective": "guided"},
    "bits 2, gains": {**budget(2.0), "gains": True},
    "gain, trellis 2": {"recipe": every(trellis(2)), "objective": "guided"},
    "scaled trellis 2": {"recipe": every({"format": "scaled", "base": trellis(2)["base"]})},  # by outputs, no guidance
    "gain, trellis 3": {"recipe": every(trellis(3)), "objective": "guided"},
    "gain, codebook d=4": {"recipe": every(gain(vectors())), "objective": "guided"},
    "gain, additive": {"recipe": every(gain({"format": "additive", "scales": "two_level"}))},
    "gain, entropy 2": {"recipe": every(gain({"format": "entropy_coded", "bits": 2.0})), "objective": "guided"},
    "reallm-vq": {"recipe": every({"format": "low_rank_plus", "rank": 32, "base": vectors()})},
    **{f"bits 2, rank {rank}": budget(2.0, rank) for rank in RANKS_OF_2_BITS},
    **{f"bits 3, rank {rank}": budget(3.0, rank) for rank in RANKS_OF_3_BITS},
}


@dataclass(frozen=True)
class Task:
    """One arm: a base, and how it is tuned; no settings at all score the base itself."""

    group: str
    name: str
    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    gone: bool = False  # measured with an option that lost and is gone: its row is kept, with the commit that has it

    @property
    def chooses(self) -> bool:
        """Whether a setting is chosen by it: scored on validation text."""
        return self.group in ("rate", "block rate", "block error")

    @property
    def writes(self) -> bool:
        """Whether samples are written and tasks scored."""
        return self.group == "target" or self.name == "mix"


# Errors of outputs, all alike: what `both` was measured with first, then towards the original's own hidden states.
BACK = {"method": "blockwise", "block_error": "outputs"}
METHODS: dict[str, dict[str, Any]] = {
    "before": {},
    "blockwise": {"method": "blockwise"},
    "end-to-end": {"method": "end-to-end"},
    "both": {**BACK, "method": "both"},
    "blocks first": {"method": "both"},
}


def rated(rate: float, windows: int) -> dict[str, Any]:
    return {"method": "blockwise", "block_learning_rate": rate, "block_windows": windows}


def methods(group: str, base: str, *names: str) -> list[Task]:
    return [Task(group, f"{base}, {name}", base, METHODS[name]) for name in ("before", *names)]


def end_to_end(group: str, base: str, **arms: dict[str, Any]) -> list[Task]:
    return [Task(group, name.replace("_", " "), base, {"method": "end-to-end", **s}) for name, s in arms.items()]


THREE = ("bits 2", "bits 2.5", "bits 3")
VECTORS, TRELLIS, PUBLISHED = "gain, codebook d=4", "gain, trellis 2", "reallm-vq"
# In this order, so that a run that is cut short has the arms of interest. KL, all parts and rank 0 at 3 bits stand in
# `target`.
TASKS: list[Task] = [
    *[
        task
        for base in ("bits 2", "bits 2, gains", "60 MB", "bits 2.5", "bits 3")
        for task in methods("target", base, "both", "end-to-end")
    ],
    *end_to_end("rate", "bits 2", **{str(r): {"learning_rate": r} for r in (1e-3, 3e-3, 1e-2, 3e-4)}),
    Task("block rate", "before", "bits 2"),
    *[
        Task("block rate", f"{rate}, outputs", "bits 2", {**BACK, "block_learning_rate": rate})
        for rate in (5e-3, 2e-2, 1e-3)
    ],
    *[Task("block rate", f"{rate}, channels", "bits 2", gone=True) for rate in (5e-3, 2e-2)],
    Task("block error", "scaled trellis 2, before", "scaled trellis 2"),
    *[
        Task(
            "block error",
            f"{base}, {error}, {target}",
            base,
            {"method": "blockwise", "block_error": error},
            gone=error not in ("loss", "outputs") or target == "original",
        )
        for base in ("bits 2", "scaled trellis 2")
        for target in ("original", "compressed")
        for error in ("loss", "outputs", "channels", "directions")
    ],
    *[
        Task("block error", f"bits 2, loss, {rate}, {windows} windows", "bits 2", rated(rate, windows))
        for rate, windows in ((3e-4, 128), (3e-3, 128), (1e-3, 512), (3e-3, 512))
    ],
    *end_to_end("loss", "bits 2", ce={"loss": "ce"}, mix={"loss": "mix"}, top_64={"top_k": 64}),
    *end_to_end("embedding too", "bits 2", kl={"train": TIED}, mix={"train": TIED, "loss": "mix"}),
    *[task for r in RANKS_OF_2_BITS for task in methods("rank at 2 bits", f"bits 2, rank {r}", "end-to-end")],
    *[task for r in RANKS_OF_3_BITS for task in methods("rank at 3 bits", f"bits 3, rank {r}", "end-to-end")],
    *end_to_end("what trains, bits 2", "bits 2", **{w: {"train": w} for w in ("norms", "scales")}),
    *[Task("block-wise alone", f"{base}, channels, original", base, gone=True) for base in THREE],
    *[task for base in THREE for task in methods("block-wise alone", base, "blockwise", "blocks first")[1:]],
    *end_to_end("length", "bits 2", **{f"{m} M": {"tokens": m * 1_000_000} for m in (1, 4, 8)}),
    *end_to_end(
        "length",
        "bits 2",
        **{f"8 M, {loss}": {"loss": loss, "tokens": 8_000_000, "learning_rate": 5e-3} for loss in ("mix", "ce")},
    ),
    Task("rounding", "at the end", "bits 2", gone=True),
    *[task for base in (TRELLIS, VECTORS, PUBLISHED) for task in methods("one format", base, "blocks first")],
    *end_to_end(
        "what trains, codebook", VECTORS, **{w: {"train": w} for w in ("norms", "gains", "scales", "codebooks")}
    ),
    *end_to_end("what trains, rank 32", PUBLISHED, **{w: {"train": w} for w in ("norms", "residual", SEVERAL)}),
    *[
        task
        for base in ("gain, trellis 3", "gain, additive", "gain, entropy 2")
        for task in methods("one format", base, "blocks first")
    ],
]


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
    tokens_per_second: float | None = None  # of the last step end to end
    tokens: int | None = None  # of tuning end to end
    learning_rate: float | None = None  # of tuning end to end
    batch: int | None = None  # windows per step
    checkpointing: bool | None = None  # whether blocks ran twice, which takes time and spares memory
    text: str = "wiki.test.raw"
    samples: list[dict[str, str]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    run: int = 0  # which of the file's runs measured it


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    model: str
    data: Path
    work: Path
    device: str
    windows: int | None
    sizes: dict[str, int]
    rates: dict[str, float]  # for arms that name none
    given: dict[str, Path]  # bases that are there
    tasks: tuple[str, ...]
    limit: int | None
    keep: bool
    checkpointing: bool = True

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
        gains = settings.pop("gains", False)
        try:
            if gains:
                self._compress_with_gains(out, settings | calibration)
            else:
                reallm.compress(self.model, out, device=self.device, resume=True, **calibration, **settings)
        except ReallmError as error:
            return str(error)
        return None

    def _compress_with_gains(self, out: Path, settings: dict[str, Any]) -> None:
        blocks = [matrix for matrix in walk(open_source(self.model).skeleton).matrices if matrix.kind == "block"]
        spent = 2 * sum(matrix.shape[0] for matrix in blocks)
        if "size" in settings:
            settings["size"] -= spent + 250 * len(blocks)  # and what names them in headers and config
        else:
            settings["bits"] -= 8 * spent / sum(matrix.shape[0] * matrix.shape[1] for matrix in blocks)
        job = prepare(self.model, PipelineSettings(device=self.device, **settings))
        entries = [replace(e, fmt=Gain(e.fmt)) if isinstance(e.fmt, Rotated) else e for e in job.plan.entries]
        run(replace(job, plan=replace(job.plan, entries=tuple(entries)), forecast=None), out, True)

    def base(self, name: str) -> Path:
        return self.given.get(name) or self.work / re.sub(r"[^a-z0-9.]+", "-", name.lower())

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
            "checkpointing": self.checkpointing,
            **self.rates,
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
        if settings["method"] != "blockwise":
            rate = settings.get("learning_rate", Settings.learning_rate)
            how = {key: settings[key] for key in ("tokens", "batch", "checkpointing")}
            arm = replace(arm, learning_rate=rate, **how)
        if not (self.keep and task.writes):
            shutil.rmtree(out)
        return arm

    def score(self, task: Task, folder: Path, seconds: float, peak: int, tuned: Any) -> Arm:
        text = self.data / "wikitext2-raw" / ("wiki.valid.raw" if task.chooses else "wiki.test.raw")
        options = {"max_windows": self.windows, "context": self.sizes["test_context"], "batch_size": 4}
        found = measure(str(folder), text, reference=self.model, device=self.device, dtype="float32", **options)
        ledger = read_ledger(folder)
        steps = [e for e in tuned.events if e["phase"] == "end-to-end" and "loss" in e] if tuned else []
        curve = [[e["step"], e["loss"]] for e in steps]
        samples, tasks = self.written(folder) if task.writes else ([], [])
        arm = Arm(
            fit_key(task),
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
            steps[-1]["tokens_per_second"] if steps else None,
            text=text.name,
            samples=samples,
            tasks=tasks,
        )
        figures = f"{arm.bits:7.4f} b  ppl {arm.perplexity:9.3f}  KL {arm.kl:7.4f}  {seconds:7.1f} s"
        print(f"{arm.key:60s} {figures}", flush=True)
        return arm

    def written(self, model: str | Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
        """(answers to three questions, each its likeliest; figures of tasks)."""
        tokenizer, loaded = load_tokenizer(model), load(model, device=self.device, dtype=torch.float32)
        chat = getattr(tokenizer, "chat_template", None) is not None
        samples = [
            {"prompt": p, "answer": "".join(generate_stream(loaded, tokenizer, p, max_new_tokens=128, chat=chat))}
            for p in PROMPTS
        ]
        del loaded
        if not self.tasks:
            return samples, []
        options = {"limit": self.limit, "batch_size": 64, "device": self.device, "dtype": "float32"}
        return samples, score_tasks(str(model), self.tasks, data=self.data / "tasks", **options)["tasks"]


def fit_key(task: Task) -> str:
    return f"{task.group} | {task.name}"


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


def _original() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """In a worker process."""
    return Workers.state.written(Workers.state.model)


def bench_of(settings: dict[str, Any], device: str) -> Bench:
    return Bench(device=device, **settings)


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
    parser.add_argument("--learning-rate", type=float, default=None, help="of arms that name none")
    parser.add_argument("--block-learning-rate", type=float, default=None, help="of arms that name none")
    parser.add_argument(
        "--base", nargs="*", default=[], metavar="NAME=FOLDER", help="bases that are compressed already"
    )
    parser.add_argument("--tasks", default="", help="tasks of lm-eval for arms that write answers, with commas")
    parser.add_argument("--limit", type=int, default=None, help="only the first N examples of every task")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep", action="store_true", help="leave the tuned models of group target in WORK")


def _settings(args: Any) -> dict[str, Any]:
    """What a bench needs, but for the device."""
    sizes = {"calibration": args.calibration_windows, "calibration_context": args.calibration_context}
    for key in ("tokens", "context", "batch", "block_windows", "validation_windows", "test_context"):
        sizes[key] = getattr(args, key)
    rates = {key: getattr(args, key) for key in ("learning_rate", "block_learning_rate")}
    given = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in args.base)}
    if unknown := sorted(set(given) - set(BASES)) + [str(f) for f in given.values() if not f.is_dir()]:
        raise SystemExit(f"--base: {', '.join(unknown)}: no base of that name, or no such folder; bases: {list(BASES)}")
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("--tasks needs lm-eval")
    return {
        "model": args.model,
        "data": args.data_dir,
        "work": args.work,
        "windows": args.windows,
        "sizes": sizes,
        "rates": {key: rate for key, rate in rates.items() if rate is not None},
        "given": given,
        "tasks": tuple(name for name in args.tasks.split(",") if name),
        "limit": args.limit,
        "keep": args.keep,
        "checkpointing": args.checkpointing,
    }


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/tune.json", jobs=True, calibration=True, more=_more)
    args.work.mkdir(parents=True, exist_ok=True)
    mixed_text(args.data_dir, args.work / "mix.jsonl")
    settings = _settings(args)
    lab = Lab(args.model, args.text, args.device, args.windows, args.test_context)
    earlier, original = earlier_runs(args.output, args.resume), original_of(lab, args)
    arms = finished(args.output) if args.resume else {}
    failed: dict[str, str] = {}
    written = json.loads(args.output.read_text(encoding="utf-8")).get("written", {}) if arms else {}

    def keep() -> None:
        done = [(task, arms[fit_key(task)]) for task in TASKS if fit_key(task) in arms]
        rows = [{"group": t.group, "base": t.base, "settings": t.settings, **asdict(arm)} for t, arm in done]
        command = "python benchmarks/tune.py --model MODEL --data-dir DATA --work FOLDER --jobs N"
        left_out = [fit_key(task) for task in TASKS if fit_key(task) not in arms and not task.gone]
        bases = {name: _plain(how) for name, how in BASES.items()}
        save(args.output, lab, command, original, earlier, sizes=settings["sizes"], rates=settings["rates"],
             jobs=args.jobs, limit=args.limit, bases=bases, failed=failed, left_out=left_out, written=written,
             arms=rows)  # fmt: skip

    missing = [task for task in TASKS if fit_key(task) not in arms and not task.gone]
    todo = [task for task in missing if asked_for(args, task.group, task.name)]
    make = functools.partial(bench_of, settings)
    tune = functools.partial(_run, latest=args.deadline and begun + args.deadline)
    bench = make(args.device)
    with Workers(args.jobs, args.device, make) as pool:
        tuning = {pool.submit(tune, task): task for task in todo if bench.base(task.base).is_dir()}
        there = {task.base for task in tuning.values()}
        making = {pool.submit(_compress, t): t for t in dict.fromkeys(task.base for task in todo) if t not in there}
        own = pool.submit(_original) if any(task.writes for task in todo) and not written else None
        waiting = {*making, *tuning}
        while waiting:  # bases and arms together: a run that is cut off while a base is made has kept all arms
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done & set(making):
                if problem := future.result():
                    failed[making[future]] = problem
                else:
                    new = {pool.submit(tune, task): task for task in todo if task.base == making[future]}
                    tuning, waiting = tuning | new, waiting | set(new)
            for future in done - set(making):
                try:
                    arm = future.result()
                except ReallmError as error:
                    failed[fit_key(tuning[future])] = str(error)
                    continue
                if arm is not None:
                    arms[arm.key] = replace(arm, run=len(earlier))
                    keep()
        if own is not None:
            written = dict(zip(("samples", "tasks"), own.result(), strict=True))
    keep()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Formats with all their fields."""
    if not isinstance(recipe := settings.get("recipe"), dict):
        return settings
    return {**settings, "recipe": [to_spec(from_spec(rule["format"])) for rule in recipe["rules"]]}


if __name__ == "__main__":
    main()
