"""`reallm formats`: what a matrix can be stored as, and how good that is."""

import json
import sys
from typing import Annotated

import typer

from reallm.cli.options import formats_of


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these formats; default: all.")
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            help="A setting, as in a recipe: '{format: trellis, bits: 2, state_bits: 16}'; may be repeated. Only these "
            "and the formats named.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure error and time of each setting on Gaussian weights.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to measure: cpu, cuda, cuda:1 …")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the formats of a matrix: fields, papers, and the bits of a few settings, or of those given.

    With --measure also the error on independent normal weights beside the least that any code can reach
    with as many bits, and the seconds to fit and to decode.
    """
    from reallm.model.devices import check_device
    from reallm.report.formats import formats_dict, formats_text, measured_formats

    more = formats_of(spec or [], "--spec")
    check_device(device)
    names = names or []
    if measure:
        found = measured_formats(names, device=device, progress=_progress, more=more)
    else:
        found = formats_dict(names, more=more)
    print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) if as_json else formats_text(found))


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
