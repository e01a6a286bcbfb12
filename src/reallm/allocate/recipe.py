"""Recipes: rules that assign a format to every matrix, as a YAML file or shipped with the library.

    name: example
    description: one line
    rules:                       # the first rule that matches a matrix applies
      - role: [v, k]
        format: {format: normal_float, bits: 6}
      - match: "*.mlp.down_proj"
        block: [0, -1]           # the first and the last decoder block
        format: {format: normal_float, bits: 4}
      - match: "*"
        format: {format: normal_float, bits: 3}
    embedding: {format: uniform, bits: 8}   # or `keep`
    head: {format: uniform, bits: 8}        # or `keep`; a head tied to the embedding is the embedding
    coding: true                 # tensors that entropy coding makes smaller are stored coded; default false
    objective: guided            # what calibration minimises, if there is any: outputs or guided

A format of `keep` leaves the matrix unquantized.
"""

from __future__ import annotations

import fnmatch
import reprlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from reallm.allocate.format_plan import PER_LAYER, ROLES, MatrixInfo, Plan, PlanEntry
from reallm.errors import RecipeError
from reallm.formats import WeightFormat, from_spec, to_spec
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.uniform import Uniform

KEEP = "keep"
LARGEST_YAML = 4_000_000  # characters, and values after expanding aliases: the plan of a model of 70,000 matrices
DEEPEST_YAML = 24
# 8 bits in groups of 64 change an embedding's rows by less than 0.5 %: perplexity stays the same.
DEFAULT_EMBEDDING = to_spec(Uniform(bits=8, group_size=64, symmetric=True))

FormatSpec = dict[str, Any] | Literal["keep"]


def _wrap_in_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


class Rule(BaseModel):
    """Assigns a format to block matrices by name pattern, role, block number, or to all of them.

    Blocks may be counted from the end: -1 is the last.
    """

    model_config = ConfigDict(extra="forbid")
    match: list[str] | None = None
    role: list[str] | None = None
    block: list[int] | None = None
    format: FormatSpec

    _lists = field_validator("match", "role", "block", mode="before")(_wrap_in_list)

    def matches(self, matrix: MatrixInfo, depth: int) -> bool:
        """Return whether the matrix meets every given condition; `depth` is the number of decoder blocks."""
        named = self.match is None or any(fnmatch.fnmatchcase(matrix.name, pattern) for pattern in self.match)
        placed = self.block is None or bool({matrix.block, (matrix.block or 0) - depth} & set(self.block))
        return named and placed and (self.role is None or matrix.role in self.role)

    def unmatched_patterns(self, matrices: Sequence[MatrixInfo]) -> list[str]:
        """Return the name patterns that match no matrix."""
        names = [matrix.name for matrix in matrices]
        return [pattern for pattern in self.match or [] if not fnmatch.filter(names, pattern)]


class Recipe(BaseModel):
    """A recipe file."""

    model_config = ConfigDict(extra="forbid")
    name: str = "unnamed"
    description: str = ""
    rules: list[Rule]
    embedding: FormatSpec = DEFAULT_EMBEDDING
    head: FormatSpec = DEFAULT_EMBEDDING
    coding: bool = False
    objective: Literal["outputs", "guided"] | None = None  # of fit.objective.OBJECTIVES; None: the default


def parse_recipe(text: str, origin: str) -> Recipe:
    """Parse a recipe from YAML; `origin` names it in errors.

    Errors: RecipeError for YAML that does not parse, unknown or missing keys; FormatError for bad formats.
    """
    try:
        values = read_yaml(text, origin)
        if not isinstance(values, dict):
            raise RecipeError(f"{origin}: not a recipe, which is a mapping with the key 'rules'")
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RecipeError(f"{origin}: {where}: {first['msg'].lower()} (got {reprlib.repr(first['input'])})") from error
    for role in [role for rule in recipe.rules for role in rule.role or []]:
        if role not in ROLES:
            raise RecipeError(f"{origin}: unknown role {role!r}; known roles: {', '.join(ROLES)}")
    for spec in [rule.format for rule in recipe.rules] + [recipe.embedding, recipe.head]:
        _format(spec, origin)
    return recipe


def read_yaml(text: str, origin: str) -> Any:
    """Parse YAML of bounded size and depth; values repeated by aliases count each time.

    Errors: RecipeError.
    """
    if len(text) > LARGEST_YAML:
        raise RecipeError(f"{origin}: {len(text):,} characters, more than {LARGEST_YAML:,}; no recipe needs that")
    try:
        values = yaml.safe_load(text)
    except Exception as error:  # yaml also lets exceptions of int, dates and recursion through
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(f"{origin}: not valid YAML ({reason})") from error
    _check_extent(values, origin)
    return values


def _check_extent(values: Any, origin: str) -> None:
    """Raise RecipeError for values that are too deep, or too many once aliases of aliases are expanded."""
    level, remaining = [values], LARGEST_YAML
    for _ in range(DEEPEST_YAML):
        level = [v for holder in level if isinstance(holder, dict | list | set) for v in _children(holder)]
        remaining -= len(level)
        if remaining < 0:
            raise RecipeError(f"{origin}: aliases (*) expand to more than {LARGEST_YAML:,} values")
        if not level:
            return
    raise RecipeError(f"{origin}: nested more than {DEEPEST_YAML} deep")


