"""Settings of a compression job, and their validation."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reallm.allocate.candidates import MORE
from reallm.allocate.options import parse_size
from reallm.allocate.recipe import FormatSpec, Recipe
from reallm.calibrate.text import load_text, text_sha256
from reallm.calibrate.windows import SELF
from reallm.errors import RecipeError
from reallm.fit.objective import GUIDED, OBJECTIVES, OUTPUTS


@dataclass(frozen=True)
class Settings:
    """User settings with exactly one goal: `bits`, `size`, `bits_per_parameter` or `recipe`.

    A recipe may be combined with `size` or `bits_per_parameter`. It stays unchanged if it fits. If it is too large, at
    most half of its matrices get smaller formats; if that does not suffice, the job fails.
    """

    bits: float | int | None = None
    recipe: str | None = None
    size: int | None = None  # bytes of the whole artifact
    bits_per_parameter: float | int | None = None  # 8 · bytes of the whole artifact / parameters of the model
    rank: int | None = None
    seed: int = 0
    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embedding: FormatSpec | None = None  # None: the recipe's, or 8 bits
    head: FormatSpec | None = None
    calibration: tuple[str, ...] = ()  # text files, or "self"; if empty, fits use only the weights
    calibration_windows: int = 128
    calibration_context: int = 2048
    objective: str | None = None  # one of OBJECTIVES; None: see `resolve_objective`
    coding: bool | None = None  # entropy-code stored tensors; None: by the recipe, and yes with a size
    state_bits: int | None = None  # of trellis candidates, 0 for none; None: 16 on a GPU, none on a CPU
    analysis: str | None = None  # folder that caches the analysis for loss prediction, for later budgets
    analysis_windows: int = 16
    analysis_context: int = 1024
    fits: str | None = None  # folder that caches fitted matrices, for later budgets
    corrections: str | None = None  # file with corrections to predicted losses
    candidates: tuple[str, ...] = ()  # extra candidates for a budget: names in allocate.candidates.MORE


_LISTS = ("calibration", "include", "exclude", "candidates")
_PATHS = ("recipe", "analysis", "fits", "corrections")
_NUMBERS = ("bits", "bits_per_parameter")


def make_settings(**values: Any) -> Settings:
    """Return Settings from Python values: a size may be text, files may be paths, and a list may be a single value.

    Errors: RecipeError naming a value of an unsupported type.
    """
    converted = dict(values)
    for name in values.keys() & set(_LISTS):
        converted[name] = _text_tuple(name, values[name])
    for name in values.keys() & set(_PATHS):
        converted[name] = None if values[name] is None else _text(name, values[name])
    for name in values.keys() & set(_NUMBERS):
        if values[name] is not None and not isinstance(values[name], numbers.Real):
            raise _type_error(name, values[name], "give a number")
    if values.get("size") is not None:
        converted["size"] = _parse_bytes(values["size"])
    return Settings(**converted)


def _parse_bytes(size: Any) -> int:
    if isinstance(size, str):
        return parse_size(size)
    if not isinstance(size, numbers.Integral) or isinstance(size, bool):
        raise _type_error("size", size, "give bytes as an int, or text such as '60MB'")
    return int(size)


def _text_tuple(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str | os.PathLike):
        return (_text(name, value),)
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise _type_error(name, value, "give text, or a list of texts")
    return tuple(_text(name, item) for item in value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise _type_error(name, value, "give text or a path")
    return os.fspath(value)


def _type_error(name: str, value: Any, remedy: str) -> RecipeError:
    return RecipeError(f"{name}={value!r} is of type {type(value).__name__}; {remedy}")


def calibration_record(settings: Settings) -> dict[str, Any] | None:
    """Return texts, windows, context and objective as provenance stores them; None without calibration."""
    if not settings.calibration:
        return None
    texts = [SELF if path == SELF else text_sha256(path) for path in settings.calibration]
    return {
        "texts": texts,
        "windows": settings.calibration_windows,
        "context": settings.calibration_context,
        "objective": settings.objective,
    }


def analysis_settings(settings: Settings) -> Settings:
    """Return the settings for an analysis: the first windows of the calibration text, with a context it can use."""
    context = min(settings.calibration_context, settings.analysis_context)
    available = settings.calibration_windows * (settings.calibration_context // context)  # in the calibration text
    windows = min(settings.analysis_windows, available)
    return dataclasses.replace(settings, calibration_windows=windows, calibration_context=context)


def resolve_objective(settings: Settings, recipe: Recipe | None) -> Settings:
    """Return the settings with an objective: their own, the recipe's, or the default.

    The default for a budget with calibration is `guided`: it improved every codec measured (2 bits: trellis from
    perplexity 53.5 to 49.0, entropy-coded from 89.5 to 56.9, results/calibrated.json), and the analysis for the budget
    computes gradients of the whole original model anyway. The default for a recipe without a size is `outputs`, which
    needs only one block of the original model in memory at a time.
    """
    if settings.objective is not None:
        return settings
    if not settings.calibration:
        return dataclasses.replace(settings, objective=OUTPUTS)
    if recipe is not None and recipe.objective is not None:
        return dataclasses.replace(settings, objective=recipe.objective)
    recipe_only = recipe is not None and settings.size is None and settings.bits_per_parameter is None
    return dataclasses.replace(settings, objective=OUTPUTS if recipe_only else GUIDED)


def check_calibration(settings: Settings) -> None:
    """Check the calibration settings. Errors: RecipeError or TextError if they are invalid."""
    if settings.objective not in (None, *OBJECTIVES):
        raise RecipeError(f"--objective {settings.objective!r} is not one of {', '.join(OBJECTIVES)}")
    if settings.objective not in (None, OUTPUTS) and not settings.calibration:
        raise RecipeError(f"--objective {settings.objective} needs text: give --calibration FILE or self")
    if SELF in settings.calibration and len(settings.calibration) > 1:
        raise RecipeError("--calibration self cannot be mixed with files")
    for option in ("windows", "context"):
        value, least = getattr(settings, f"calibration_{option}"), {"windows": 1, "context": 2}[option]
        if value < least:
            raise RecipeError(f"--calibration-{option} {value} is below {least}")
    for path in settings.calibration:
        if path != SELF:
            load_text(path, "--calibration")


def check_goal(settings: Settings) -> None:
    """Check the goal. Errors: RecipeError unless exactly one valid goal is given."""
    goals = {"--bits": "bits", "--size": "size", "--bits-per-parameter": "bits_per_parameter", "--recipe": "recipe"}
    given = [option for option, field in goals.items() if getattr(settings, field) is not None]
    has_sized_recipe = set(given) in ({"--recipe", "--size"}, {"--recipe", "--bits-per-parameter"})
    if set(given) == {"--bits", "--recipe"}:
        raise RecipeError("give either --bits or --recipe, not both")
    if len(given) != 1 and not has_sized_recipe:
        raise RecipeError(f"give one of {', '.join(goals)}" + (f", not {' and '.join(given)}" if given else ""))
    if settings.bits_per_parameter is not None and not 0 < settings.bits_per_parameter <= 64:
        raise RecipeError(f"--bits-per-parameter {settings.bits_per_parameter:g} is not in (0, 64]")
    for name in settings.candidates:
        if name not in MORE:
            raise RecipeError(f"--candidates {name!r} is not one of {', '.join(MORE)}")
    if settings.candidates and not set(given) - {"--recipe"}:
        raise RecipeError("--candidates applies to budgets, but --recipe names every format; give --bits or --size")
    if settings.state_bits is not None and settings.state_bits != 0 and not 6 <= settings.state_bits <= 16:
        raise RecipeError(f"--state-bits {settings.state_bits} is neither 0 nor in 6 … 16")
