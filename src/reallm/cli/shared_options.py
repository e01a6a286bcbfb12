"""Options and helpers shared by several commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder with safetensors, hub id, or GGUF file.")
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of all random numbers.")]
Adapter: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="Adapter to load over the model, written by reallm tune --adapter or as LoRA by PEFT.",
    ),
]
Include: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Compress only matrices whose name matches, such as '*.mlp.*'; may be repeated.",
    ),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", help="Leave matrices whose name matches unquantized; may be repeated."
    ),
]
Corrections: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--corrections",
        metavar="FILE",
        help="[advanced] YAML file with corrections of predicted losses (factors or measured values) and candidate "
        "formats.",
    ),
]
Candidates: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--candidates",
        metavar="WORD",
        help="[advanced] Additional candidate formats for a budget: neural (neural codebooks: a small net, shared by "
        "all matrices that use it, computes the entries; up to 12 index bits on a CPU, 16 elsewhere).",
    ),
]


def note_missing_formats() -> None:
    """Print on stderr which candidate formats are unavailable, and what to install."""
    from reallm.allocate.candidates import missing_candidates

    if line := missing_candidates():
        print(line, file=sys.stderr)


def parse_formats(specs: Sequence[str], option: str) -> tuple[Any, ...]:
    """Parse formats written as in a recipe.

    Errors: RecipeError for invalid YAML, FormatError for an invalid format.
    """
    from reallm.allocate.recipe import read_yaml
    from reallm.formats import from_spec

    return tuple(from_spec(read_yaml(spec, option)) for spec in specs)
