"""A job carried out: fit, write, and put the folder in its place by one rename."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reallm.allocate import MatrixInfo, Plan, PlanEntry
from reallm.allocate.options import LEAST_SHARE, Option, Options
from reallm.checkpoint import (
    STAGING,
    check_finished,
    check_finished_output,
    check_output,
    encode_tensors,
    encode_untrained_tensors,
    finished_file,
    open_work_folder,
    read_ledger,
    remove_work_folder,
    work_folder,
    write_shards,
)
from reallm.checkpoint.checksums import compute_checksums
from reallm.checkpoint.validation import read_json
from reallm.errors import ArtifactError, RecipeError
from reallm.formats import WeightFormat, from_spec, to_spec
from reallm.formats.base import add_prefix, strip_prefix
from reallm.formats.shared_decoders import PREFIX as SHARED
from reallm.kernels import set_mmap_threshold
from reallm.pipeline.artifact_size import ArtifactSize, nbytes_by_file, write_texts
from reallm.pipeline.byte_budget import adjust_plan, rename_plan, shrink_recipe, too_large_error
from reallm.pipeline.calibration_inputs import Progress
from reallm.pipeline.compress_settings import calibration_record, make_settings
from reallm.pipeline.fit_job import fit_all
from reallm.pipeline.job import Job
from reallm.pipeline.load_weight import check_finite, check_matrices
from reallm.pipeline.magnitudes import within_range
from reallm.pipeline.prepare_job import prepare

_CHANGED_PLAN = "changed.json"  # in the work folder: formats that differ from those the run began with
_CHANGES, _GUESSES = 10, 5

# Matrices of a model with billions of parameters; smaller blocks, of which a fit makes thousands, stay where they are.
_LARGE_BLOCK = 1 << 23  # bytes


def run(job: Job, out: Path, resume: bool = False, progress: Progress | None = None) -> None:
    """Compress every matrix of the job and put the artifact at `out`.

    With `resume`, matrices finished by an interrupted run are taken over, whenever it was killed. The work folder
    `<out>.work` is removed at the end. A job with a size is measured once everything is fitted: what entropy coding
    saved beyond expectation is spent on a few matrices, which are fitted again. A recipe beside a size is left as it is
    unless it is too large, and then a few of its matrices are fitted again in smaller formats.

    Errors: ArtifactError if `out` exists, or a work folder does and `resume` is not set; RecipeError if the
    interrupted run had another plan, or if a recipe is too large for its size; SourceError for weights that are not
    finite.
    """
    out = Path(out)
    check_output(out, resume)
    set_mmap_threshold(_LARGE_BLOCK)
    fingerprint = job.source.fingerprint()
    job = within_range(job)
    work, state = work_folder(out), _state(job, fingerprint)
    if finished := out.exists():
        # A job with a size may have changed formats on the way.
        check_finished_output(out, state, formats_may_differ=job.size is not None)
    with open_work_folder(work, state):
        if not finished:
            _fit_and_write(job, fingerprint, work, out, progress)
        remove_work_folder(work)


def _fit_and_write(job: Job, fingerprint: str, work: Path, out: Path, progress: Progress | None) -> None:
    """Fit everything, put the artifact together in the work folder, then in its place by one rename."""
    _check_weights(job, work)
    job, attempts = _resume_plan(job, work)
    fit_all(job, work, progress)
    staging = _stage_artifact(job, fingerprint, work)
    while (changed := _adjust_to_size(job, staging, attempts)) is not None:
        refit_names = _note_changes(job, changed, attempts, work)
        if progress:
            _, total = attempts.plans[-1]
            progress(
                f"{total:,} bytes for {job.size:,}; matrices in other formats: {len(refit_names)}", 0, len(refit_names)
            )
        job = changed
        fit_all(job, work, progress)
        staging = _stage_artifact(job, fingerprint, work)
    _check_size(job, staging)
    os.rename(staging, out)


def compress(model: str | Path, out: str | Path, *, resume: bool = False, **settings: Any) -> None:
    """Compress `model` into the folder `out`: `prepare` and `run` in one call.

    `settings` are those of `Settings`, more freely written: `size="60MB"`, `calibration="text.txt"`.
    Errors: those of `prepare` and `run`.
    """
    run(prepare(model, make_settings(**settings)), Path(out), resume)


def _state(job: Job, fingerprint: str) -> dict[str, Any]:
    """What must not change between an interrupted run and its resumption."""
    return {
        "source": fingerprint,
        "seed": job.settings.seed,
        "device": job.settings.device,
        "calibration": calibration_record(job.settings),
        "plan": {m.name: to_spec(p.fmt) for m, p in job.compressed_matrices},
    }


def _check_weights(job: Job, work: Path) -> None:
    """Tensors that are kept, and with calibration the others too, which calculate with each other: before any work.

    Without, nothing depends on a matrix before it is read and checked; and an analysis has checked them all.
    """
    analysed = job.forecast is not None and job.forecast.calibrated
    if job.settings.calibration and not analysed:
        check_matrices(
            job, (matrix for matrix, _ in job.compressed_matrices if not finished_file(work, matrix.name).is_file())
        )
    for name in job.unquantized:
        tensor = job.source.read(name)
        if tensor.is_floating_point():
            check_finite(name, tensor)


def _stage_artifact(job: Job, fingerprint: str, work: Path) -> Path:
    """The whole artifact in a folder inside the work folder."""
    staging = work / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    coded: dict[str, tuple[str, ...]] = {}
    write_shards(_tensors(job, work, coded), staging)
    _write_auxiliary_files(job, fingerprint, coded, staging)
    return staging


def _tensors(job: Job, work: Path, coded: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact in the order they are written: matrices, kept tensors, markers.

    Notes in `coded` the local names of those that are entropy-coded, by matrix.
    """
    from reallm.hf import marker_tensors

    for matrix, planned in job.compressed_matrices:
        with safe_open(finished_file(work, matrix.name), framework="pt") as file:
            tensors = strip_prefix(matrix.name, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dict
        if job.coding:
            tensors, names = (
                encode_tensors(tensors) if job.size is None else encode_untrained_tensors(planned.fmt, tensors)
            )
            coded |= {matrix.name: names} if names else {}
        yield from add_prefix(matrix.name, tensors).items()
    for name in job.plan.shared_decoders:
        with safe_open(finished_file(work, f"{SHARED}.{name}"), framework="pt") as file:
            stored = {local: file.get_tensor(local) for local in file.keys()}  # noqa: SIM118 - no dict
        yield from add_prefix(f"{SHARED}.{name}", stored).items()
    for name in job.unquantized:
        yield name, job.source.read(name)
    yield from marker_tensors([matrix for matrix, _ in job.compressed_matrices]).items()


def _write_auxiliary_files(job: Job, fingerprint: str, coded: dict[str, tuple[str, ...]], folder: Path) -> None:
    """Config, tokenizer, generation settings, and the plan as run."""
    write_texts(job, fingerprint, coded, folder, compute_checksums(folder.glob("*.safetensors")))
    job.source.save_auxiliary_files(folder)


@dataclass
class _Attempts:
    """Artifacts that were staged on the way to a size: their plans with all bytes, and bytes by matrix and format."""

    plans: list[tuple[Plan, int]] = field(default_factory=list)
    known: dict[tuple[str, WeightFormat], int] = field(default_factory=dict)

    def best(self, size: int) -> Plan | None:
        """The plan that fills the size best without exceeding it."""
        fitting = [(total, -number, plan) for number, (plan, total) in enumerate(self.plans) if total <= size]
        return max(fitting, key=lambda row: row[:2])[2] if fitting else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        known = [[name, to_spec(fmt), nbytes] for (name, fmt), nbytes in self.known.items()]
        return {"plans": [[_formats(plan), total] for plan, total in self.plans], "known": known}

    @staticmethod
    def from_dict(values: dict[str, Any], job: Job) -> _Attempts:
        """The inverse, for the matrices of a job."""
        plans = [(_replace_formats(job, formats), int(total)) for formats, total in values["plans"]]
        return _Attempts(plans, {(name, from_spec(spec)): int(nbytes) for name, spec, nbytes in values["known"]})


def _formats(plan: Plan) -> dict[str, Any]:
    return {entry.matrix.name: to_spec(entry.fmt) for entry in plan.entries}


def _replace_formats(job: Job, formats: dict[str, Any]) -> Plan:
    """The plan that a job as it was prepared has become."""
    entries = tuple(PlanEntry(entry.matrix, from_spec(formats[entry.matrix.name])) for entry in job.plan.entries)
    plan = dataclasses.replace(job.plan, entries=entries)
    size = job.size
    return plan if job.settings.recipe is None or size is None else rename_plan(job.plan, plan, size)


def _adjust_to_size(job: Job, staging: Path, attempts: _Attempts) -> Job | None:
    """The job with a few other formats, which brings the staged artifact into its budget; None if nothing is to do.

    What has not been measured counts as expected at first, and then with all the bytes it can take, so that the last
    changes do not exceed the budget. When nothing new is left to try, the best of what was tried is taken. A recipe may
    be smaller than its budget.
    """
    if job.forecast is None or job.size is None:
        return None
    size, total = job.size, _used_bytes(job, staging)
    least = math.ceil(LEAST_SHARE * size)
    stored = _stored_bytes(job, staging)
    again = any(plan == job.plan for plan, _ in attempts.plans)
    guess = len(attempts.plans) < _GUESSES
    attempts.plans.append((job.plan, total))
    attempts.known.update({(entry.matrix.name, entry.fmt): stored[entry.matrix.name] for entry in job.plan.entries})
    known = attempts.known

    def nbytes_of(matrix: MatrixInfo, option: Option) -> int:
        unknown = option.nbytes if guess else option.fmt.nbytes(matrix.shape)
        return known.get((matrix.name, option.fmt), unknown)

    # What config.json says of coded tensors and the digits of offsets are not predicted.
    whole = ArtifactSize(job)
    constant = total - sum(stored.values()) - whole.overhead(job.plan)
    options = job.forecast.options
    if job.settings.recipe is not None:
        if total <= size:
            return None
        recipe = attempts.plans[0][0]
        if len(attempts.plans) > _CHANGES:
            raise too_large_error(recipe, total, size)
        plan = shrink_recipe(whole, recipe, options, size, total, nbytes_of, constant)
        return dataclasses.replace(job, plan=plan)
    if again or len(attempts.plans) > _CHANGES:
        best = attempts.best(size)
        return None if best is None or best == job.plan else dataclasses.replace(job, plan=best)
    if least <= total <= size:
        return None
    plan = adjust_plan(whole, job.plan, options, size, nbytes_of, constant)
    plan = plan or attempts.best(size) or _smallest(job.plan, options)
    return None if plan == job.plan else dataclasses.replace(job, plan=plan)


def _smallest(plan: Plan, options: Options) -> Plan:
    """Return the plan that the size was checked against: every matrix in the fewest bytes before entropy coding."""
    entries = [
        PlanEntry(
            e.matrix, min((o.fmt for o in options[e.matrix.name]), key=lambda fmt, e=e: fmt.nbytes(e.matrix.shape))
        )
        for e in plan.entries
    ]
    return dataclasses.replace(plan, entries=tuple(entries))


def _stored_bytes(job: Job, staging: Path) -> dict[str, int]:
    """Bytes in the file of every planned matrix."""
    stored = {entry.matrix.name: 0 for entry in job.plan.entries}
    for row in read_ledger(staging).rows:
        if row.matrix is not None:
            stored[row.matrix] += row.nbytes
    return stored


def _note_changes(before: Job, after: Job, attempts: _Attempts, work: Path) -> list[str]:
    """Remember the changed formats, so that an interrupted run goes on with them, and drop what they replace.

    Returns the names of the matrices that have them.
    """
    old, formats = _formats(before.plan), _formats(after.plan)
    changed = [name for name in formats if formats[name] != old[name]]
    partial = work / f"{_CHANGED_PLAN}.partial"
    text = json.dumps({"size": after.size, "formats": formats, "changed": changed, "past": attempts.to_dict()})
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, work / _CHANGED_PLAN)
    for name in changed:
        finished_file(work, name).unlink(missing_ok=True)
    return changed


