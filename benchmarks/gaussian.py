"""Every format on independent normal weights: error against the Shannon bound, and seconds.

    python benchmarks/gaussian.py [--shape 1024x1024] [--device cuda]

The settings are the `examples` of each format. Writes results/gaussian.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lab import commit, machine

from reallm.evaluate.measure import versions
from reallm.fit.quality import gaussian_quality
from reallm.formats import WeightFormat, from_spec, to_spec
from reallm.report.formats import SHAPE, formats_text, measured_formats


def shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def measured_row(fmt: WeightFormat, size: tuple[int, int], device: str) -> dict[str, Any]:
    """A row like those of the examples, for a setting that takes too long to be one."""
    print(fmt, file=sys.stderr)
    quality = asdict(gaussian_quality(fmt, size, device))
    print(f"{quality['bits_per_weight']:.3f} b  error {quality['relative_error']:.4f}")
    return {"format": fmt.name, "spec": to_spec(fmt), "nbytes": fmt.nbytes(size), **quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these formats; default: all")
    parser.add_argument("--shape", type=shape, default=SHAPE, metavar="ROWSxCOLUMNS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--spec", action="append", default=[], type=json.loads, metavar="JSON", help="a format more")
    parser.add_argument("--output", type=Path, default=Path("results/gaussian.json"))
    args = parser.parse_args()
    found = measured_formats(args.names, args.shape, args.device, lambda setting: print(setting, file=sys.stderr))
    result = {
        "command": shlex.join(["python", "benchmarks/gaussian.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{machine(torch.device(args.device))}, {os.cpu_count()} cores",
        "versions": versions(),
        "shape": found["shape"],
        "rows": [
            {"format": name, **{key: value for key, value in setting.items() if key != "measured"}}
            | setting["measured"]
            for name, entry in found["formats"].items()
            for setting in entry["settings"]
        ],
    }
    for spec in args.spec:
        result["rows"].append(measured_row(from_spec(spec), args.shape, args.device))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(formats_text(found))


if __name__ == "__main__":
    main()
