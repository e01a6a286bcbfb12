"""Generated tables in README.md and docs/: `python tools/result_tables.py`.

A pair of markers in a page requests a table. `<!-- results:NAME -->` … `<!-- /results -->` gets the table of
`results/NAME.json`, or nothing if that file does not exist; `<!-- recipes -->` … `<!-- /recipes -->` gets the list of
shipped recipes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from neural_tables import neural_tables
from reallm.allocate import shipped_recipes
from reallm.cli.tables.text_table import markdown_row, markdown_table
from reallm.errors import ReallmError

_SECTION = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
_RECIPES = re.compile(r"(<!-- recipes -->\n).*?(<!-- /recipes -->)", re.DOTALL)
_NOTHING = "–"

_LOSSLESS = 16  # bits from which a comparison means nothing

Arm = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Return a results file as Markdown: what was measured, a table, and how to measure it again."""
    if "end_to_end" in results:
        return neural_tables(results)
    if "shape" in results:
        return "\n\n".join([_settings(results), _measurement_note(results["command"], [_provenance(results)])])
    return "\n\n".join([_heading(results), _arms(_add_own_text(results)), _origin(results)])


def _add_own_text(results: dict[str, Any]) -> list[Arm]:
    """Return the arms; `own_text` names the text of an arm if it differs from the heading's."""
    default_text = results["text"]["name"]
    return [
        {**arm, "own_text": None if arm.get("text", default_text) == default_text else arm["text"]}
        for arm in results["arms"]
    ]


def update_page(page: str, folder: Path) -> str:
    """Return `page` with every marked section generated again from `folder`.

    Errors: ReallmError naming an invalid results file.
    """

    def section(found: re.Match[str]) -> str:
        text = _section_table(folder / f"{found['name']}.json")
        return f"{found[1]}{text}{found[3]}"

    return _RECIPES.sub(lambda found: f"{found[1]}\n{recipes()}\n\n{found[2]}", _SECTION.sub(section, page))


def recipes() -> str:
    """Return the shipped recipes and their descriptions as Markdown."""
    rows = [[f"`{recipe.name}`", recipe.description] for recipe in shipped_recipes().values()]
    return "\n".join(markdown_row(cells) for cells in [["recipe", "what it does"], ["---", "---"], *rows])


def number(value: float | None, digits: int = 2) -> str:
    """Format a number: `digits` decimals, one decimal from 100 on, `1.2e3` from 1,000 on; a dash for None."""
    if value is None:
        return _NOTHING
    if value < 999.95:
        return f"{value:.{digits if value < 100 else min(1, digits)}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa  # infinity has no exponent


