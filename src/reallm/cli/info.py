"""`reallm info`: the ledger of a compressed model."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by reallm compress.")],
    matrices: Annotated[bool, typer.Option("--matrices", help="Also list every matrix with its bytes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every row as JSON.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare a compressed model's tensors with their checksums first."),
    ] = True,
) -> None:
    """Where every byte went; the total is that of the files on disk."""
    from reallm.cli.tables.ledger_table import ledger_dict, ledger_text

    print(json.dumps(ledger_dict(folder, verify), indent=2) if as_json else ledger_text(folder, matrices, verify))
