"""What the benchmarks share: a model in memory whose matrices are replaced by their decoded selves.

Bytes are those of the packed tensors. The artifact on disk is left out on purpose: it adds no error, which
`tests/` hold, and a hundred arms would write ten gigabytes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reallm.allocate import MatrixInfo
from reallm.calibrate.text import leading_bos, load_text, text_sha256, tokenize
from reallm.evaluate.measure import versions
from reallm.evaluate.perplexity import Evaluation, evaluate
from reallm.fit import Objective, fit
from reallm.formats import WeightFormat
from reallm.hf import load_tokenizer
from reallm.source import open_source, walk

FormatOf = Callable[[MatrixInfo], WeightFormat | None]


@dataclass(frozen=True)
class Arm:
    """One measured configuration."""

    name: str
    bits: float
    perplexity: float
    kl: float | None
    top1: float | None
    relative_error: float
    fit_seconds: float
    peak_memory_bytes: int
    run: int = 0  # which of the file's runs measured it


class Lab:
    """A dense model on a device, its original weights, and a text to score."""

    def __init__(self, model: str, text: Path, device: str, windows: int | None = None, context: int = 2048) -> None:
        source = open_source(model)
        self.name, self.sha256 = Path(model).name, source.fingerprint()
        self.text, self.max_windows = text, windows
        self.context = min(context, source.config.max_position_embeddings)
        tokenizer = load_tokenizer(model)
        self.tokens, self.bos = tokenize(tokenizer, load_text(text)), leading_bos(tokenizer)
        self.model = source.load(torch.float32, device).eval()
        self.reference = source.load(torch.float32, device).eval()
        self.original = {name: tensor for name, tensor in self.reference.state_dict().items()}
        self.weights = dict(self.model.state_dict())
        self.infos = [MatrixInfo(m.name, m.shape, m.role, m.kind, m.block) for m in walk(source.skeleton).matrices]
        self.device = torch.device(device)

    @property
    def blocks(self) -> list[MatrixInfo]:
        """The block matrices."""
        return [info for info in self.infos if info.kind == "block"]

    def evaluate(self, windows: int | None = None, kl: bool = True) -> Any:
        """Perplexity of the model as it is now, and KL and agreement with the original."""
        return evaluate(
            self.model,
            self.tokens,
            self.context,
            bos=self.bos,
            max_windows=windows or self.max_windows,
            reference=self.reference if kl else None,
            batch_size=4 if self.device.type == "cuda" else 1,
        )

    def arm(self, name: str, format_of: FormatOf, kl: bool = True, windows: int | None = None) -> Arm:
        """Compress every block matrix as `format_of` says (None: leave it) and measure."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        stored, weights, error, energy = 0, 0, 0.0, 0.0
        for info in self.blocks:
            original, target = (w[f"{info.name}.weight"] for w in (self.original, self.weights))
            fmt = format_of(info)
            if fmt is None:
                target.copy_(original)
                continue
            with torch.no_grad():
                target.copy_(fmt.decode(fit(fmt, original, Objective.relative_columns(original)), info.shape))
            stored, weights = stored + fmt.nbytes(info.shape), weights + info.weights
            error += (original - target).square().sum().double()
            energy += original.square().sum().double()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        result = self.evaluate(windows, kl)
        arm = Arm(
            name,
            8 * stored / max(weights, 1),
            result.perplexity,
            result.kl,
            result.top1,
            float(error / energy) if weights else 0.0,
            seconds,
            peak,
        )
        kl_text = f"{arm.kl:8.4f}" if arm.kl is not None else ""
        print(f"{name:44s} {arm.bits:7.4f} b  ppl {arm.perplexity:12.3f}  KL {kl_text}  {seconds:6.1f} s", flush=True)
        return arm


class Workers:
    """A pool of processes, each with `make(device)` as `Workers.state`, spread over the GPUs there are."""

    state: Any = None

    def __init__(self, jobs: int, device: str, make: Callable[[str], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        numbers = context.Queue()
        for number in range(jobs):
            numbers.put(number)
        self._pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (numbers, device, make))

    def __enter__(self) -> concurrent.futures.Executor:
        return self._pool.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)


def _start_worker(numbers: Any, device: str, make: Callable[[str], Any]) -> None:
    if device == "cuda":
        device = f"cuda:{numbers.get() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    Workers.state = make(device)


def arguments(
    description: str,
    text: str,
    default_output: str,
    *,
    jobs: bool = False,
    update: bool = False,
    calibration: bool = False,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The options every benchmark takes; `more` adds those of one benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="original model: folder, hub id or GGUF file")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds wikitext2-raw/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=None, help="score only the first N windows")
    parser.add_argument("--output", type=Path, default=Path(default_output))
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="processes side by side, best one a GPU")
        parser.add_argument("--deadline", type=float, default=None, help="begin no arm after so many seconds")
        parser.add_argument("--resume", action="store_true", help="keep the arms that OUTPUT holds already")
        parser.add_argument("--groups", nargs="*", default=None, help="only these groups of arms")
        parser.add_argument("--only", nargs="*", default=None, help="only arms whose names hold one of these words")
    if calibration:
        parser.add_argument("--calibration-windows", type=int, default=128)
        parser.add_argument("--calibration-context", type=int, default=2048)
    if update:
        parser.add_argument("--update", action="store_true", help="also renew the table that the library ships")
    if more is not None:
        more(parser)
    args = parser.parse_args()
    args.text = args.data_dir / "wikitext2-raw" / text
    return args


def asked_for(args: argparse.Namespace, group: str, name: str) -> bool:
    """Whether --groups and --only ask for an arm; they ask for all where they are not given, or empty.

    Words are looked for in `group | name |`: "d=8, 12 bits |" leaves out the arms whose names go on.
    """
    named = not args.only or any(word in f"{group} | {name} |" for word in args.only)
    return named and (not args.groups or group in args.groups)


def earlier_runs(path: Path, resume: bool) -> list[dict[str, Any]]:
    """Provenance of the runs whose arms a file keeps: a run that resumes it adds its own."""
    if not (resume and path.is_file()):
        return []
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def original_of(lab: Lab, args: argparse.Namespace) -> Evaluation:
    """The original model's figures: those of the file that is resumed, or measured now."""
    if args.resume and args.output.is_file():
        return Evaluation(**json.loads(args.output.read_text(encoding="utf-8"))["original"])
    return lab.evaluate(kl=False)


def save(
    path: Path, lab: Lab, command: str, original: Any, earlier: Sequence[dict[str, Any]] = (), **content: Any
) -> None:
    """Write a result with the provenance of its runs."""
    now = {"commit": commit(), "machine": machine(lab.device), "versions": versions()}
    result = {
        "command": command,
        "runs": [*earlier, now],
        "model": {"name": lab.name, "sha256": lab.sha256},
        "text": {"name": lab.text.name, "sha256": text_sha256(lab.text)},
        "context": lab.context,
        "windows": original.windows,
        "dtype": "float32",
        "original": asdict(original),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=True) + "\n", encoding="utf-8")


def commit() -> str:
    """The commit that is checked out; the environment variable COMMIT where there is no git."""
    import os

    if named := os.environ.get("COMMIT"):
        return named
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine(device: torch.device) -> str:
    """Processor or GPU that did the work."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
