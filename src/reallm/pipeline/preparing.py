"""source → walk → plan: what will become of a model. Nothing is fitted or written yet."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from reallm.allocate import MatrixInfo, Plan, Recipe, load_recipe, plan_from_recipe
from reallm.errors import RecipeError
from reallm.model import Matrix, Source, Walk, open_source, walk
from reallm.model.devices import check_device
from reallm.pipeline.budgeting import from_budget
from reallm.pipeline.calibrating import Progress, with_windows_there_are
from reallm.pipeline.job import Job, info_of
from reallm.pipeline.settings import Settings, check_calibration, check_goal, decided


def prepare(
    model: str | Path | Source, settings: Settings, progress: Progress | None = None, analyse: bool = True
) -> Job:
    """Open the model, unless it is open already, and decide every matrix's format.

    The job's settings have the windows of calibration text that there are. `progress` of the analysis that a budget
    with calibration takes. Without `analyse`, as for a dry run, it takes none: an analysis that is kept already is
    used, else losses are predicted by roles, and a run with `analyse` may have another plan.
    Errors: SourceError, RecipeError, FormatError or TextError, before anything is written.
    """
    check_goal(settings)
    check_calibration(settings)
    if settings.rank is not None and settings.rank < 0:
        raise RecipeError(f"--rank {settings.rank} is negative; 0 means no residual")
    check_device(settings.device)
    _check_folders(settings)
    recipe = None if settings.recipe is None else load_recipe(settings.recipe)
    settings = decided(settings, recipe)
    source = model if isinstance(model, Source) else open_source(model)
    source.check()
    settings = with_windows_there_are(source, settings)
    walked = walk(source.skeleton)
    chosen = [info_of(matrix) for matrix in _selected(walked.matrices, settings)]
    infos = [info_of(matrix) for matrix in walked.matrices]
    if recipe is not None:
        job = _from_recipe(source, walked, chosen, infos, settings, recipe)
        if settings.size is not None or settings.bits_per_parameter is not None:
            job = from_budget(source, walked, chosen, settings, job.plan, progress, analyse)
    else:
        job = from_budget(source, walked, chosen, settings, progress=progress, analyse=analyse)
    _check_plan(job.plan, walked)
    return job


def _check_folders(settings: Settings) -> None:
    """Errors: RecipeError if what is kept for other budgets could not be: better before the work than after it."""
    for option, folder in (("--fits", settings.fits), ("--analysis", settings.analysis)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise RecipeError(f"{option} {folder}: is a file; give a folder")


def _from_recipe(
    source: Source, walked: Walk, chosen: list[MatrixInfo], infos: list[MatrixInfo], settings: Settings, recipe: Recipe
) -> Job:
    ends = {"embedding": settings.embedding, "head": settings.head}
    recipe = recipe.model_copy(update={kind: spec for kind, spec in ends.items() if spec is not None})
    plan = plan_from_recipe(recipe, chosen, settings.rank, infos)
    return Job(source, walked, plan, settings, recipe.coding if settings.coding is None else settings.coding)


def _selected(matrices: Sequence[Matrix], settings: Settings) -> list[Matrix]:
    """Matrices that --include and --exclude leave.

    Errors: RecipeError for a pattern that fits nothing.
    """
    names = [matrix.name for matrix in matrices]
    for option, patterns in (("--include", settings.include), ("--exclude", settings.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{option} {pattern!r} fits no matrix (one is {names[0] if names else 'none'})")

    def wanted(name: str) -> bool:
        included = not settings.include or any(fnmatch.fnmatchcase(name, p) for p in settings.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in settings.exclude)

    return [matrix for matrix in matrices if wanted(matrix.name)]


def _check_plan(plan: Plan, walked: Walk) -> None:
    """Errors: RecipeError if nothing would be compressed, or only some experts of one tensor."""
    if not plan.entries:
        raise RecipeError("the plan compresses nothing; loosen --include/--exclude, or keep less")
    planned = {entry.matrix.name for entry in plan.entries}
    experts: dict[str, list[bool]] = defaultdict(list)
    for matrix in walked.matrices:
        if matrix.expert is not None:
            experts[matrix.parameter].append(matrix.name in planned)
    for parameter, chosen in experts.items():
        if any(chosen) and not all(chosen):
            raise RecipeError(
                f"{parameter}: {sum(chosen)} of {len(chosen)} experts would be compressed, but they are one tensor; "
                f"take all or none ({parameter}.*)"
            )
