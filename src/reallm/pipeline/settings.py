"""What the user chose, and whether it can be."""

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
from reallm.errors import RecipeError
from reallm.fit.objective import GUIDED, OBJECTIVES, OUTPUTS
from reallm.model.calibration import SELF
from reallm.model.text import load_text, text_sha256


@dataclass(frozen=True)
class Settings:
    """What the user chose: one of `bits`, `size`, `bits_per_parameter` and `recipe`.

    A recipe beside one of the two in the middle is kept if it fits. If it is too large, at most half of its matrices
    get smaller formats; if that is not enough, it is refused.
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
    calibration: tuple[str, ...] = ()  # text files, or "self"; without any, fits know the weights alone
    calibration_windows: int = 128
    calibration_context: int = 2048
    objective: str | None = None  # what calibration makes of its inputs: OBJECTIVES; None: see `decided`
    coding: bool | None = None  # entropy-code stored tensors; None: as the recipe says, and under a size
    state_bits: int | None = None  # of trellis candidates, 0 for none; None: 16 on a GPU, none on a CPU
    analysis: str | None = None  # folder that keeps what losses are predicted from, for the next budget
    analysis_windows: int = 16
    analysis_context: int = 1024
    fits: str | None = None  # folder that keeps fitted matrices, for the next budget
    corrections: str | None = None  # file of what is known better than predicted
    candidates: tuple[str, ...] = ()  # what a budget may choose beside its own list: words of allocate.candidates.MORE


_LISTS = ("calibration", "include", "exclude", "candidates")
_PATHS = ("recipe", "analysis", "fits", "corrections")
_NUMBERS = ("bits", "bits_per_parameter")


def settings_from(**values: Any) -> Settings:
    """Settings of what one may give in Python: a size as text too, paths, and one file or pattern in place of several.

    Errors: RecipeError naming the type of what is none of these.
    """
    known = dict(values)
    for name in values.keys() & set(_LISTS):
        known[name] = _several(name, values[name])
    for name in values.keys() & set(_PATHS):
        known[name] = None if values[name] is None else _text(name, values[name])
    for name in values.keys() & set(_NUMBERS):
        if values[name] is not None and not isinstance(values[name], numbers.Real):
            raise _wrong(name, values[name], "give a number")
    if values.get("size") is not None:
        known["size"] = _bytes(values["size"])
    return Settings(**known)


def _bytes(size: Any) -> int:
    if isinstance(size, str):
        return parse_size(size)
    if not isinstance(size, numbers.Integral) or isinstance(size, bool):
        raise _wrong("size", size, "give bytes as an int, or text such as '60MB'")
    return int(size)


def _several(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str | os.PathLike):
        return (_text(name, value),)
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise _wrong(name, value, "give text, or a list of texts")
    return tuple(_text(name, one) for one in value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise _wrong(name, value, "give text or a path")
    return os.fspath(value)


def _wrong(name: str, value: Any, remedy: str) -> RecipeError:
    return RecipeError(f"{name}={value!r} is of type {type(value).__name__}; {remedy}")


def calibration_of(settings: Settings) -> dict[str, Any] | None:
    """Text, windows and context of the calibration as provenance keeps them; None without."""
    if not settings.calibration:
        return None
    texts = [SELF if path == SELF else text_sha256(path) for path in settings.calibration]
    return {
        "texts": texts,
        "windows": settings.calibration_windows,
        "context": settings.calibration_context,
        "objective": settings.objective,
    }


def for_analysis(settings: Settings) -> Settings:
    """The settings with the windows that an analysis reads: the first few of the text, and no longer than it needs."""
    context = min(settings.calibration_context, settings.analysis_context)
    most = settings.calibration_windows * (settings.calibration_context // context)  # in the text that calibrates
    windows = min(settings.analysis_windows, most)
    return dataclasses.replace(settings, calibration_windows=windows, calibration_context=context)


def decided(settings: Settings, recipe: Recipe | None) -> Settings:
    """The settings with an objective: theirs, the recipe's, or the default.

    Under a budget with calibration `guided`: every codec measured gained by it (2 bits: trellis 53.5 to 49.0, entropy-
    coded 89.5 to 56.9 in perplexity, results/calibrated.json), and the budget's analysis asks the whole original for
    gradients anyway. A recipe alone holds one block of the original at a time, and `outputs` leaves it so.
    """
    if settings.objective is not None:
        return settings
    if not settings.calibration:
        return dataclasses.replace(settings, objective=OUTPUTS)
    if recipe is not None and recipe.objective is not None:
        return dataclasses.replace(settings, objective=recipe.objective)
    alone = recipe is not None and settings.size is None and settings.bits_per_parameter is None
    return dataclasses.replace(settings, objective=OUTPUTS if alone else GUIDED)


def check_calibration(settings: Settings) -> None:
    """Errors: RecipeError or TextError for a calibration that cannot be."""
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
    """Errors: RecipeError unless exactly one goal is given, and a possible one."""
    goals = {"--bits": "bits", "--size": "size", "--bits-per-parameter": "bits_per_parameter", "--recipe": "recipe"}
    given = [option for option, field in goals.items() if getattr(settings, field) is not None]
    nudged = set(given) in ({"--recipe", "--size"}, {"--recipe", "--bits-per-parameter"})
    if set(given) == {"--bits", "--recipe"}:
        raise RecipeError("give either --bits or --recipe, not both")
    if len(given) != 1 and not nudged:
        raise RecipeError(f"give one of {', '.join(goals)}" + (f", not {' and '.join(given)}" if given else ""))
    if settings.bits_per_parameter is not None and not 0 < settings.bits_per_parameter <= 64:
        raise RecipeError(f"--bits-per-parameter {settings.bits_per_parameter:g} is not above 0 and up to 64")
    for word in settings.candidates:
        if word not in MORE:
            raise RecipeError(f"--candidates {word!r} is not one of {', '.join(MORE)}")
    if settings.candidates and not set(given) - {"--recipe"}:
        raise RecipeError("--candidates is for budgets, and --recipe names every format; give --bits or --size")
    if settings.state_bits is not None and settings.state_bits != 0 and not 6 <= settings.state_bits <= 16:
        raise RecipeError(f"--state-bits {settings.state_bits} is neither 0 nor in 6 … 16")
