"""Plain aligned tables, easy to copy and search, and Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Align columns to their widest cell; the first `left` columns are left-aligned, the others right-aligned."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in cells)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column left-aligned, the others right-aligned."""
    return "\n".join(markdown_row(cells) for cells in [header, [":---", *["---:"] * (len(header) - 1)], *rows])


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def unused_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each entry of `Unused.to_dict`: data in the source's files that the model does not use."""
    return [
        f"not used: {row['name']}{_tensors(row['tensors'])}, {size(row['nbytes'])} ({row['reason']})" for row in rows
    ]


def _tensors(count: int) -> str:
    return "" if not count else f", {count:,} tensor{'s' if count > 1 else ''}"


def size(nbytes: int) -> str:
    """Format bytes in decimal units."""
    for unit, factor in _UNITS:
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Format seconds as s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
