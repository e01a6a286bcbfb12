"""`reallm pack`: pack a state dict into one file under a size limit."""

from pathlib import Path
from typing import Annotated

import typer

from reallm.cli.shared_options import Seed, note_missing_formats


def command(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="State dict as a safetensors file, of any model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File to write; must not exist.")],
    max_bytes: Annotated[
        str,
        typer.Option("--max-bytes", metavar="SIZE", help="Size limit of the file: bytes, or 16MB (decimal), 15MiB, …"),
    ],
    extra_files: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="Code file to include, compressed; may be repeated."),
    ] = None,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device for fitting: cpu, cuda, cuda:1 …")
    ] = "cpu",
    matrices: Annotated[
        bool, typer.Option("--matrices", help="Also list every matrix with its bytes and error.")
    ] = False,
) -> None:
    """Pack a state dict and code files into one file.

    Reads the file back, and prints the error and the remaining bytes. Decoding it needs only numpy.
    """
    from reallm.allocate.options import parse_size
    from reallm.cli.tables.pack_table import packed_text
    from reallm.pipeline.pack_file import pack

    note_missing_formats()
    report = pack(state, output, parse_size(max_bytes), extra_files or (), seed, device)
    print(packed_text(report, output, matrices))
