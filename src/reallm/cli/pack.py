"""`reallm pack`: any state dict in one file under a hard cap."""

from pathlib import Path
from typing import Annotated

import typer

from reallm.cli.options import Seed, note_left_out


def command(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="State dict as safetensors; no model is needed.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File to write; must not exist.")],
    max_bytes: Annotated[
        str,
        typer.Option("--max-bytes", metavar="SIZE", help="Hard cap of the file: bytes, or 16MB (decimal), 15MiB, …"),
    ],
    with_files: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="Code file to pack too, compressed; may be repeated."),
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where to fit: cpu, cuda, cuda:1 …")] = "cpu",
    matrices: Annotated[
        bool, typer.Option("--matrices", help="Also list every matrix with its bytes and error.")
    ] = False,
) -> None:
    """Pack a state dict and code files into one file, read it back, and print error and margin."""
    from reallm.allocate.options import parse_size
    from reallm.pipeline.packing import pack
    from reallm.report.packed import packed_text

    note_left_out()
    report = pack(state, output, parse_size(max_bytes), with_files or (), seed, device)
    print(packed_text(report, output, matrices))
