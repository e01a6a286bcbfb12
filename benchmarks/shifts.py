"""What shifts of matrices, rows and columns would take away, of every matrix of a model.

    python benchmarks/shifts.py --model MODEL

Writes results/shifts.json: shares of the energy and bits per weight (`reallm analyze` shows them for the matrices it
looks at), and errors of the embedding in 3, 4, 6 and 8 bits with and without a residual of rank 1, by 4,096 rows. Half
a minute on one core for SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lab import commit, machine

from reallm.analyze import shifts
from reallm.analyze.run_analysis import sample_matrix
from reallm.cli.tables.structure import SHIFTS, chance_share
from reallm.cli.tables.text_table import table
from reallm.evaluate.measure import versions
from reallm.fit import fit
from reallm.fit.quality import relative_error
from reallm.formats import from_spec
from reallm.source import Matrix, Source, open_source, read_matrix, walk

ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="original model: folder, hub id or GGUF file")
    parser.add_argument("--output", type=Path, default=Path("results/shifts.json"))
    args = parser.parse_args()
    at = commit()
    source = open_source(args.model)
    found = list(walk(source.skeleton).matrices)
    matrices = [measured(source, matrix) for matrix in found]
    embedding = next(matrix for matrix in found if matrix.kind == "embedding")
    result = {
        "command": "python benchmarks/shifts.py --model MODEL",
        "commit": at,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "model": {"name": Path(source.label).name, "sha256": source.fingerprint()},
        "embedding": list(embedding_errors(source, embedding)),
        "matrices": matrices,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(by_role(matrices))
    for row in result["embedding"]:
        print(f"{row['bits_per_weight']:.3f}  {row['error']:.3g}  {json.dumps(row['format'])}")


def measured(source: Source, matrix: Matrix) -> dict[str, Any]:
    """Shifts of a matrix."""
    figures = dataclasses.asdict(shifts(read_matrix(source, matrix).float()))
    return {"name": matrix.name, "role": matrix.role, "block": matrix.block, "shape": list(matrix.shape), **figures}


def embedding_errors(source: Source, matrix: Matrix) -> Iterator[dict[str, Any]]:
    """Uniform codes of the embedding: alone, with the one rank that its columns' means are, with scales of columns."""
    weight = sample_matrix(read_matrix(source, matrix).float(), ROWS)
    for bits in (3, 4, 6, 8):
        plain = {"format": "uniform", "bits": bits, "group_size": 64}
        residual = {"format": "low_rank_plus", "rank": 1, "factors": "int8", "base": plain}
        for spec in (plain, residual, {"format": "scaled", "sides": "inputs", "base": plain}):
            fmt, shape = from_spec(spec), (weight.shape[0], weight.shape[1])
            with torch.no_grad():
                decoded = fmt.decode(fit(fmt, weight), shape)
            error = relative_error(weight, decoded)
            yield {"format": spec, "bits_per_weight": fmt.bits_per_weight(matrix.shape), "error": float(error)}


def by_role(rows: list[dict[str, Any]]) -> str:
    """Largest share of a role's matrices, in multiples of chance too, and the most that it saves."""
    lines = []
    for role in dict.fromkeys(row["role"] for row in rows):
        members = [row for row in rows if row["role"] == role]
        cells = [role, str(len(members))]
        for kind in SHIFTS:
            worst = max(members, key=lambda row, kind=kind: row[kind]["share"])
            share = worst[kind]["share"]
            most = max(row[kind]["bits"] for row in members)
            cells += [f"{share:.4%}", f"{share / chance_share(worst['shape'], kind):.3g}", f"{most:.5f}"]
        lines.append(cells)
    return table(("role", "n", *(f"{kind}{end}" for kind in SHIFTS for end in ("", " / chance", " saves"))), lines)


if __name__ == "__main__":
    main()
