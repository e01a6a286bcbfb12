"""Options that several commands have in the same words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder with safetensors, hub id, or GGUF file.")
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything that is drawn.")]
Adapter: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="Adapter to use over the model: written by reallm tune --adapter, or by PEFT's LoRA.",
    ),
]
Include: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="Compress only matrices that fit; may be repeated."),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Keep matrices that fit as they are; may be repeated."),
]
Corrections: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--corrections",
        metavar="FILE",
        help="YAML with factors or figures for predicted losses, and candidate formats.",
    ),
]
Candidates: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--candidates",
        metavar="WORD",
        help="What a budget may choose beside its own list: neural (codewords that a small net makes, shared by all "
        "matrices that take them; up to 12 index bits on a CPU, 16 elsewhere).",
    ),
]


def note_left_out() -> None:
    """Tell on stderr what a budget cannot choose from, and what to install."""
    from reallm.allocate.candidates import left_out

    if line := left_out():
        print(line, file=sys.stderr)


def formats_of(specs: Sequence[str], option: str) -> tuple[Any, ...]:
    """Formats in the words of a recipe.

    Errors: RecipeError for what is no YAML, FormatError for no format.
    """
    from reallm.allocate.recipe import read_yaml
    from reallm.formats import from_spec

    return tuple(from_spec(read_yaml(spec, option)) for spec in specs)
