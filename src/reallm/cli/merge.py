"""`reallm merge`: merge an adapter into a compressed model."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by reallm compress or reallm tune.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder written by reallm tune --adapter, or as LoRA by PEFT.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT2", help="Folder to write; must not exist.")],
) -> None:
    """Merge an adapter into a compressed model.

    Codes stay unchanged; the adapter becomes a bfloat16 residual around each format. The artifact grows by
    2 · rank · (rows + columns) bytes per matrix, about the size of the adapter, and may exceed the size limit of OUT:
    bits and bytes before and after are printed. For several tasks over one model, keep the adapters separate:
    generate and eval take --adapter.
    """
    from reallm.cli.tables.merge_table import merged_text
    from reallm.tuning.adapter_merge import merge

    merge(artifact, adapter, output)
    print(merged_text(artifact, adapter, output))
