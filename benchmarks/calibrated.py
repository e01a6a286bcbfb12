"""Every codec with calibration data, one format for all block matrices, at about 2, 2.5 and 3 bits.

    python benchmarks/calibrated.py --model MODEL --data-dir DATA --jobs N

Calibrated on c4/c4-train-sample.jsonl only (128 windows of 2,048 tokens), block by block through the compressed
stream; no tuning. WikiText-2 raw test, all windows. Embedding and head stay as they are. Writes
results/calibrated.json after every arm; --resume keeps the arms that are there.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data_free import finished, normal, uniform, vectors
from lab import Arm, Lab, Workers, arguments, asked_for, earlier_runs, original_of, save

from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.calibrate.loss_gradients import Guidance, guidance
from reallm.calibrate.windows import windows_from_files
from reallm.fit import Objective, fit, squared_error
from reallm.formats import from_spec
from reallm.hf import load_tokenizer
from reallm.source import Matrix, walk


def turned(base: dict[str, Any]) -> dict[str, Any]:
    return {"format": "rotated", "base": base}


def trellis(bits: int, state_bits: int = 16, table_bits: int = 0) -> dict[str, Any]:
    return {"format": "trellis", "bits": bits, "state_bits": state_bits, "table_bits": table_bits}


def lattice(bits: int) -> dict[str, Any]:
    return {"format": "e8", "bits": bits}


def entropy(bits: float) -> dict[str, Any]:
    return {"format": "entropy_coded", "bits": bits}


def additive(books: int, index_bits: int) -> dict[str, Any]:
    return {"format": "additive", "books": books, "index_bits": index_bits, "scales": "two_level"}


@dataclass(frozen=True)
class Task:
    """One arm: a format for every block matrix, and what its errors are weighed by."""

    group: str
    name: str
    spec: dict[str, Any]
    objective: str = "outputs"


def scaled(base: dict[str, Any], sides: str = "inputs") -> dict[str, Any]:
    return {"format": "scaled", "sides": sides, "base": base}


def decoupled(base: dict[str, Any], kind: str, share: float) -> dict[str, Any]:
    return {"format": "decoupled", "kind": kind, "share": share, "base": base}


def guided(task: Task, objective: str = "guided") -> Task:
    return Task(task.group, f"{task.name}, {objective}", task.spec, objective)


TRELLIS_3 = Task("3 bits", "rotated trellis", turned(trellis(3)))
TRELLIS_2 = Task("2 bits", "rotated trellis", turned(trellis(2)))
SCALED_3 = Task("3 bits", "scaled, rotated trellis", scaled(turned(trellis(3))))
SCALED_2 = Task("2 bits", "scaled, rotated trellis", scaled(turned(trellis(2))))
ENTROPY_2 = Task("2 bits", "entropy_coded", entropy(2.0))
VECTORS_2 = Task("2 bits", "codebook d=4", vectors(4, 8))

# In this order, so that a run that is cut short has the arms of interest.
TASKS: list[Task] = [
    TRELLIS_2,
    TRELLIS_3,
    Task("2 bits", "additive, 2 books of 8 bits", additive(2, 8)),
    ENTROPY_2,
    Task("3 bits", "entropy_coded", entropy(3.0)),
    Task("2.5 bits", "entropy_coded", entropy(2.5)),
    Task("3 bits", "rotated entropy_coded", turned(entropy(3.0))),
    Task("2 bits", "rotated entropy_coded", turned(entropy(2.0))),
    Task("2 bits", "rotated e8", turned(lattice(2))),
    Task("3 bits", "rotated e8", turned(lattice(3))),
    Task("3 bits", "uniform g128 (GPTQ)", uniform(3, 128)),
    VECTORS_2,
    Task("3 bits", "codebook d=2", vectors(2, 6)),
    guided(TRELLIS_2),
    guided(TRELLIS_3),
    SCALED_2,
    SCALED_3,
    guided(SCALED_2),
    guided(SCALED_3),
    Task("2.5 bits", "codebook d=4", vectors(4, 10)),
    Task("3 bits", "uniform g64 (GPTQ)", uniform(3)),
    Task("2 bits", "uniform g128 (GPTQ)", uniform(2, 128)),
    Task("2.5 bits", "uniform 2 bits and 0.5 % of entries", scaled(decoupled(uniform(2), "entries", 0.005), "both")),
    Task("3 bits", "uniform 3 bits and 0.5 % of entries", scaled(decoupled(uniform(3), "entries", 0.005), "both")),
    Task("2 bits", "rotated e8 and 1 % of columns", scaled(decoupled(turned(lattice(2)), "columns", 0.01))),
    guided(VECTORS_2),
    guided(ENTROPY_2),
    Task("3 bits", "codebook d=1", vectors(1, 3)),
    Task("3 bits", "normal_float", normal(3)),
    Task("2 bits", "uniform g64 (GPTQ)", uniform(2)),
    Task("2 bits", "codebook d=2", vectors(2, 4)),
    Task("2.5 bits", "codebook d=2", vectors(2, 5)),
    Task("3 bits", "rotated codebook d=2", turned(vectors(2, 6))),
    Task("2 bits", "rotated codebook d=4", turned(vectors(4, 8))),
    Task("2 bits", "rotated trellis, 12 state bits", turned(trellis(2, 12))),
    Task("2 bits", "rotated trellis, 12 state bits, learned table", turned(trellis(2, 12, 9))),
    Task("2.5 bits", "additive, 5 books of 4 bits", additive(5, 4)),
    Task("2 bits", "additive, 4 books of 4 bits", additive(4, 4)),
    Task("3 bits", "additive, 6 books of 4 bits", additive(6, 4)),
]


@dataclass(frozen=True)
class Bench:
    """A lab and the calibration windows in it."""

    lab: Lab
    windows: torch.Tensor

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix for matrix in walk(self.lab.model).matrices if matrix.kind == "block"]

    @functools.cached_property
    def guidance(self) -> dict[str, Guidance]:
        return guidance(self.lab.reference, self.windows, self.matrices, self.lab.device)

    def original(self, matrix: Matrix) -> torch.Tensor:
        return self.lab.original[f"{matrix.name}.weight"]

    def target(self, matrix: Matrix) -> torch.Tensor:
        return self.lab.weights[f"{matrix.name}.weight"]

    def objectives(self, stream: HiddenStateCache, matrices: list[Matrix], objective: str) -> dict[str, Objective]:
        """By matrix of the stream's present block."""
        guided = self.guidance if objective == "guided" else {}
        second_moments = stream.second_moments(matrices, {name: own.tokens for name, own in guided.items()} or None)
        rows = {name: own.rows for name, own in guided.items()}
        return {m.name: Objective.output_error(second_moments.get(m.name), rows.get(m.name)) for m in matrices}

    def run(self, task: Task) -> Arm:
        """Compress along the stream, as `reallm compress --calibration` does, and score."""
        fmt, lab = from_spec(task.spec), self.lab
        if lab.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun, error, energy = time.perf_counter(), 0.0, 0.0
        for key, weight in lab.original.items():
            lab.weights[key].copy_(weight)
        stream = HiddenStateCache(lab.model, self.windows, lab.device)
        with torch.no_grad():
            for number in range(len(stream.blocks)):
                matrices = [matrix for matrix in self.matrices if matrix.block == number]
                objectives = self.objectives(stream, matrices, task.objective)
                for matrix in matrices:
                    original, target = self.original(matrix), self.target(matrix)
                    objective = objectives[matrix.name].to(lab.device)
                    target.copy_(fmt.decode(fit(fmt, original, objective), matrix.shape))
                    error += squared_error(original, target)
                    energy += original.double().square().sum().item()
                stream.advance()
        seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if lab.device.type == "cuda" else 0
        result = lab.evaluate(kl=False)
        bits = 8 * sum(fmt.nbytes(info.shape) for info in lab.blocks) / sum(info.weights for info in lab.blocks)
        print(f"{task.name:48s} {bits:7.4f} b  ppl {result.perplexity:12.3f}  {seconds:6.1f} s", flush=True)
        return Arm(task.name, bits, result.perplexity, result.kl, result.top1, error / energy, seconds, peak)


