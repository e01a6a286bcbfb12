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
from pathlib import Path

import torch
from lab import commit, machine

from reallm.cli.tables.format_table import SHAPE, formats_text, measure_formats
from reallm.evaluate.measure import versions
from reallm.formats import from_spec, known_formats


def shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def command(args: argparse.Namespace) -> str:
    """What measures the same; where the result went is nobody's business."""
    specs = [word for spec in args.spec for word in ("--spec", json.dumps(spec))]
    shape = "x".join(map(str, args.shape))
    given = [*args.names, "--shape", shape, "--device", args.device, *specs]
    return shlex.join(["python", "benchmarks/gaussian.py", *given])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these formats; default: all")
    parser.add_argument("--shape", type=shape, default=SHAPE, metavar="ROWSxCOLUMNS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--spec", action="append", default=[], type=json.loads, metavar="JSON", help="a format more")
    parser.add_argument("--output", type=Path, default=Path("results/gaussian.json"))
    args = parser.parse_args()
    found = measure_formats(
        args.names or list(known_formats()),
        args.shape,
        args.device,
        lambda setting: print(setting, file=sys.stderr),
        [from_spec(spec) for spec in args.spec],
    )
    result = {
        "command": command(args),
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(formats_text(found))


if __name__ == "__main__":
    main()
