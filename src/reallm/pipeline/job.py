"""A model and what will become of it: source → walk → plan. Nothing is computed or written yet."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reallm.allocate import MatrixInfo, Plan, Planned, load_recipe, plan_for_bits, plan_from_recipe
from reallm.allocate.recipe import DEFAULT_EMBEDDING
from reallm.artifact import Manifest, StoredMatrix
from reallm.errors import RecipeError
from reallm.fit import gaussian_error
from reallm.model import Matrix, Source, Walk, open_source, walk
from reallm.model.walk import LEFT_OUT
from reallm.pipeline.settings import Settings, calibration_of, check_calibration, check_device


@dataclass(frozen=True)
class Job:
    """A model and what will become of it; nothing is computed or written yet."""

    source: Source
    walk: Walk
    plan: Plan
    settings: Settings

    @property
    def compressed(self) -> list[tuple[Matrix, Planned]]:
        """The matrices to compress, in model order, with their formats."""
        planned = {entry.matrix.name: entry for entry in self.plan.entries}
        return [(matrix, planned[matrix.name]) for matrix in self.walk.matrices if matrix.name in planned]

    @property
    def kept(self) -> dict[str, str]:
        """Tensors that stay as they are, with the reason."""
        reasons = {kept.name: kept.reason for kept in self.walk.kept}
        planned = {entry.matrix.name for entry in self.plan.entries}
        left_out = {m.parameter: LEFT_OUT for m in self.walk.matrices if m.name not in planned}
        return reasons | left_out

    def manifest(self, fingerprint: str) -> Manifest:
        """What the loader must know."""
        matrices = tuple(StoredMatrix(m.name, p.fmt, m.shape, m.kind) for m, p in self.compressed)
        return Manifest(matrices, provenance(self, fingerprint))


def prepare(model: str | Path, settings: Settings) -> Job:
    """Open the model and decide every matrix's format.

    Errors: SourceError, RecipeError or FormatError, before anything is written.
    """
    if (settings.bits is None) == (settings.recipe is None):
        raise RecipeError("give either --bits or --recipe" + (", not both" if settings.recipe else ""))
    check_calibration(settings)
    if settings.rank is not None and settings.rank < 0:
        raise RecipeError(f"--rank {settings.rank} is negative; 0 means no residual")
    check_device(settings.device)
    source = open_source(model)
    walked = walk(source.skeleton)
    chosen = [info_of(matrix) for matrix in _selected(walked.matrices, settings)]
    plan = _plan(chosen, [info_of(matrix) for matrix in walked.matrices], settings)
    _check_plan(plan, walked)
    return Job(source, walked, plan, settings)


def provenance(job: Job, fingerprint: str) -> dict[str, Any]:
    """Where the artifact comes from; no time and no path, so that equal runs give equal bytes."""
    import reallm

    return {
        "reallm": reallm.__version__,
        "source": Path(job.source.label).name,
        "source_sha256": fingerprint,
        "recipe": job.plan.recipe,
        "seed": job.settings.seed,
        "device": torch.device(job.settings.device).type,
        "calibration": calibration_of(job.settings),
        "torch": torch.__version__,
    }


def _plan(infos: Sequence[MatrixInfo], model: Sequence[MatrixInfo], settings: Settings) -> Plan:
    """The plan for `infos`, which are all or some of the model's matrices."""
    ends = {"embedding": settings.embedding, "head": settings.head}
    chosen = {kind: spec for kind, spec in ends.items() if spec is not None}
    if settings.bits is not None:
        specs = dict.fromkeys(ends, DEFAULT_EMBEDDING) | chosen
        return plan_for_bits(float(settings.bits), infos, gaussian_error, settings.rank, **specs)
    assert settings.recipe is not None
    recipe = load_recipe(settings.recipe).model_copy(update=chosen)
    return plan_from_recipe(recipe, infos, settings.rank, model)


def info_of(matrix: Matrix) -> MatrixInfo:
    return MatrixInfo(matrix.name, matrix.shape, matrix.role, matrix.kind, matrix.block)


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
