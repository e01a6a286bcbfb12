"""Results of `reallm analyze`: tables by role or by matrix, JSON and plots."""

from __future__ import annotations

import functools
import json
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reallm.analyze import AnalysisJob
from reallm.analyze.orders import RAW
from reallm.checkpoint import check_new_file
from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import duration, table
from reallm.errors import ReallmError
from reallm.evaluate.measure import versions
from reallm.formats import from_spec

Row = dict[str, Any]
_AXES = ("along_rows", "along_columns")
_FILE = "structure.json"
SHIFTS = ("matrix", "rows", "columns")
PLOTS = ("spectra.png", "orders.png", "codecs.png")


def work_line(work: AnalysisJob, seconds: float) -> str:
    """Return a line that describes the work and its estimated time."""
    fits = 3 * len(work.matrices) * len(work.scope.codecs)
    return (
        f"{len(work.matrices)} of {work.of} matrices, {work.weights / 1e6:.1f} million weights, "
        f"{fits} fits of codecs; about {duration(max(1.0, seconds))} on {work.scope.device}"
    )


def check_writable(json_file: Path | None, folder: Path | None) -> None:
    """Raise ReallmError if `write_structure` could not write there or would overwrite a file.

    Checked before the work, for all files, also those that this run will not write: a plot of an earlier run would be
    mistaken for one of this run.
    """
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ReallmError(f"--json {json_file}: not a file in an existing folder; give another name")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ReallmError(f"--output {folder}: is a file; give a folder")
    if json_file is not None:
        check_new_file(json_file, "--json", (".json",))
    for name in (_FILE, *PLOTS) if folder is not None and folder.exists() else ():
        check_new_file(folder / name, "--output")


def write_structure(found: dict[str, Any], json_file: Path | None, folder: Path | None) -> list[Path]:
    """Write JSON to a file, and JSON and plots (if matplotlib is installed) to a new folder; return the files."""
    files = [json_file] if json_file else []
    plots: list[Path] = []
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / _FILE)
        plots = plot_structure(found, folder)
    for file in files:
        file.write_text(structure_json(found), encoding="utf-8")
    return [*files, *plots]


def structure_json(found: dict[str, Any]) -> str:
    """Return JSON text with package versions, one line per matrix."""
    found = _round_floats({"versions": versions(), **found})
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in found["matrices"])
    head = json.dumps({key: value for key, value in found.items() if key != "matrices"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "matrices": [\n{rows}\n ]\n}}\n'


