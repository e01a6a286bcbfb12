"""Tables and JSON of the ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from reallm.checkpoint import Ledger, decoder_costs, decoding_seconds, read_ledger, read_manifest
from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import duration, size, table, unused_lines
from reallm.hf import artifact_memory_footprint, unquantized_tensors, verify_artifact


def ledger_dict(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Return the ledger as JSON values, plus unquantized and unused tensors and the memory footprint of both modes.

    `verify` checks the checksums of the tensors first.
    """
    manifest, ledger = read_manifest(folder), read_ledger(folder)
    if verify:
        verify_artifact(folder)
    return ledger.to_dict() | {
        "decoders": [cost.to_dict() for cost in decoder_costs(folder, ledger)],
        "not_compressed": unquantized_tensors(folder),
        "unused": manifest.unused_rows,
        "resident_bytes": artifact_memory_footprint(folder),
        "verified": verify and bool(manifest.checksums),
        "provenance": manifest.provenance,
    }


def ledger_text(folder: Path, matrices: bool = False, verify: bool = True) -> str:
    """Return bytes by role and kind, unquantized and unused tensors, sizes, and memory footprint as text.

    `matrices` adds one line per matrix; `verify` checks the checksums of the tensors first.
    """
    ledger = read_ledger(folder)
    if verify:
        verify_artifact(folder)
    total = ledger.total_bytes
    by_role = [(role, f"{n:,}", f"{100 * n / total:.2f} %") for role, n in ledger.sum_bytes("role").items()]
    by_kind = [(kind, f"{n:,}", f"{100 * n / total:.2f} %") for kind, n in ledger.sum_bytes("kind").items()]
    sections = [
        table(("role", "bytes", "share"), [*by_role, ("total", f"{total:,}", "")]),
        table(("stored in", "bytes", "share"), by_kind),
        "\n".join([_unquantized_table(folder, ledger), *unused_lines(read_manifest(folder).unused_rows)]),
        _sizes(ledger),
        *_coding_lines(folder, ledger),
        *_decoder_tables(folder, ledger),
        "\n".join(f"in memory, {mode:<15} {size(n)}" for mode, n in artifact_memory_footprint(folder).items()),
    ]
    if matrices:
        sections.insert(0, _matrix_table(ledger))
    return "\n\n".join(sections)


def _unquantized_table(folder: Path, ledger: Ledger) -> str:
    """Return a table of unquantized tensors by reason."""
    sizes = {row.name: row.nbytes for row in ledger.rows if row.kind == "kept"}
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in unquantized_tensors(folder).items():
        found[reason].append(name)
    rows = [
        (reason, names[0], f"{len(names):,}", f"{sum(sizes.get(name, 0) for name in names):,}")
        for reason, names in found.items()
    ]
    return table(("unquantized because", "example", "tensors", "bytes"), rows, left=2)


def _coding_lines(folder: Path, ledger: Ledger) -> list[str]:
    if not (rows := ledger.entropy_coded_rows):
        return []
    stored, raw = sum(row.nbytes for row in rows), sum(row.raw_nbytes or 0 for row in rows)
    seconds = duration(decoding_seconds(folder, ledger))
    share = 100 * (1 - stored / raw)
    text = f"{len(rows)} tensors, {stored:,} bytes for {raw:,} ({share:.1f} % less); decoded at load in about {seconds}"
    return [f"{'entropy-coded':<22} {text}"]


def _decoder_tables(folder: Path, ledger: Ledger) -> list[str]:
    """Return the cost of decoder nets: multiply-adds, and the seconds and memory measured here."""
    rows = [
        (
            short_name(cost.fmt),
            f"{cost.matrices:,}",
            f"{cost.multiply_adds_per_weight:,.1f}",
            f"{cost.seconds:.2f} s" if cost.seconds < 10 else duration(cost.seconds),
            size(cost.peak_bytes),
        )
        for cost in decoder_costs(folder, ledger)
    ]
    return [table(("decoder nets", "matrices", "multiply-adds/weight", "at load", "peak"), rows)] if rows else []


def summary(folder: Path) -> str:
    """Return the final summary of `reallm compress`."""
    lines = [str(folder), _sizes(read_ledger(folder)), *unused_lines(read_manifest(folder).unused_rows)]
    return "\n".join([*lines, f"every byte: reallm info {folder}"])


def _sizes(ledger: Ledger) -> str:
    bits = ledger.bits_per_weight
    lines = [
        f"{'files':<22} {ledger.total_bytes:,} bytes ({size(ledger.total_bytes)})",
        f"{'bits per weight':<22} {bits:.4f} (compressed block matrices, all overhead included)",
        f"{'bits per parameter':<22} {ledger.bits_per_parameter:.4f} (all files / {ledger.parameters:,} parameters)",
    ]
    return "\n".join(lines if not math.isnan(bits) else [lines[0], lines[2]])


def _matrix_table(ledger: Ledger) -> str:
    stored = ledger.sum_bytes("matrix")
    saved: dict[str | None, int] = defaultdict(int)
    for row in ledger.entropy_coded_rows:
        saved[row.matrix] += (row.raw_nbytes or 0) - row.nbytes
    rows = []
    for matrix in ledger.compressed_matrices:
        nbytes = stored[matrix.name]
        bits = f"{8 * nbytes / matrix.weights:.3f}"
        rows.append((matrix.name, short_name(matrix.fmt), f"{nbytes:,}", bits, f"{saved[matrix.name]:,}"))
    head = ("matrix", "format", "bytes", "bits/weight", "saved by entropy coding")
    return table(head, rows, left=2) if saved else table(head[:-1], [row[:-1] for row in rows], left=2)
