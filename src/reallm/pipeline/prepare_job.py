"""Prepare a job: source → walk → plan. Nothing is fitted or written yet."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from reallm.allocate import MatrixInfo, Plan, Recipe, load_recipe, plan_from_recipe
from reallm.errors import RecipeError
from reallm.pipeline.budget import plan_for_budget
from reallm.pipeline.calibration_inputs import Progress, clamp_windows
from reallm.pipeline.compress_settings import Settings, check_calibration, check_goal, resolve_objective
from reallm.pipeline.job import Job, matrix_info
from reallm.source import Matrix, Source, Walk, open_source, walk
from reallm.source.devices import check_device


def prepare(
    model: str | Path | Source, settings: Settings, progress: Progress | None = None, analyse: bool = True
) -> Job:
    """Open the model, unless it is open already, and choose the format of every matrix.

    The settings of the job are reduced to the windows in the calibration text. `progress` reports the analysis that a
    budget with calibration requires. If `analyse` is false, as for a dry run, a stored analysis is used if there is
    one; otherwise losses are predicted by roles, and the plan of a run with `analyse` may differ.
    Errors: SourceError, RecipeError, FormatError or TextError, before anything is written.
    """
    check_goal(settings)
    check_calibration(settings)
    if settings.rank is not None and settings.rank < 0:
        raise RecipeError(f"--rank {settings.rank} is negative; 0 means no residual")
    check_device(settings.device)
    _check_folders(settings)
    recipe = None if settings.recipe is None else load_recipe(settings.recipe)
    settings = resolve_objective(settings, recipe)
    source = model if isinstance(model, Source) else open_source(model)
    source.check()
    settings = clamp_windows(source, settings)
    walked = walk(source.skeleton)
    chosen = [matrix_info(matrix) for matrix in _select_matrices(walked.matrices, settings)]
    infos = [matrix_info(matrix) for matrix in walked.matrices]
    if recipe is not None:
        job = _plan_recipe(source, walked, chosen, infos, settings, recipe)
        if settings.size is not None or settings.bits_per_parameter is not None:
            job = plan_for_budget(source, walked, chosen, settings, job.plan, progress, analyse)
    else:
        job = plan_for_budget(source, walked, chosen, settings, progress=progress, analyse=analyse)
    _check_plan(job.plan, walked)
    return job


def _check_folders(settings: Settings) -> None:
    """Check the cache folders before any work. Errors: RecipeError if one is a file."""
    for option, folder in (("--fits", settings.fits), ("--analysis", settings.analysis)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise RecipeError(f"{option} {folder}: is a file; give a folder")


def _plan_recipe(
    source: Source, walked: Walk, chosen: list[MatrixInfo], infos: list[MatrixInfo], settings: Settings, recipe: Recipe
) -> Job:
    embedding_formats = {"embedding": settings.embedding, "head": settings.head}
    recipe = recipe.model_copy(update={kind: spec for kind, spec in embedding_formats.items() if spec is not None})
    plan = plan_from_recipe(recipe, chosen, settings.rank, infos)
    return Job(source, walked, plan, settings, recipe.coding if settings.coding is None else settings.coding)


def _select_matrices(matrices: Sequence[Matrix], settings: Settings) -> list[Matrix]:
    """Return the matrices selected by --include and --exclude.

    Errors: RecipeError for a pattern that matches nothing.
    """
    names = [matrix.name for matrix in matrices]
    for option, patterns in (("--include", settings.include), ("--exclude", settings.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{option} {pattern!r} fits no matrix (one is {names[0] if names else 'none'})")

    def is_selected(name: str) -> bool:
        included = not settings.include or any(fnmatch.fnmatchcase(name, p) for p in settings.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in settings.exclude)

    return [matrix for matrix in matrices if is_selected(matrix.name)]


def _check_plan(plan: Plan, walked: Walk) -> None:
    """Check the plan. Errors: RecipeError if nothing would be compressed, or only some experts of one tensor."""
    if not plan.entries:
        raise RecipeError("the plan compresses nothing; loosen --include/--exclude, or leave less unquantized")
    planned = {entry.matrix.name for entry in plan.entries}
    experts: dict[str, list[bool]] = defaultdict(list)
    for matrix in walked.matrices:
        if matrix.expert is not None:
            experts[matrix.parameter].append(matrix.name in planned)
    for parameter, chosen in experts.items():
        if any(chosen) and not all(chosen):
            raise RecipeError(
                f"{parameter}: {sum(chosen)} of {len(chosen)} experts would be compressed, but they are one tensor; "
                f"select all or none ({parameter}.*)"
            )