def _round_floats(value: Any) -> Any:
    """Round floats to six digits: later digits depend on the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _round_floats(inner) for key, inner in value.items()}
    return [_round_floats(inner) for inner in value] if isinstance(value, list | tuple) else value


def structure_text(found: dict[str, Any], by_matrix: bool = False) -> str:
    """Return four tables: singular values, scales and tails; shifts; orders and bases; formats with their control."""
    if not found["matrices"]:
        return "all weights are 0; there is nothing to analyze"
    groups = _groups(found["matrices"], (lambda row: row["name"]) if by_matrix else (lambda row: row["role"]))
    sections = [_spectra(groups), _SPECTRA_NOTE, _shifts(groups), _SHIFTS_NOTE, _orders(groups), _ORDERS_NOTE]
    if found["matrices"][0]["codecs"]:
        sections += [_codecs(groups), _verdicts(found["matrices"]), _CODECS_NOTE]
    return "\n\n".join(sections)


_SPECTRA_NOTE = """\
top 1/16: share of the energy in the largest 1/16 of the singular values; noise: the same for Gaussian noise with the
same row and column scales; MP: for noise with equal scales, by the Marchenko-Pastur law. above: singular values
larger than all of the noise's. rank: the best rank of an int8 residual; rank saves: bits per weight it saves, net of
its storage. rows, columns: upper bound on the bits per weight saved by their scales. kurtosis: 3 for a normal
distribution; even: after scaling rows and columns to equal norms."""
_SHIFTS_NOTE = """\
Share of the energy that subtracting the mean of the matrix, of each row or of each column removes; chance: the same
for independent values. saves: bits per weight, net of a float16 per mean."""
_ORDERS_NOTE = """\
stores: bits per weight of the order or basis. rows, columns: correlation of neighbours along rows and along columns;
for raw ± one standard error, for others the value for noise (in its own best order) in brackets. sizes: the same for
magnitudes, mean of both axes. net: upper bound on the bits per weight that scales and prediction from neighbours save
over raw, net of the storage of orders and basis."""
_CODECS_NOTE = """\
Relative squared errors; shuffled: rows and columns in random order. order: bits per weight that the existing order is
worth to the format, ½ log2(shuffled / real)."""


def _groups(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _mean(rows: Sequence[Any], *path: str | int) -> float:
    """Return the mean over rows of the value at a path of keys."""
    return statistics.fmean(functools.reduce(operator.getitem, path, row) for row in rows)


def _spectra(groups: dict[str, list[Row]]) -> str:
    head = ("matrices", "n", "top 1/16", "noise", "MP", "above", "rank", "rank saves")
    head += ("rows", "columns", "kurtosis", "even")
    rows = []
    for name, members in groups.items():
        shares = (_mean(members, "spectrum", f"{kind}top_share") for kind in ("", "noise_", "marchenko_pastur_"))
        rows.append(
            (name, len(members))
            + tuple(f"{share:z.3f}" for share in shares)
            + tuple(f"{_mean(members, 'spectrum', key):z.0f}" for key in ("above_noise", "best_rank"))
            + (f"{_mean(members, 'spectrum', 'rank_bits'):z.3f}",)
            + tuple(f"{_mean(members, 'scales', axis):z.3f}" for axis in ("rows", "columns"))
            + (f"{_mean(members, 'kurtosis'):z.2f}", f"{_mean(members, 'unscaled_kurtosis'):z.2f}")
        )
    return table(head, rows)


def _shifts(groups: dict[str, list[Row]]) -> str:
    head: tuple[str, ...] = ("matrices",)
    for kind in SHIFTS:
        head += (kind, "chance", "saves")
    rows = []
    for name, members in groups.items():
        row: tuple[str, ...] = (name,)
        for kind in SHIFTS:
            share, saved = (_mean(members, "shifts", kind, figure) for figure in ("share", "bits"))
            row += (
                f"{share:.4%}",
                f"{statistics.fmean(chance_share(member['shape'], kind) for member in members):.4%}",
            )
            row += (f"{saved:z.5f}",)
        rows.append(row)
    return table(head, rows)


def chance_share(shape: Sequence[int], kind: str) -> float:
    """Return the share of the energy that subtracting means removes from independent values with mean 0."""
    return {"matrix": 1 / math.prod(shape), "rows": 1 / shape[1], "columns": 1 / shape[0]}[kind]


def _orders(groups: dict[str, list[Row]]) -> str:
    head = ("matrices", "order", "stores", "rows", "columns", "sizes", "kurtosis", "net")
    rows = []
    for name, members in groups.items():
        for order in _order_names(members):
            pairs = _pairs(members, order)
            own = [own for own, _ in pairs]
            stores = statistics.fmean(8 * view["nbytes"] / view["weights"] for view in own)
            axes = [_correlation(pairs, axis, order == RAW) for axis in _AXES]
            sizes = statistics.fmean(_mean(own, axis, "sizes", "value") for axis in _AXES)
            tails, net = f"{_mean(own, 'kurtosis'):z.2f}", f"{_mean(own, 'net_bits'):z.3f}"
            rows.append((name, order, f"{stores:z.3f}", *axes, f"{sizes:z.3f}", tails, net))
            name = ""
    return table(head, rows, left=2)


def _order_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(view["name"] for row in rows for view in row["orders"]))


def _pairs(rows: Sequence[Row], order: str) -> list[tuple[Row, Row]]:
    """Return (view, noise view) of one order for every matrix that has it; the view gets its number of weights."""
    return [
        (own | {"weights": math.prod(row["shape"])}, noise)
        for row in rows
        for own, noise in zip(row["orders"], row["noise_orders"], strict=True)
        if own["name"] == order
    ]


def _correlation(pairs: Sequence[tuple[Row, Row]], axis: str, raw: bool) -> str:
    own = _mean([own for own, _ in pairs], axis, "alike", "value")
    if raw:
        error = math.sqrt(sum(own[axis]["alike"]["error"] ** 2 for own, _ in pairs)) / len(pairs)
        return f"{own:z.3f} ± {error:z.3f}"
    return f"{own:z.3f} ({_mean([noise for _, noise in pairs], axis, 'alike', 'value'):z.3f})"


def _codecs(groups: dict[str, list[Row]]) -> str:
    head = ("matrices", "codec", "bits/weight", "real", "shuffled", "noise", "order")
    rows = []
    for name, members in groups.items():
        for number, codec in enumerate(members[0]["codecs"]):
            figures = [f"{_mean(members, 'codecs', number, kind):z.5f}" for kind in ("real", "shuffled", "noise")]
            bits = _mean(members, "codecs", number, "bits_per_weight")
            worth = _mean(members, "codecs", number, "order_bits")
            rows.append((name, short_name(from_spec(codec["codec"])), f"{bits:z.3f}", *figures, f"{worth:+.4f}"))
            name = ""
    return table(head, rows, left=2)


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """Yield (format, mean bits per weight that the order is worth, standard error over matrices)."""
    for number, codec in enumerate(rows[0]["codecs"]):
        worth = [row["codecs"][number]["order_bits"] for row in rows]
        spread = statistics.stdev(worth) if len(worth) > 1 else math.nan
        yield short_name(from_spec(codec["codec"])), statistics.fmean(worth), spread / math.sqrt(len(worth))


def _verdicts(rows: Sequence[Row]) -> str:
    lines = []
    for codec, worth, error in verdicts(rows):
        uncertainty = "" if math.isnan(error) else f" ± {error:z.4f}"
        lines.append(f"{codec}: the order is worth {worth:+.4f}{uncertainty} bits per weight over {len(rows)} matrices")
    return "\n".join(lines)


def plot_structure(found: dict[str, Any], folder: Path) -> list[Path]:
    """Plot spectra, orders and format errors into an existing folder; return the files, [] without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    groups = _groups(found["matrices"], lambda row: row["role"])
    if not groups:
        return []
    draw = {"spectra.png": _plot_spectra, "orders.png": _plot_orders, "codecs.png": _plot_codecs}
    written = []
    for name in PLOTS:
        figure = Figure(layout="constrained")
        if draw[name](figure, groups):
            figure.savefig(folder / name, dpi=130)
            written.append(folder / name)
    return written


