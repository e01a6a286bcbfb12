"""docs/cli.md from the commands' own declarations: `python tools/cli_reference.py > docs/cli.md`.

Made from the same words that --help shows, not from its layout, which changes with Typer's versions.
"""

import importlib
import inspect
import typing
from collections.abc import Callable

from reallm.cli import COMMANDS

HEAD = """# Commands

Made by `make docs` from what `reallm COMMAND --help` shows; do not edit.

Results go to stdout, progress to stderr. Exit codes: 0; 2 for a mistake that you can fix, named in one
line on stderr; 130 after Ctrl-C.
"""


def reference() -> str:
    """All commands as Markdown, in the order of `reallm --help`."""
    sections = (_section(name, importlib.import_module(f"reallm.cli.{name}").command) for name in COMMANDS)
    return "\n".join([HEAD, *sections])


def _section(name: str, command: Callable) -> str:
    parameters = inspect.signature(command).parameters.values()
    hints = typing.get_type_hints(command, include_extras=True)
    declared = [(parameter, hints[parameter.name].__metadata__[0]) for parameter in parameters]
    arguments = [info.metavar for _, info in declared if _is_argument(info)]
    return "\n".join(
        [
            f"## reallm {name}",
            "",
            f"`reallm {' '.join([name, *arguments])} [OPTIONS]`",
            "",
            inspect.getdoc(command) or "",
            "",
            "| | default | |",
            "| --- | --- | --- |",
            *(_row(parameter, info) for parameter, info in declared),
            "",
        ]
    )


def _row(parameter: inspect.Parameter, info: typing.Any) -> str:
    return f"| `{_name(parameter, info)}` | {_default(parameter)} | {info.help} |".replace("|  |", "| |")


def _is_argument(info: typing.Any) -> bool:
    return type(info).__name__ == "ArgumentInfo"


def _name(parameter: inspect.Parameter, info: typing.Any) -> str:
    if _is_argument(info):
        return info.metavar
    names = ", ".join(declared_names(info))
    # A bar would end the cell of the table.
    return f"{names} {info.metavar.replace('|', ' or ')}" if info.metavar else names


def declared_names(info: typing.Any) -> list[str]:
    """Return the names in `typer.Option("--json")`.

    Inside Annotated its first place, meant for the default, has one too. Every option states them: Typer 0.27 gives
    `size` and `spec` no names of their own.
    """
    return [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    # A flag that is off, or an option that is not given, says so in its help.
    return "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"


if __name__ == "__main__":
    print(reference(), end="")
