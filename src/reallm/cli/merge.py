"""`reallm merge`: an adapter folded into a compressed model."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by reallm compress or reallm tune.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder written by reallm tune --adapter, or by PEFT's LoRA.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT2", help="Folder to write; must not exist.")],
) -> None:
    """Write a compressed model with an adapter in it, which loads as any other and needs the adapter no longer.

    Codes stay as they are; the adapter becomes a bfloat16 residual around each format. That makes the file larger by
    2 · rank · (rows + columns) bytes per matrix, about the bytes of the adapter, and a size that OUT was made for may
    no     longer hold: bits and bytes before and after are printed. To have several tasks over one model, keep their
    adapters: generate and eval take --adapter.
    """
    from reallm.cli.tables.merge_table import merged_text
    from reallm.tuning.adapter_merge import merge

    merge(artifact, adapter, output)
    print(merged_text(artifact, adapter, output))
