"""Results of `benchmarks/neural.py` as Markdown: whole models, and single matrices with their controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from reallm.cli.tables.text_table import markdown_table

Row = dict[str, Any]

_GROUPS = {
    "best": "the best without a network",
    "a": "codeword networks",
    "b": "linear decoders",
    "c": "convolutions",
    "order": "in an order of rows and columns",
}
_ORIGINAL, _CONTROLS = "original", ("shuffled", "noise")
_NOTHING = "–"


def neural_tables(results: dict[str, Any]) -> str:
    """Return two tables and the provenance of the measurements."""
    models = markdown_table(
        ("every block matrix, or what the solver chose", "bits/weight", "decoders, bytes", "perplexity"),
        [
            (row["name"], f"{row['bits']:.3f}", f"{row['decoder_bytes']:,}", f"{row['perplexity']:.2f}")
            for row in sorted(results["end_to_end"], key=lambda row: row["perplexity"])
            if row["calibrated"]
        ],
    )
    head = ("", "parameters of the net", "bits/weight", "gain, bits", "matrices", "over a shuffled copy", "over noise")
    measured = sorted({(run["commit"][:12], run["machine"]) for run in results["runs"]})
    places = "; ".join(f"{commit}, {machine}" for commit, machine in measured)
    command = results["runs"][0]["command"]
    return "\n\n".join(
        [
            models,
            markdown_table(head, list(_arms(results["matrices"]))),
            f"Measured with `{command}` at commits {places}.",
        ]
    )


def _arms(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Yield a bold row per group and its arms by gain; arms without a comparison on original matrices are skipped."""
    gains = {
        (row["name"], row["source"], row["role"], row["block"]): row["vq_bits"] - row["bits"]
        for row in rows
        if row["vq_bits"] is not None
    }
    known = [row for row in rows if row["group"] in _GROUPS and (row["name"], _ORIGINAL, *_place(row)) in gains]
    known.sort(key=lambda row: (list(_GROUPS).index(row["group"]), row["name"]))
    for group, members in groupby(known, lambda row: row["group"]):
        yield (f"**{_GROUPS[group]}**", *[""] * 6)
        arms = [list(arm) for _, arm in groupby(members, lambda row: row["name"])]
        yield from sorted((_arm(arm, gains) for arm in arms), key=lambda cells: -float(cells[3]))


def _arm(rows: Sequence[Row], gains: dict[tuple[str, str, str, int], float]) -> Sequence[str]:
    name = rows[0]["name"]
    own = {place: gains[name, _ORIGINAL, *place] for place in sorted({_place(row) for row in rows})}
    originals = [row for row in rows if row["source"] == _ORIGINAL]
    over = []
    for control in _CONTROLS:
        differences = [gain - gains[name, control, *p] for p, gain in own.items() if (name, control, *p) in gains]
        over.append(f"{fmean(differences):+.3f} ({len(differences)})" if differences else _NOTHING)
    net = max(row["decoder_parameters"] or 0 for row in originals)
    return (
        name.replace("|", "/"),
        f"{net:,}" if net else _NOTHING,
        f"{fmean(row['bits'] for row in originals):.2f}",
        f"{fmean(own.values()):+.3f}",
        str(len(own)),
        *over,
    )


def _place(row: Row) -> tuple[str, int]:
    return row["role"], row["block"]
