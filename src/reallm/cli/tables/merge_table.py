"""Summary of merging an adapter."""

from __future__ import annotations

from pathlib import Path

from reallm.checkpoint import read_ledger
from reallm.cli.tables.tune_table import files_text, lines
from reallm.tuning.adapter_merge import read_adapter


def merged_text(before: Path, adapter: Path, after: Path) -> str:
    """Return matrices and ranks of the adapter, bytes of its residuals, and bits and bytes before and after."""
    factors = read_adapter(adapter)
    ranks = sorted({pair.left.shape[1] for pair in factors.values()})
    ledgers = [read_ledger(folder) for folder in (before, after)]
    residual = [ledger.sum_bytes("role").get("residual", 0) for ledger in ledgers]
    return lines(
        [
            ("merged", f"{len(factors)} matrices, rank {', '.join(map(str, ranks))}"),
            ("residuals", f"{residual[1] - residual[0]:,} bytes more"),
            ("bits", " per weight before, ".join(f"{ledger.bits_per_weight:.4f}" for ledger in ledgers) + " after"),
            ("files", files_text(before, after)),
        ]
    )
