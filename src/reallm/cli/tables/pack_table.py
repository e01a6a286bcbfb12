"""Summary of `reallm pack`."""

from __future__ import annotations

from pathlib import Path

from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import table
from reallm.formats import from_spec
from reallm.pipeline.pack_file import PackReport


def packed_text(report: PackReport, out: Path, matrices: bool = False) -> str:
    """Return bytes, headroom, round-trip error and decoder size; `matrices` adds one line per tensor."""
    rows = [
        ("file", f"{report.nbytes:,} bytes of {report.max_bytes:,}; margin {report.margin:,}"),
        (
            "bits per parameter",
            f"{8 * report.nbytes / max(report.parameters, 1):.4f} ({report.parameters:,} parameters)",
        ),
        ("read back", f"relative squared error {report.relative_error:.3g}; {report.exact} tensors exact"),
        ("worst tensor", f"{report.worst[0] or 'none'} {report.worst[1]:.3g}"),
        ("stored once", f"{len(report.tied)} tied tensors"),
        ("decoder", f"{report.decoder_nbytes:,} bytes of Python, {report.decoder_zlib_nbytes:,} by zlib"),
    ]
    text = "\n".join([str(out), *(f"{name:<22} {value}" for name, value in rows)])
    if not matrices:
        return text
    lines = [
        (r["name"], short_name(from_spec(r["format"])), f"{r['nbytes']:,}", f"{r['error']:.3g}") for r in report.rows
    ]
    return table(("tensor", "format", "bytes", "error"), lines, left=2) + "\n\n" + text