def bench_of(
    model: str, text: Path, calibration: Path, sizes: tuple[int, int], windows: int | None, device: str
) -> Bench:
    """The model on a device, and the windows it is calibrated on."""
    return Bench(Lab(model, text, device, windows), windows_from_files([calibration], load_tokenizer(model), *sizes))


def _run(task: Task, latest: float | None) -> Arm | None:
    """In a worker process."""
    return None if latest is not None and time.time() > latest else Workers.state.run(task)


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/calibrated.json", jobs=True, calibration=True)
    text = args.data_dir / "c4" / "c4-train-sample.jsonl"
    sizes = (args.calibration_windows, args.calibration_context)
    lab = Lab(args.model, args.text, args.device, args.windows)
    original = original_of(lab, args)
    arms = finished(args.output) if args.resume else {}
    earlier = earlier_runs(args.output, args.resume)

    def keep() -> None:
        done = [(task, arms[task.group, task.name]) for task in TASKS if (task.group, task.name) in arms]
        rows = [
            {"group": task.group, "format": task.spec, "objective": task.objective, **asdict(arm)} for task, arm in done
        ]
        command = "python benchmarks/calibrated.py --model MODEL --data-dir DATA --jobs N"
        calibration = {"text": text.name, "windows": sizes[0], "context": sizes[1]}
        left_out = [task.name for task in TASKS if (task.group, task.name) not in arms]
        content = {"calibration": calibration, "jobs": args.jobs, "left_out": left_out, "arms": rows}
        save(args.output, lab, command, original, earlier, **content)

    todo = [task for task in TASKS if (task.group, task.name) not in arms and asked_for(args, task.group, task.name)]
    make = functools.partial(bench_of, args.model, args.text, text, sizes, args.windows)
    run = functools.partial(_run, latest=args.deadline and begun + args.deadline)
    with Workers(args.jobs, args.device, make) as pool:
        open_tasks = {pool.submit(run, task): task for task in todo}
        for future in concurrent.futures.as_completed(open_tasks):
            if (arm := future.result()) is not None:
                task = open_tasks[future]
                arms[task.group, task.name] = replace(arm, run=len(earlier))
                keep()
    keep()


if __name__ == "__main__":
    main()
