"""The ledger for people and for programs."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from reallm.artifact import Ledger, decoding_seconds, read_ledger, read_manifest
from reallm.model import resident_of_artifact
from reallm.report.names import short_name
from reallm.report.text import duration, size, table


def ledger_dict(folder: Path) -> dict[str, Any]:
    """Everything of the ledger as JSON values, with the resident bytes of both ways of loading."""
    manifest = read_manifest(folder)
    return read_ledger(folder).to_dict() | {
        "resident_bytes": resident_of_artifact(folder),
        "provenance": manifest.provenance,
    }


def ledger_text(folder: Path, matrices: bool = False) -> str:
    """Bytes by role and by kind, sizes, and memory once loaded; with `matrices` a line for each matrix."""
    ledger = read_ledger(folder)
    total = ledger.total_bytes
    by_role = [(role, f"{n:,}", f"{100 * n / total:.2f} %") for role, n in ledger.by("role").items()]
    by_kind = [(kind, f"{n:,}", f"{100 * n / total:.2f} %") for kind, n in ledger.by("kind").items()]
    parts = [
        table(("what the bytes are", "bytes", "share"), [*by_role, ("total", f"{total:,}", "")]),
        table(("whose they are", "bytes", "share"), by_kind),
        _sizes(ledger),
        *_coding_lines(folder, ledger),
        "\n".join(f"in memory, {mode:<15} {size(n)}" for mode, n in resident_of_artifact(folder).items()),
    ]
    if matrices:
        parts.insert(0, _matrix_table(ledger))
    return "\n\n".join(parts)


def _coding_lines(folder: Path, ledger: Ledger) -> list[str]:
    if not (rows := ledger.coded):
        return []
    stored, raw = sum(row.nbytes for row in rows), sum(row.raw_nbytes or 0 for row in rows)
    seconds = duration(decoding_seconds(folder, ledger))
    share = 100 * (1 - stored / raw)
    text = f"{len(rows)} tensors, {stored:,} bytes for {raw:,} ({share:.1f} % less); decoded at load in about {seconds}"
    return [f"{'entropy-coded':<22} {text}"]


def summary(folder: Path) -> str:
    """The few lines that end `reallm compress`."""
    return f"{folder}\n{_sizes(read_ledger(folder))}\nevery byte: reallm info {folder}"


def _sizes(ledger: Ledger) -> str:
    bits = ledger.bits_per_weight
    lines = [
        f"{'files':<22} {ledger.total_bytes:,} bytes ({size(ledger.total_bytes)})",
        f"{'bits per weight':<22} {bits:.4f} (compressed block matrices, all side bytes)",
        f"{'bits per parameter':<22} {ledger.bits_per_parameter:.4f} (all files / {ledger.parameters:,} parameters)",
    ]
    return "\n".join(lines if not math.isnan(bits) else [lines[0], lines[2]])


def _matrix_table(ledger: Ledger) -> str:
    stored = ledger.by("matrix")
    saved: dict[str | None, int] = defaultdict(int)
    for row in ledger.coded:
        saved[row.matrix] += (row.raw_nbytes or 0) - row.nbytes
    rows = []
    for matrix in ledger.compressed:
        nbytes = stored[matrix.name]
        bits = f"{8 * nbytes / matrix.weights:.3f}"
        rows.append((matrix.name, short_name(matrix.fmt), f"{nbytes:,}", bits, f"{saved[matrix.name]:,}"))
    head = ("matrix", "format", "bytes", "bits/weight", "saved by coding")
    return table(head, rows, left=2) if saved else table(head[:-1], [row[:-1] for row in rows], left=2)
