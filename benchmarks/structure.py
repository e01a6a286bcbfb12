"""What structure the matrices of a model have: `reallm analyze` with orders among its codecs, and provenance.

    python benchmarks/structure.py --model MODEL [--blocks 0 1 14 29] [--device cuda]

Writes results/structure.json: blocks at both ends and in the middle, all roles, a sample of the embedding. The codecs
are those of the command and its codebook on rows and columns in each stored order. About 10 minutes on one core for
SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lab import commit, machine

from reallm.analyze import DEFAULT_CODECS, Scope, analyze, prepare
from reallm.cli.tables.structure import structure_json, structure_text
from reallm.formats import from_spec
from reallm.formats.permuted import METHODS

VECTORS: dict[str, Any] = {"format": "codebook", "index_bits": 8, "vector_dim": 4}
SPECS: list[dict[str, Any]] = [
    {"format": "permuted", "method": method, "rows": True, "base": VECTORS} for method in METHODS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="original model: folder, hub id or GGUF file")
    parser.add_argument("--blocks", type=int, nargs="*", default=[0, 1, 14, 29])
    parser.add_argument("--sample", type=int, default=2048, help="rows and columns of a larger matrix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/structure.json"))
    args = parser.parse_args()
    at = commit()
    codecs = (*DEFAULT_CODECS, *map(from_spec, SPECS))
    patterns = tuple(f"*.{block}.*" for block in args.blocks)
    scope = Scope(matrices=(*patterns, "*embed*"), sample=args.sample, codecs=codecs, device=args.device)
    work = prepare(args.model, scope)
    found = analyze(work, lambda name, done, total: print(f"{done / total:4.0%}  {name}", file=sys.stderr, flush=True))
    blocks = " ".join(map(str, args.blocks))
    origin = {
        "command": f"python benchmarks/structure.py --model MODEL --blocks {blocks} --sample {args.sample}",
        "commit": at,
        "machine": machine(torch.device(args.device)),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(structure_json(origin | found), encoding="utf-8")
    print(structure_text(found))


if __name__ == "__main__":
    main()
