"""A job carried out: fit, write, and put the folder in its place by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reallm.allocate import recipe_of_plan
from reallm.allocate.recipe import dump_recipe
from reallm.artifact import (
    STAGING,
    check_finished_output,
    check_output,
    finished_file,
    opened,
    remove,
    work_folder,
    write_shards,
)
from reallm.artifact.integrity import checksums_of
from reallm.formats import to_spec
from reallm.pipeline.fitting import Progress, check_finite, fit_all
from reallm.pipeline.job import Job, info_of, prepare
from reallm.pipeline.settings import Settings, calibration_of

PLAN_FILE = "plan.yaml"


def run(job: Job, out: Path, resume: bool = False, progress: Progress | None = None) -> None:
    """Compress every matrix of the job and put the artifact at `out`.

    With `resume`, matrices finished by an interrupted run are taken over, whenever it was killed. The work folder
    `<out>.work` is removed at the end.

    Errors: ArtifactError if `out` exists, or a work folder does and `resume` is not set; RecipeError if the
    interrupted run had another plan; SourceError for weights that are not finite.
    """
    out = Path(out)
    check_output(out, resume)
    fingerprint = job.source.fingerprint()
    work, state = work_folder(out), _state(job, fingerprint)
    if finished := out.exists():
        check_finished_output(out, state)
    with opened(work, state):
        if not finished:
            _check_kept(job)
            fit_all(job, work, progress)
            _write(job, fingerprint, work, out)
        remove(work)


def _write(job: Job, fingerprint: str, work: Path, out: Path) -> None:
    """Put the artifact together in the work folder, then in its place by one rename."""
    staging = work / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    write_shards(_tensors(job, work), staging)
    _write_companions(job, fingerprint, staging)
    os.rename(staging, out)


def compress(model: str | Path, out: str | Path, *, resume: bool = False, **settings: Any) -> None:
    """Compress `model` into the folder `out`: `prepare` and `run` in one call; settings as in `Settings`."""
    run(prepare(model, Settings(**settings)), Path(out), resume)


def _state(job: Job, fingerprint: str) -> dict[str, Any]:
    """What must not change between an interrupted run and its resumption."""
    return {
        "source": fingerprint,
        "seed": job.settings.seed,
        "device": job.settings.device,
        "calibration": calibration_of(job.settings),
        "plan": {m.name: to_spec(p.fmt) for m, p in job.compressed},
    }


def _check_kept(job: Job) -> None:
    """Tensors that are kept, before hours of fitting the others."""
    for name in job.kept:
        tensor = job.source.read(name)
        if tensor.is_floating_point():
            check_finite(name, tensor)


def _tensors(job: Job, work: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact in the order they are written: matrices, kept tensors, markers."""
    from reallm.model import marker_tensors

    for matrix, _ in job.compressed:
        with safe_open(finished_file(work, matrix.name), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                yield name, file.get_tensor(name)
    for name in job.kept:
        yield name, job.source.read(name)
    yield from marker_tensors([matrix for matrix, _ in job.compressed]).items()


def _write_companions(job: Job, fingerprint: str, folder: Path) -> None:
    """Config, tokenizer, generation settings, and the plan as run."""
    from reallm.model import write_config

    checksums = checksums_of(folder.glob("*.safetensors"))
    write_config(job.source, replace(job.manifest(fingerprint), checksums=checksums), folder)
    job.source.save_companions(folder)
    recipe = recipe_of_plan(job.plan, [info_of(matrix) for matrix in job.walk.matrices])
    (folder / PLAN_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
