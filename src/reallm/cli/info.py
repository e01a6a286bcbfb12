"""`reallm info`: print the ledger of a compressed model."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by reallm compress.")],
    matrices: Annotated[
        bool, typer.Option("--matrices", help="Also list every matrix with its format and bytes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole ledger as JSON.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Verify the checksums of all tensors first."),
    ] = True,
) -> None:
    """Show where every byte of a compressed model goes.

    The total equals the size of the files on disk.
    """
    from reallm.cli.tables.ledger_table import ledger_dict, ledger_text

    print(json.dumps(ledger_dict(folder, verify), indent=2) if as_json else ledger_text(folder, matrices, verify))
