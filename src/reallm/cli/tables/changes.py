"""Formats that a size limit changed in a recipe."""

from __future__ import annotations

from pathlib import Path

from reallm.checkpoint import read_manifest
from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import table
from reallm.pipeline import Job


def changes_table(job: Job, folder: Path) -> str:
    """Return a table of matrices whose stored format differs from the recipe; empty if there are none."""
    stored = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    rows = [
        (matrix.name, short_name(planned.fmt), short_name(stored[matrix.name]))
        for matrix, planned in job.compressed_matrices
        if stored[matrix.name] != planned.fmt
    ]
    if not rows:
        return ""
    title = f"{len(rows)} of {len(job.compressed_matrices)} matrices changed to fit the size"
    return f"{title}\n{table(('matrix', 'in the recipe', 'stored'), rows, left=3)}"
