"""`reallm recipes`: list the shipped recipes."""

from typing import Annotated

import typer


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe as YAML, to copy and edit.")
    ] = None,
) -> None:
    """List the shipped recipes, or print one."""
    from reallm.allocate import load_recipe, shipped_recipes
    from reallm.allocate.recipe import dump_recipe

    if name is not None:
        print(dump_recipe(load_recipe(name)), end="")
        return
    for recipe in shipped_recipes().values():
        print(f"{recipe.name:<12} {recipe.description}")