def _plot_spectra(figure: Any, groups: dict[str, list[Row]]) -> bool:
    across = min(4, len(groups))
    down = -(-len(groups) // across)
    figure.set_size_inches(3.2 * across, 2.8 * down + 0.4)
    panels = figure.subplots(down, across, sharex=True, squeeze=False).reshape(-1)
    curves = (("curve", "as it is", "C3"), ("noise_curve", "noise, same scales", "C0"))
    curves += (("marchenko_pastur_curve", "Marchenko-Pastur", "0.5"),)
    for panel, (role, members) in zip(panels, groups.items(), strict=False):
        for key, label, colour in curves:
            each = [row["spectrum"][key] for row in members]
            ranks = [place / (len(each[0]) - 1) for place in range(len(each[0]))]
            if key == "curve":
                for curve in each:
                    panel.plot(ranks, curve, color=colour, alpha=0.25, linewidth=0.8)
            means = [statistics.fmean(values) for values in zip(*each, strict=True)]
            panel.plot(ranks, means, color=colour, label=label, linestyle="--" if colour == "0.5" else "-")
        panel.set(title=f"{role} ({len(members)})", yscale="log", ylim=(1e-3, None))
        panel.axvline(1 / 16, color="0.8", linewidth=0.8, zorder=0)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7)
    figure.supxlabel("rank / all ranks (line: 1/16)", fontsize=9)
    figure.supylabel("squared singular value / mean", fontsize=9)
    return True


def _plot_orders(figure: Any, groups: dict[str, list[Row]]) -> bool:
    orders = _order_names([row for members in groups.values() for row in members])
    figure.set_size_inches(max(7, 1.3 * len(groups) + 2), 6)
    width = 0.8 / len(orders)
    for panel, axis in zip(figure.subplots(2, 1, sharex=True), _AXES, strict=True):
        for number, order in enumerate(orders):
            found = {place: _pairs(members, order) for place, members in enumerate(groups.values())}
            found = {place: pairs for place, pairs in found.items() if pairs}
            places = [place + (number - (len(orders) - 1) / 2) * width for place in found]
            own, noise = (
                [_mean([pair[which] for pair in pairs], axis, "alike", "value") for pairs in found.values()]
                for which in (0, 1)
            )
            panel.bar(places, own, width, color=f"C{number}", label=order)
            panel.scatter(places, noise, color="black", marker="_", s=60, zorder=3, label=None if number else "noise")
        panel.axhline(0, color="0.5", linewidth=0.8)
        title = f"correlation of neighbours {axis.replace('_', ' ')}"
        panel.set(title=title, xticks=range(len(groups)), xticklabels=list(groups))
        panel.grid(alpha=0.3, axis="y")
    panel.legend(fontsize=8, ncols=len(orders) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return True


def bits_over_all(rows: Sequence[Row], number: int) -> float:
    """Return the bits per weight of a format over all matrices, weighted by matrix size."""
    weights = [math.prod(row["shape"]) for row in rows]
    return statistics.fmean([row["codecs"][number]["bits_per_weight"] for row in rows], weights)


def _plot_codecs(figure: Any, groups: dict[str, list[Row]]) -> bool:
    codecs = next(iter(groups.values()))[0]["codecs"]
    if not codecs:
        return False
    figure.set_size_inches(max(6, 0.9 * len(groups) + 2), 2.4 * len(codecs) + 0.6)
    kinds = (("real", "C3", "o"), ("shuffled", "C0", "x"), ("noise", "0.5", "_"))
    for number, panel in enumerate(figure.subplots(len(codecs), 1, sharex=True, squeeze=False)[:, 0]):
        for place, members in enumerate(groups.values()):
            for shift, (kind, colour, marker) in zip((-0.18, 0, 0.18), kinds, strict=True):
                errors = [row["codecs"][number][kind] for row in members]
                label = kind if place == 0 else None
                panel.scatter([place + shift] * len(errors), errors, color=colour, marker=marker, s=28, label=label)
        bits = bits_over_all([row for members in groups.values() for row in members], number)
        title = f"{short_name(from_spec(codecs[number]['codec']))}: {bits:z.2f} bits per weight"
        panel.set(title=title, xticks=range(len(groups)), xticklabels=list(groups), ylabel="relative error")
        panel.title.set_fontsize(9)
        every = [
            codec[kind]
            for members in groups.values()
            for row in members
            for codec in [row["codecs"][number]]
            for kind, _, _ in kinds
        ]
        panel.set_ylim(0.95 * min(every), 1.05 * max(every))  # a difference of 0.01 % should not fill the plot
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return True
