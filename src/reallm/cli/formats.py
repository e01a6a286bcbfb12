"""`reallm formats`: what a matrix can be stored as, and how good that is."""

import json
import sys
from typing import Annotated

import typer


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these formats; default: all.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure error and time of each setting on Gaussian weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the formats of a matrix: fields, papers, and the bits of a few settings.

    With --measure also the error on independent normal weights beside the least that any code can reach
    with as many bits, and the seconds to fit and to decode.
    """
    from reallm.report.formats import formats_dict, formats_text, measured_formats

    names = names or []
    found = measured_formats(names, progress=_progress) if measure else formats_dict(names)
    print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) if as_json else formats_text(found))


def _progress(setting: str) -> None:
    print(f"measuring {setting}", file=sys.stderr)
