"""Short names of formats and models."""

from __future__ import annotations

from pathlib import Path

from reallm.formats import WeightFormat, to_spec
from reallm.source import Source


def model_name(source: Source) -> str:
    """Of the original, without the folders that it lies in."""
    return Path(source.label).name or source.label


def short_name(fmt: WeightFormat) -> str:
    """A format in one word and its fields, inner formats in brackets: `codebook 6 2 64 two_level`."""
    spec = {key: value for key, value in to_spec(fmt).items() if key not in ("format", "base")}
    said = {key: value for key, value in spec.items() if value is not False and value != ""}
    text = " ".join([fmt.name, *(key if value is True else str(value) for key, value in said.items())])
    base = fmt.children().get("base")
    return f"{text} [{short_name(base)}]" if base else text
