"""The `reallm` command. Every other file in here is one subcommand: parse, call one function, print."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import reallm
from reallm.errors import ReallmError

# One line a command, in the order of `reallm --help`: NAME is the function `command` of reallm/cli/NAME.py.
# These files are imported for --help too, so that what is slow to import belongs inside the function.
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

# Plain help and errors: they can be copied, grepped and read by a screen reader, and are the same everywhere.
app = typer.Typer(rich_markup_mode=None, add_completion=False)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"reallm {reallm.__version__}")
        raise typer.Exit()
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compress Hugging Face language models to a stated number of bits, every stored byte accounted for."""


for _name in COMMANDS:
    app.command(_name)(importlib.import_module(f"reallm.cli.{_name}").command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 0, 2 for what the user can mend (one line), 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Notices of the libraries below are for those who program with them; both can be set from outside.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return app(arguments or ["--help"], prog_name="reallm", standalone_mode=False) or 0
    except ReallmError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader has seen enough: reallm … | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the flush at exit fails once more
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # Typer's own complaints. Its versions take them from different modules; they share these two attributes.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            command = getattr(getattr(error, "ctx", None), "command_path", "reallm")
            return _fail(f"{error.format_message().rstrip('.')}. See: {command} --help")
        raise


def _fail(message: str) -> int:
    # Names come out of files: one may hold what moves a terminal's cursor.
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    return 2
