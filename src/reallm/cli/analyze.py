"""`reallm analyze`: what structure the matrices of a model have."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from reallm.cli.options import Model, Seed, formats_of
from reallm.cli.progress import progress_bar


def command(
    model: Model,
    matrix: Annotated[
        list[str] | None,
        typer.Option("--matrix", metavar="PATTERN", help="Only matrices whose name fits; may be repeated."),
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            "--block",
            metavar="N",
            help="Only these decoder blocks, -1 for the last; may be repeated. Without: 0, 1, the middle and the last, "
            "with embedding and head.",
        ),
    ] = None,
    role: Annotated[
        list[str] | None, typer.Option("--role", metavar="NAME", help="Only these roles (q, down, …); may be repeated.")
    ] = None,
    every_block: Annotated[bool, typer.Option("--all", help="Every block.")] = False,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="SPEC",
            help="Format to try, as in a recipe: '{format: uniform, bits: 3}'; may be repeated. none: no codecs. "
            "Without: uniform, codebook and rotated trellis.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", help="Rows and columns of a larger matrix that are looked at.")
    ] = 2048,
    by_matrix: Annotated[bool, typer.Option("--by-matrix", help="Print every matrix, not every role.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything as JSON. Must not exist.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Write structure.json, and with matplotlib spectra.png, orders.png and codecs.png; none of them may "
            "be there yet.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to calculate: cpu, cuda, cuda:1 …")
    ] = "cpu",
) -> None:
    """Show what codes could use: spectra, scales, tails, orders with their bytes, and codecs on shuffled copies.

    Everything stands beside Gaussian noise with the same scales of rows and columns, so that chance can be told apart.
    """
    from reallm.analyze import DEFAULT_CODECS, Scope, analyze, prepare, seconds
    from reallm.report.structure import check_writable, structure_text, work_line, write_structure

    scope = Scope(
        matrices=tuple(matrix or ()),
        blocks=tuple(block or ()),
        roles=tuple(role or ()),
        every_block=every_block,
        sample=sample,
        codecs=DEFAULT_CODECS if codec is None else () if codec == ["none"] else formats_of(codec, "--codec"),
        seed=seed,
        device=device,
    )
    check_writable(json_file, output)
    work = prepare(model, scope)
    print(work_line(work, seconds(work)), file=sys.stderr)
    with progress_bar() as progress:
        found = analyze(work, progress)
    written = write_structure(found, json_file, output)  # before the tables: `| head` ends the command at the first
    print(structure_text(found, by_matrix))
    if written:
        pictures = output is None or any(file.suffix == ".png" for file in written)
        note = "" if pictures else " (no matplotlib, no pictures)"
        print(f"\nwritten: {', '.join(map(str, written))}{note}")