def _children(holder: Any) -> list[Any]:
    return [*holder, *holder.values()] if isinstance(holder, dict) else list(holder)


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes shipped with the library, by name."""
    folder = resources.files("reallm.allocate") / "shipped"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    recipes = [parse_recipe(file.read_text(encoding="utf-8"), file.name) for file in files]
    return {recipe.name: recipe for recipe in recipes}


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name, or a recipe file by path.

    Errors: RecipeError if it is neither (lists the shipped recipes) or does not parse.
    """
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise RecipeError(f"{name_or_path}: no such recipe file, and no shipped recipe; shipped: {', '.join(shipped)}")
    try:
        if path.stat().st_size > 4 * LARGEST_YAML:
            raise RecipeError(f"{name_or_path}: {path.stat().st_size:,} bytes; no recipe needs that")
        return parse_recipe(path.read_text(encoding="utf-8"), name_or_path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name_or_path}: not readable as text ({error})") from error


def plan_from_recipe(
    recipe: Recipe,
    matrices: Sequence[MatrixInfo],
    rank: int | None = None,
    model: Sequence[MatrixInfo] | None = None,
) -> Plan:
    """Return the plan of a recipe for a model; `rank` adds a low-rank residual to every block format (0: none).

    `model` lists all matrices of the model if `matrices` is only a part: patterns and block numbers refer to it.
    Errors: RecipeError if a pattern matches no matrix or a block matrix has no rule; FormatError if a format cannot
    store a shape.
    """
    blocks = [matrix for matrix in model or matrices if matrix.kind == "block"]
    nameable = [matrix for matrix in model or matrices if matrix.kind == "block" or matrix.role == PER_LAYER]
    for rule in recipe.rules:
        if unmatched_patterns := rule.unmatched_patterns(nameable):
            example = blocks[0].name if blocks else "none"
            raise RecipeError(
                f"recipe {recipe.name}: pattern {unmatched_patterns[0]!r} fits no matrix (one is {example})"
            )
    entries = []
    depth = 1 + max((matrix.block for matrix in blocks if matrix.block is not None), default=0)
    for matrix in matrices:
        spec = _find_spec(recipe, matrix, depth)
        fmt = _format(spec, recipe.name)
        if fmt is not None:
            entries.append(
                PlanEntry(matrix, LowRankPlus.replace_residual(fmt, rank) if matrix.kind == "block" else fmt)
            )
    plan = Plan(tuple(entries), recipe.name)
    plan.check()
    return plan


def recipe_of_plan(
    plan: Plan, matrices: Iterable[MatrixInfo], coding: bool = False, objective: str | None = None
) -> Recipe:
    """Return the plan as a recipe that names every matrix: running it again gives the same plan."""
    formats = {entry.matrix.name: to_spec(entry.fmt) for entry in plan.entries}
    matrices = list(matrices)
    embedding_and_head = {
        m.kind: formats.get(m.name, KEEP) for m in matrices if m.kind != "block" and m.role != PER_LAYER
    }
    blocks = [matrix for matrix in matrices if matrix.kind == "block"]
    # A per-layer embedding is named only where its format differs from the embedding's.
    default = embedding_and_head.get("embedding", DEFAULT_EMBEDDING)
    blocks += [m for m in matrices if m.role == PER_LAYER and formats.get(m.name, KEEP) != default]
    grouped: dict[str, tuple[FormatSpec, list[str]]] = {}
    for matrix in blocks:
        spec = formats.get(matrix.name, KEEP)
        grouped.setdefault(repr(spec), (spec, []))[1].append(matrix.name)
    rules = [Rule(match=names, format=spec) for spec, names in grouped.values()]
    more = {"coding": coding, "objective": objective, **embedding_and_head}
    return Recipe(name=plan.recipe, description="the plan as run", rules=rules, **more)


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML."""
    values = recipe.model_dump(exclude_none=True)
    if not recipe.coding:
        del values["coding"]
    return yaml.safe_dump(values, sort_keys=False, width=120)


def _find_spec(recipe: Recipe, matrix: MatrixInfo, depth: int) -> FormatSpec:
    if matrix.role == PER_LAYER:
        named = (rule.format for rule in recipe.rules if matrix.name in (rule.match or ()))
        return next(named, recipe.embedding)
    if matrix.kind != "block":
        return recipe.embedding if matrix.kind == "embedding" else recipe.head
    for rule in recipe.rules:
        if rule.matches(matrix, depth):
            return rule.format
    raise RecipeError(
        f'recipe {recipe.name}: no rule for {matrix.name} (role {matrix.role}); end with a rule for match: "*"'
    )


def _format(spec: FormatSpec, origin: str) -> WeightFormat | None:
    if spec == KEEP:
        return None
    try:
        return from_spec(spec)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{origin}: {error}") from error
