"""Peak memory of end-to-end tuning on the real model: windows of 1,024 tokens, 8 at once, blocks run twice.

    python benchmarks/tuning_memory.py --model MODEL --data-dir DATA --work FOLDER

Compresses MODEL without data into FOLDER (recipe `reallm-lean` unless --recipe says otherwise) and takes --steps steps
of KL in a process of its own. On a CPU peak memory is the largest resident set of that process, models and text
included; on a GPU what torch has allocated there. Writes results/tuning_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from lab import commit, machine

import reallm
from reallm.checkpoint import read_ledger
from reallm.evaluate.measure import versions
from reallm.source import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the compressed model")
    parser.add_argument("--recipe", default="reallm-lean")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("results/tuning_memory.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    base = args.work / args.recipe
    if not base.is_dir():
        reallm.compress(args.model, base, recipe=args.recipe)
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    arm = json.loads(done.stdout.splitlines()[-1])
    shape = {"context": args.context, "batch": args.batch, "micro_batch": args.micro_batch, "dtype": args.dtype}
    row = {"recipe": args.recipe, "bits": read_ledger(base).bits_per_weight, **shape, **arm}
    kept = json.loads(args.output.read_text())["arms"] if args.output.is_file() else []
    result = {
        "command": "python benchmarks/tuning_memory.py --model MODEL --data-dir DATA --work FOLDER",
        "commit": commit(),
        "machine": machine(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": {"name": Path(args.model).name, "sha256": open_source(args.model).fingerprint()},
        "arms": [*kept, row],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.recipe}: {row['peak_bytes'] / 1e9:.2f} GB, {row['seconds']:.0f} s for {args.steps} steps")


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Tune for some steps and say what it took; validation is of one window."""
    begun = time.perf_counter()
    tuned = reallm.tune(
        args.work / args.recipe,
        args.work / "tuned",
        text=(str(args.data_dir / "c4" / "c4-train-sample.jsonl"),),
        reference=args.model,
        method="end-to-end",
        tokens=args.steps * args.batch * args.context,
        context=args.context,
        batch=args.batch,
        micro_batch=args.micro_batch,
        validation_windows=1,
        device=args.device,
        dtype=args.dtype,
    )
    seconds = time.perf_counter() - begun
    shutil.rmtree(args.work / "tuned")
    if torch.device(args.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = [event["loss"] for event in tuned.events if event["phase"] == "end-to-end"]
    return {"steps": len(losses), "peak_bytes": peak, "seconds": seconds, "losses": losses}


if __name__ == "__main__":
    main()
