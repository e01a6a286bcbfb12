"""Short names of formats and models."""

from __future__ import annotations

from pathlib import Path

from reallm.formats import WeightFormat, to_spec
from reallm.source import Source


def model_name(source: Source) -> str:
    """Return the name of the source model without its folders."""
    return Path(source.label).name or source.label


def short_name(fmt: WeightFormat) -> str:
    """Return the name and field values of a format, inner formats in brackets: `codebook 6 2 64 two_level`."""
    spec = {key: value for key, value in to_spec(fmt).items() if key not in ("format", "base")}
    said = {key: value for key, value in spec.items() if value is not False and value != ""}
    text = " ".join([fmt.name, *(key if value is True else str(value) for key, value in said.items())])
    base = fmt.children().get("base")
    return f"{text} [{short_name(base)}]" if base else text
