"""Seconds and peak memory of the commands a user types, on the CPU: every format, the dry runs, loading.

    python benchmarks/cost.py --model MODEL

Each row is one process started again, so that peak memory is its own. Writes results/cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from data_free import label, normal, set_rank, uniform, vectors
from lab import commit, machine

from reallm.evaluate.measure import versions
from reallm.source import open_source

COMMAND = [sys.executable, "-c", "import sys; from reallm.cli import main; sys.exit(main())"]
LOAD = "import sys, reallm; reallm.load(sys.argv[1], mode=sys.argv[2])"
FORMATS = [
    uniform(3),
    normal(3),
    vectors(1, 3),
    vectors(2, 6),
    vectors(4, 8),
    set_rank(normal(3), 16),
    set_rank(vectors(2, 6), 16),
    {"format": "permuted", "method": "sort", "base": vectors(2, 6)},
    set_rank(vectors(2, 6), 32),
    set_rank(normal(3), 64),
    set_rank(vectors(2, 6), 64),
    {"format": "permuted", "method": "greedy", "base": vectors(2, 6)},
    {"format": "permuted", "method": "greedy", "block_rows": 64, "base": vectors(2, 6)},
]


def measured(name: str, command: list[str]) -> dict[str, Any]:
    """Wall-clock seconds and peak resident bytes of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name}: {' '.join(command)} ended with status {status}")
    row = {"name": name, "seconds": round(seconds, 2), "peak_memory_bytes": _bytes(usage)}
    print(f"{name:60s} {row['seconds']:8.2f} s {row['peak_memory_bytes'] / 1e9:6.2f} GB", flush=True)
    return row


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def name_of(spec: dict[str, Any]) -> str:
    if spec["format"] == "low_rank_plus":
        return f"{label(spec['base'])} + rank {spec['rank']}"
    if spec["format"] == "permuted":
        order = "an order per 64 rows" if spec.get("block_rows") else "one order"
        return f"{label(spec['base'])}, {spec['method']}, {order}"
    return label(spec)


def rows(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every command once; the first only warms the file cache."""

    def compress(name: str, *options: str) -> list[str]:
        return [*COMMAND, "compress", model, "-o", str(folder / name), *options]

    measured("(warm-up)", compress("warm", "--dry-run"))
    yield measured("compress --dry-run", compress("dry", "--dry-run"))
    yield measured("compress --bits 3 --dry-run", compress("dry3", "--bits", "3", "--dry-run"))
    yield measured("compress", compress("mixed"))
    yield measured("compress --bits 3", compress("three", "--bits", "3"))
    for mode in ("decode_at_load", "decode_per_use"):
        yield measured(f"load, {mode}", [sys.executable, "-c", LOAD, str(folder / "mixed"), mode])
    for number, spec in enumerate(FORMATS):
        recipe = folder / f"{number}.yaml"
        recipe.write_text(yaml.safe_dump({"name": "one", "rules": [{"match": "*", "format": spec}]}), encoding="utf-8")
        yield measured(f"compress, {name_of(spec)}", compress(f"out{number}", "--recipe", str(recipe)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="original model: folder, hub id or GGUF file")
    parser.add_argument("--output", type=Path, default=Path("results/cost.json"))
    args = parser.parse_args()
    provenance = {
        "command": "python benchmarks/cost.py --model MODEL",
        "commit": commit(),
        "machine": f"{machine(torch.device('cpu'))}, {os.cpu_count()} cores",
        "versions": versions(),
        "model": {"name": Path(args.model).name, "sha256": open_source(args.model).fingerprint()},
    }
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args.model, Path(folder)):  # kept one by one: the last ones take minutes each
            found.append(row)
            args.output.write_text(json.dumps(provenance | {"rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
