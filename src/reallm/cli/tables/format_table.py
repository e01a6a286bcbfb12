"""Tables and JSON of the registered formats, read from the format classes."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from reallm.cli.tables.names import short_name
from reallm.cli.tables.text_table import table
from reallm.errors import MissingPackageError
from reallm.fit import Quality, gaussian_quality
from reallm.formats import Shape, WeightFormat, example_formats, known_format, known_formats, to_spec

SHAPE: Shape = (1024, 1024)
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")

Measure = Callable[[WeightFormat, Shape], Quality]
Entry = dict[str, Any]


def formats_dict(
    names: Sequence[str] = (),
    shape: Shape = SHAPE,
    measure: Measure | None = None,
    progress: Callable[[str], None] | None = None,
    more: Sequence[WeightFormat] = (),
) -> dict[str, Any]:
    """Return the example settings of the named formats plus `more`, or of all formats, as JSON values.

    `measure` measures each setting; a setting whose package is missing is skipped with a call of `progress`.
    Errors: FormatError for an unknown name, listing the known ones, and for a format that cannot store `shape`.
    """
    named = [known_format(name) for name in names] or ([] if more else known_formats().values())
    chosen = {cls: example_formats(cls) for cls in named}
    for fmt in more:
        chosen.setdefault(type(fmt), []).append(fmt)
    entries = {cls.name: _entry(cls, fmts, shape, measure, progress) for cls, fmts in chosen.items()}
    return {"shape": list(shape), "formats": entries}


def measure_formats(
    names: Sequence[str] = (),
    shape: Shape = SHAPE,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
    more: Sequence[WeightFormat] = (),
) -> dict[str, Any]:
    """Return `formats_dict` with the quality of every setting on a Gaussian matrix."""
    return formats_dict(names, shape, lambda fmt, shape: gaussian_quality(fmt, shape, device), progress, more)


def formats_text(found: dict[str, Any]) -> str:
    """Return a paragraph per format, then one table of all settings."""
    paragraphs = [_paragraph(name, entry) for name, entry in found["formats"].items()]
    settings = [setting for entry in found["formats"].values() for setting in entry["settings"]]
    return "\n\n".join([*paragraphs, *([_settings_table(settings, found["shape"])] if settings else [])])


def _entry(
    cls: type[WeightFormat],
    fmts: Sequence[WeightFormat],
    shape: Shape,
    measure: Measure | None,
    progress: Callable[[str], None] | None,
) -> Entry:
    settings = []
    for fmt in fmts:
        if progress and measure:
            progress(f"measuring {short_name(fmt)}")
        try:
            settings.append(_setting_entry(fmt, shape, measure))
        except MissingPackageError as error:
            settings.append(_setting_entry(fmt, shape))
            if progress:
                progress(f"not measured: {error}")
    return {
        "description": _first_line(cls.__doc__),
        "fields": [_field(field) for field in dataclasses.fields(cls)],  # type: ignore[arg-type]
        "papers": _papers(cls),
        "decoding": _first_line(cls.decode.__doc__),
        "settings": settings,
    }


def _setting_entry(fmt: WeightFormat, shape: Shape, measure: Measure | None = None) -> Entry:
    """Return one setting as JSON values, measured if `measure` is given.

    Errors: FormatError if it cannot store `shape`.
    """
    fmt.check(shape)
    quality = measure(fmt, shape) if measure else None
    return {
        "name": short_name(fmt),
        "spec": to_spec(fmt),
        "nbytes": fmt.nbytes(shape),
        "bits_per_weight": fmt.bits_per_weight(shape),
        "measured": None if quality is None else _quality_dict(quality),
    }


def _quality_dict(quality: Quality) -> dict[str, float | None]:
    figures = {
        "relative_error": quality.relative_error,
        "shannon_error": quality.shannon_error,
        "gap_bits": quality.gap_bits,
        "fit_seconds_per_million": quality.fit_seconds_per_million,
        "decode_seconds_per_million": quality.decode_seconds_per_million,
    }
    # JSON has no infinity, which is the gap of a lossless format.
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _field(field: dataclasses.Field) -> Entry:
    required = field.default is field.default_factory is dataclasses.MISSING
    return {
        "name": field.name,
        "type": str(field.type),
        "required": required,
        "default": None if required else field.default,
    }


def _papers(cls: type[WeightFormat]) -> list[str]:
    """Return the distinct arXiv ids in the docstrings of the format and its module, in order."""
    words = f"{sys.modules[cls.__module__].__doc__} {cls.__doc__}"
    return list(dict.fromkeys(_PAPER.findall(words)))


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _paragraph(name: str, entry: Entry) -> str:
    fields = (f["name"] if f["required"] else f"{f['name']}={f['default']}" for f in entry["fields"])
    lines = [
        f"{name}: {entry['description']}",
        f"  fields    {', '.join(fields) or 'none'}",
        f"  decoding  {entry['decoding']}",
    ]
    if entry["papers"]:
        lines.append(f"  papers    {', '.join(f'arXiv:{paper}' for paper in entry['papers'])}")
    return "\n".join(lines)


def _settings_table(settings: Sequence[Entry], shape: Sequence[int]) -> str:
    header = ["setting", "bits/weight"]
    rows = [[s["name"], f"{s['bits_per_weight']:.3f}"] for s in settings]
    matrix = f"{shape[0]}×{shape[1]} matrix"
    if not any(s["measured"] for s in settings):
        return f"{table(header, rows)}\n\nbits/weight: all overhead included, for a {matrix}."
    header += ["error", "bound", "gap, bits", "fit, s/M", "decode, s/M"]
    for row, setting in zip(rows, settings, strict=True):
        row += _figures(setting["measured"])
    return (
        f"{table(header, rows)}\n\n"
        f"bits/weight: all overhead included, for a {matrix}. error: relative squared error on independent\n"
        "normal weights. bound: 2^(-2·bits), the rate-distortion bound. gap: bits above the rate-distortion bound for\n"
        "this error. s/M: seconds per million weights; decoding starts from stored tensors."
    )


def _figures(measured: dict[str, float | None] | None) -> list[str]:
    if measured is None:
        return 5 * ["–"]
    gap = measured["gap_bits"]
    return [
        f"{measured['relative_error']:.3g}",
        f"{measured['shannon_error']:.3g}",
        "–" if gap is None else f"{gap:.3f}",
        f"{measured['fit_seconds_per_million']:.3f}",
        f"{measured['decode_seconds_per_million']:.4f}",
    ]