def main(arguments: Sequence[str] | None = None) -> None:
    """Update the named pages, by default README.md and docs/*.md, from results/ in the current folder."""
    root = Path.cwd()
    names = sys.argv[1:] if arguments is None else arguments
    for page in [Path(name) for name in names] or [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if (new := update_page(text, root / "results")) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: tables updated", file=sys.stderr)


def _section_table(file: Path) -> str:
    if not file.is_file():
        return ""
    try:
        return f"\n{table(json.loads(file.read_text(encoding='utf-8')))}\n\n"
    except (ValueError, KeyError, TypeError) as error:
        raise ReallmError(f"{file}: not a results file ({error!r}); measure it again") from error


def _heading(results: dict[str, Any]) -> str:
    original = number(results["original"]["perplexity"])
    return (
        f"{results['model']['name']} on {results['text']['name']}, {results['windows']} windows of "
        f"{results['context']:,} tokens. Original model: perplexity **{original}**."
    )


def _origin(results: dict[str, Any]) -> str:
    measured = {arm.get("run", 0) for arm in results["arms"]}
    runs = [_run(results, number) for number in sorted(measured)]
    hashes = f"sha256 of the model {results['model']['sha256'][:12]}…, of the text {results['text']['sha256'][:12]}…"
    return _measurement_note(results["command"], [*runs, hashes])


def _measurement_note(command: str, facts: Sequence[str]) -> str:
    return f"Measured with `{command}` {'; '.join(facts)}."


def _run(results: dict[str, Any], number: int) -> str:
    """Return the provenance of one run, with its number of arms if there are several runs."""
    arms = results["arms"]
    count = sum(arm.get("run", 0) == number for arm in arms)
    share = f" ({count} of {len(arms)} rows)" if len(results["runs"]) > 1 else ""
    return _provenance(results["runs"][number], share)


def _provenance(run: dict[str, Any], share: str = "") -> str:
    # A source tree that is not installed has no version; the commit identifies it.
    known = {name: version for name, version in run["versions"].items() if not version.endswith("unknown")}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"at commit {run['commit'][:12]}{share}, {run['machine']}, {versions}"


def _settings(results: dict[str, Any]) -> str:
    """Return a table of formats on Gaussian weights, closest to the rate-distortion bound first."""
    head = ["setting", "bits/weight", "relative error", "rate-distortion bound", "gap, bits"]
    rows = [
        [
            row["name"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['relative_error']:.4f}",
            f"{row['shannon_error']:.4f}",
            f"{row['gap_bits']:.3f}",
        ]
        for row in sorted(results["rows"], key=lambda row: row["gap_bits"])
        if row["bits_per_weight"] < _LOSSLESS
    ]
    return markdown_table(head, rows)


# Column heading and cell. A column that is empty in all rows is omitted.
_COLUMNS: tuple[tuple[str, Callable[[Arm], str]], ...] = (
    ("bits/weight", lambda arm: f"{arm['bits']:.3f}"),
    ("artifact, MB", lambda arm: _NOTHING if "nbytes" not in arm else f"{arm['nbytes'] / 1e6:.2f}"),
    ("perplexity", lambda arm: number(arm["perplexity"])),
    ("KL", lambda arm: number(arm.get("kl"), 3)),
    ("predicted KL", lambda arm: number(arm.get("predicted"), 3)),
    ("the same bytes without residual", lambda arm: _same_bytes(arm.get("same_bytes"))),
    ("relative error", lambda arm: number(arm.get("relative_error"), 4)),
    ("plan, s", lambda arm: number(_seconds(arm).get("plan"), 1)),
    ("fit, s", lambda arm: number(arm.get("fit_seconds", _seconds(arm).get("fit")), 1)),
    ("million tokens", lambda arm: number(_million(arm.get("tokens")), 1)),
    ("tuning, s", lambda arm: number(_seconds(arm).get("tune"), 1)),
    ("tokens/s", lambda arm: _integer(arm.get("tokens_per_second"))),
    ("peak memory, MB", lambda arm: _megabytes(arm.get("peak_memory_bytes"))),
    ("scored on", lambda arm: arm.get("own_text") or _NOTHING),
)


def _same_bytes(other: dict[str, Any] | None) -> str:
    return _NOTHING if other is None else f"{number(other['perplexity'])} at {other['bits']:.3f}"


def _seconds(arm: Arm) -> dict[str, float]:
    """Return seconds by phase; a tuning arm has a single number, 0 if nothing was tuned."""
    seconds = arm.get("seconds", {})
    return seconds if isinstance(seconds, dict) else {"tune": seconds} if seconds else {}


def _million(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _integer(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


def _megabytes(nbytes: int | None) -> str:
    return _NOTHING if not nbytes else f"{nbytes / 1e6:,.0f}"


def _arms(arms: Sequence[Arm]) -> str:
    used = [(name, cell) for name, cell in _COLUMNS if any(cell(arm) != _NOTHING for arm in arms)]
    head = ["", *(name for name, _ in used)]
    return markdown_table(head, list(_rows(arms, [cell for _, cell in used])))


def _rows(arms: Sequence[Arm], cells: Sequence[Callable[[Arm], str]]) -> Iterator[list[str]]:
    """Yield a bold row per group, in order of appearance, followed by its arms."""
    order = list(dict.fromkeys(arm["group"] for arm in arms))
    for group, members in groupby(sorted(arms, key=lambda arm: order.index(arm["group"])), lambda arm: arm["group"]):
        yield [f"**{group}**", *("" for _ in cells)]
        for arm in members:
            # Arms of budgets have only a key, such as "60 MB | one format".
            yield [arm.get("name") or arm["key"].rpartition(" | ")[2], *(cell(arm) for cell in cells)]


if __name__ == "__main__":
    try:
        main()
    except ReallmError as error:
        sys.exit(f"error: {error}")
