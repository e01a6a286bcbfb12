"""`reallm analyze`: measure the structure of weight matrices."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from reallm.cli.progress import progress_bar
from reallm.cli.shared_options import Model, Seed, parse_formats


def command(
    model: Model,
    matrix: Annotated[
        list[str] | None,
        typer.Option("--matrix", metavar="PATTERN", help="Only matrices whose name matches; may be repeated."),
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            "--block",
            metavar="N",
            help="Only this decoder block, -1 for the last; may be repeated. Default: 0, 1, the middle and the last, "
            "plus embedding and lm_head.",
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="NAME", help="Only matrices with this role (q, down, …); may be repeated."),
    ] = None,
    every_block: Annotated[bool, typer.Option("--all", help="Analyze every block.")] = False,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="SPEC",
            help="Format to fit, as in a recipe: '{format: uniform, bits: 3}'; may be repeated. none: no formats. "
            "Default: uniform, codebook and rotated trellis.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", help="Analyze at most N rows and N columns of a matrix.")
    ] = 2048,
    by_matrix: Annotated[
        bool, typer.Option("--by-matrix", help="Print one row per matrix instead of one per role.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all results as JSON; must not exist.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Write structure.json and, with matplotlib, spectra.png, orders.png and codecs.png; none of them may "
            "exist.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device for the computation: cpu, cuda, cuda:1 …")
    ] = "cpu",
) -> None:
    """Measure structure in weights that a format could exploit.

    Reports singular values, scales of rows and columns, tails, row and column orders with their storage cost, and
    format errors on the matrix and on shuffled copies. Gaussian noise with the same row and column scales is the
    control for chance.
    """
    from reallm.analyze import DEFAULT_CODECS, Scope, analyze, estimate_seconds, prepare
    from reallm.cli.tables.structure import check_writable, structure_text, work_line, write_structure

    scope = Scope(
        matrices=tuple(matrix or ()),
        blocks=tuple(block or ()),
        roles=tuple(role or ()),
        every_block=every_block,
        sample=sample,
        codecs=DEFAULT_CODECS if codec is None else () if codec == ["none"] else parse_formats(codec, "--codec"),
        seed=seed,
        device=device,
    )
    check_writable(json_file, output)
    work = prepare(model, scope)
    print(work_line(work, estimate_seconds(work)), file=sys.stderr)
    with progress_bar() as progress:
        found = analyze(work, progress)
    written = write_structure(found, json_file, output)  # before printing: `| head` ends the command early
    print(structure_text(found, by_matrix))
    if written:
        plots = output is None or any(file.suffix == ".png" for file in written)
        note = "" if plots else " (no plots: matplotlib is not installed)"
        print(f"\nwritten: {', '.join(map(str, written))}{note}")
