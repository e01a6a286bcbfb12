"""`reallm formats`: list the weight formats, and measure them."""

import json
import sys
from typing import Annotated

import typer

from reallm.cli.shared_options import parse_formats


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these formats; default: all.")
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            help="Show only this format, plus the named ones; as in a recipe: '{format: trellis, bits: 2, "
            "state_bits: 16}'; may be repeated.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure error and time of each format on Gaussian weights.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device to measure on: cpu, cuda, cuda:1 …")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the weight formats with fields, papers and bits per weight.

    With --measure, also prints the error on independent normal weights next to the rate-distortion bound at the same
    bits, and the seconds to fit and to decode.
    """
    from reallm.cli.tables.format_table import formats_dict, formats_text, measure_formats
    from reallm.source.devices import check_device

    more = parse_formats(spec or [], "--spec")
    check_device(device)
    names = names or []
    if measure:
        found = measure_formats(names, device=device, progress=_progress, more=more)
    else:
        found = formats_dict(names, more=more)
    print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) if as_json else formats_text(found))


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