def _resume_plan(job: Job, work: Path) -> tuple[Job, _Attempts]:
    """The job with the formats that an interrupted run had changed to, and what that run had tried.

    Errors: RecipeError if that run had another size.
    """
    path = work / _CHANGED_PLAN
    if not path.is_file():
        return job, _Attempts()
    try:
        noted = read_json(path)
        size = noted.get("size", job.size)
        plan, attempts = _replace_formats(job, noted["formats"]), _Attempts.from_dict(noted["past"], job)
        changed = set(noted["changed"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged; remove {work} to start again") from error
    if size != job.size:
        raise RecipeError(
            f"--resume: the size was {size} bytes and is now {job.size}; go back to that, or remove {work}"
        )
    job = dataclasses.replace(job, plan=plan)
    for matrix, planned in job.compressed_matrices:
        file = finished_file(work, matrix.name)
        if matrix.name in changed and file.is_file():
            try:
                check_finished(file, add_prefix(matrix.name, planned.fmt.layout(matrix.shape)))
            except ArtifactError:  # the run was interrupted before it was dropped
                file.unlink()
    return job, attempts


def _used_bytes(job: Job, staging: Path) -> int:
    """Bytes of a size that the staged artifact takes, those left for tuning counted."""
    return sum(nbytes_by_file(staging).values()) + job.reserved_for_tuning


def _check_size(job: Job, staging: Path) -> None:
    if job.size is None:
        return
    total = _used_bytes(job, staging)
    if total > job.size:
        unquantized = f", {job.reserved_for_tuning} that are left for tuning counted"
        raise RecipeError(f"the artifact takes {total:,} bytes of {job.size:,}{unquantized}; give a smaller size")
