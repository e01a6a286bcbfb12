"""The `reallm` command. Each subcommand is one file: parse options, call one function, print the result."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import reallm
from reallm.errors import ReallmError

# The order of `reallm --help`; NAME is the function `command` in reallm/cli/NAME.py.
# --help imports these files too, so slow imports belong inside the functions.
COMMANDS = (
    "compress",
    "plan",
    "tune",
    "merge",
    "info",
    "recipes",
    "formats",
    "analyze",
    "eval",
    "generate",
    "pack",
)

# Plain help and errors can be copied, searched with grep and read by a screen reader, and look the same everywhere.
app = typer.Typer(rich_markup_mode=None, add_completion=False)


def _print_version(requested: bool) -> bool:
    if requested:
        print(f"reallm {reallm.__version__}")
        raise typer.Exit()
    return requested


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress Hugging Face language models to a target size; every stored byte is accounted for.

    Start with: reallm compress MODEL -o OUT --bits 3 --dry-run
    """


for _name in COMMANDS:
    app.command(_name)(importlib.import_module(f"reallm.cli.{_name}").command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a user error (one line on stderr), 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Warnings of these libraries are meant for programmers; the environment can override both settings.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return app(arguments or ["--help"], prog_name="reallm", standalone_mode=False) or 0
    except ReallmError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader closed the pipe: reallm … | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the flush at exit fails again
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # Usage errors of Typer: their module depends on its version, these two attributes do not.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            command = getattr(getattr(error, "ctx", None), "command_path", "reallm")
            return _fail(f"{error.format_message().rstrip('.')}. See: {command} --help")
        raise


def _fail(message: str) -> int:
    # Names are read from untrusted files and may contain terminal control characters.
    line = "".join(char if char.isprintable() else "?" for char in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    return 2
