"""What a size made of a recipe."""

from __future__ import annotations

from pathlib import Path

from reallm.checkpoint import read_manifest
from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import table
from reallm.pipeline import Job


def changes_table(job: Job, folder: Path) -> str:
    """The matrices of the artifact in `folder` whose formats are others than the job began with; empty if none is."""
    stored = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    rows = [
        (matrix.name, short_name(planned.fmt), short_name(stored[matrix.name]))
        for matrix, planned in job.compressed_matrices
        if stored[matrix.name] != planned.fmt
    ]
    if not rows:
        return ""
    said = f"{len(rows)} of {len(job.compressed_matrices)} matrices changed to fit the size"
    return f"{said}\n{table(('matrix', 'as the recipe says', 'as stored'), rows, left=3)}"
