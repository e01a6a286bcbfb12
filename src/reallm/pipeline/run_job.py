"""Run a job: fit, write, and create the output folder by one rename."""

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
from reallm.pipeline.magnitudes import use_wide_range
from reallm.pipeline.prepare_job import prepare

_CHANGED_PLAN = "changed.json"  # in the work folder: the formats that differ from the initial plan
_CHANGES, _GUESSES = 10, 5

# Memory blocks of large matrices are mapped and returned to the system; a fit allocates thousands of smaller ones.
_LARGE_BLOCK = 1 << 23  # bytes


def run(job: Job, out: Path, resume: bool = False, progress: Progress | None = None) -> None:
    """Compress every matrix of the job and put the artifact at `out`.

    `resume` continues an interrupted run and reuses its finished matrices, whenever it was killed. The work folder
    `<out>.work` is removed at the end. The artifact of a job with a size is measured after fitting: a few matrices are
    fitted again in larger formats if entropy coding saved more than predicted. A recipe combined with a size stays
    unchanged unless it is too large; then a few of its matrices are fitted again in smaller formats.

    Errors: ArtifactError if `out` exists, or if a work folder exists and `resume` is false; RecipeError if the
    interrupted run had another plan, or if a recipe is too large for its size; SourceError for weights that are not
    finite.
    """
    out = Path(out)
    check_output(out, resume)
    set_mmap_threshold(_LARGE_BLOCK)
    fingerprint = job.source.fingerprint()
    job = use_wide_range(job)
    work, state = work_folder(out), _state(job, fingerprint)
    if finished := out.exists():
        # A job with a size may have changed formats during the run.
        check_finished_output(out, state, formats_may_differ=job.size is not None)
    with open_work_folder(work, state):
        if not finished:
            _fit_and_write(job, fingerprint, work, out, progress)
        remove_work_folder(work)


def _fit_and_write(job: Job, fingerprint: str, work: Path, out: Path, progress: Progress | None) -> None:
    """Fit everything, stage the artifact in the work folder, and move it to `out` by one rename."""
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

    `settings` are the fields of `Settings`; they may be text: `size="60MB"`, `calibration="text.txt"`.
    Errors: see `prepare` and `run`.
    """
    run(prepare(model, make_settings(**settings)), Path(out), resume)


def _state(job: Job, fingerprint: str) -> dict[str, Any]:
    """Return the state that must be equal in an interrupted run and its continuation."""
    return {
        "source": fingerprint,
        "seed": job.settings.seed,
        "device": job.settings.device,
        "calibration": calibration_record(job.settings),
        "plan": {m.name: to_spec(p.fmt) for m, p in job.compressed_matrices},
    }


def _check_weights(job: Job, work: Path) -> None:
    """Check the unquantized tensors before any work, and with calibration also the matrices.

    With calibration, each matrix affects the inputs of others. Without it, a matrix is checked when it is loaded for
    its fit. An analysis has already checked all matrices.
    """
    analysed = job.forecast is not None and job.forecast.calibrated
    if job.settings.calibration and not analysed:
        check_matrices(
            job, (matrix for matrix, _ in job.compressed_matrices if not finished_file(work, matrix.name).is_file())
        )
    for name in job.unquantized_tensors:
        tensor = job.source.read(name)
        if tensor.is_floating_point():
            check_finite(name, tensor)


def _stage_artifact(job: Job, fingerprint: str, work: Path) -> Path:
    """Write the whole artifact to a folder inside the work folder, and return that folder."""
    staging = work / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    coded: dict[str, tuple[str, ...]] = {}
    write_shards(_tensors(job, work, coded), staging)
    _write_auxiliary_files(job, fingerprint, coded, staging)
    return staging


def _tensors(job: Job, work: Path, coded: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the artifact in the order they are written: matrices, unquantized tensors, markers.

    Adds to `coded` the local names of the entropy-coded tensors, by matrix.
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
    for name in job.unquantized_tensors:
        yield name, job.source.read(name)
    yield from marker_tensors([matrix for matrix, _ in job.compressed_matrices]).items()


def _write_auxiliary_files(job: Job, fingerprint: str, coded: dict[str, tuple[str, ...]], folder: Path) -> None:
    """Write config, tokenizer, generation settings and the executed plan."""
    write_texts(job, fingerprint, coded, folder, compute_checksums(folder.glob("*.safetensors")))
    job.source.save_auxiliary_files(folder)


@dataclass
class _Attempts:
    """Artifacts staged so far for a size: plans with their total bytes, and bytes by matrix and format."""

    plans: list[tuple[Plan, int]] = field(default_factory=list)
    known: dict[tuple[str, WeightFormat], int] = field(default_factory=dict)

    def best(self, size: int) -> Plan | None:
        """Return the plan with the most bytes that does not exceed `size`; None if all exceed it."""
        fitting = [(total, -number, plan) for number, (plan, total) in enumerate(self.plans) if total <= size]
        return max(fitting, key=lambda row: row[:2])[2] if fitting else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        known = [[name, to_spec(fmt), nbytes] for (name, fmt), nbytes in self.known.items()]
        return {"plans": [[_formats(plan), total] for plan, total in self.plans], "known": known}

    @staticmethod
    def from_dict(values: dict[str, Any], job: Job) -> _Attempts:
        """Build from the values of `to_dict`, for the matrices of a job."""
        plans = [(_replace_formats(job, formats), int(total)) for formats, total in values["plans"]]
        return _Attempts(plans, {(name, from_spec(spec)): int(nbytes) for name, spec, nbytes in values["known"]})


def _formats(plan: Plan) -> dict[str, Any]:
    return {entry.matrix.name: to_spec(entry.fmt) for entry in plan.entries}


def _replace_formats(job: Job, formats: dict[str, Any]) -> Plan:
    """Return the plan of a prepared job with the formats replaced."""
    entries = tuple(PlanEntry(entry.matrix, from_spec(formats[entry.matrix.name])) for entry in job.plan.entries)
    plan = dataclasses.replace(job.plan, entries=entries)
    size = job.size
    return plan if job.settings.recipe is None or size is None else rename_plan(job.plan, plan, size)


def _adjust_to_size(job: Job, staging: Path, attempts: _Attempts) -> Job | None:
    """Return the job with a few changed formats that bring the staged artifact to its size; None if it needs none.

    Matrices not measured in a format count with predicted bytes in the first rounds, then with their bytes before
    entropy coding, so that the last changes do not exceed the size. If no new plan is found, the best plan tried is
    used. A recipe may be smaller than its size.
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

    # The names of coded tensors in config.json and the digits of offsets are not predicted.
    artifact_size = ArtifactSize(job)
    constant = total - sum(stored.values()) - artifact_size.overhead(job.plan)
    options = job.forecast.options
    if job.settings.recipe is not None:
        if total <= size:
            return None
        recipe = attempts.plans[0][0]
        if len(attempts.plans) > _CHANGES:
            raise too_large_error(recipe, total, size)
        plan = shrink_recipe(artifact_size, recipe, options, size, total, nbytes_of, constant)
        return dataclasses.replace(job, plan=plan)
    if again or len(attempts.plans) > _CHANGES:
        best = attempts.best(size)
        return None if best is None or best == job.plan else dataclasses.replace(job, plan=best)
    if least <= total <= size:
        return None
    plan = adjust_plan(artifact_size, job.plan, options, size, nbytes_of, constant)
    plan = plan or attempts.best(size) or _smallest(job.plan, options)
    return None if plan == job.plan else dataclasses.replace(job, plan=plan)


def _smallest(plan: Plan, options: Options) -> Plan:
    """Return the plan with the fewest bytes before entropy coding, against which the size was checked."""
    entries = [
        PlanEntry(
            e.matrix, min((o.fmt for o in options[e.matrix.name]), key=lambda fmt, e=e: fmt.nbytes(e.matrix.shape))
        )
        for e in plan.entries
    ]
    return dataclasses.replace(plan, entries=tuple(entries))


def _stored_bytes(job: Job, staging: Path) -> dict[str, int]:
    """Return the stored bytes of every planned matrix."""
    stored = {entry.matrix.name: 0 for entry in job.plan.entries}
    for row in read_ledger(staging).rows:
        if row.matrix is not None:
            stored[row.matrix] += row.nbytes
    return stored


def _note_changes(before: Job, after: Job, attempts: _Attempts, work: Path) -> list[str]:
    """Save the changed formats, so that an interrupted run can resume with them, and delete the replaced fits.

    Returns the names of the changed matrices.
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
    """Return the job with the formats to which an interrupted run had changed, and the plans that run had tried.

    Errors: RecipeError if that run had another size.
    """
    path = work / _CHANGED_PLAN
    if not path.is_file():
        return job, _Attempts()
    try:
        saved = read_json(path)
        size = saved.get("size", job.size)
        plan, attempts = _replace_formats(job, saved["formats"]), _Attempts.from_dict(saved["past"], job)
        changed = set(saved["changed"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged; remove {work} to start again") from error
    if size != job.size:
        raise RecipeError(
            f"--resume: the size was {size} bytes and is now {job.size}; use the previous size, or remove {work}"
        )
    job = dataclasses.replace(job, plan=plan)
    for matrix, planned in job.compressed_matrices:
        file = finished_file(work, matrix.name)
        if matrix.name in changed and file.is_file():
            try:
                check_finished(file, add_prefix(matrix.name, planned.fmt.layout(matrix.shape)))
            except ArtifactError:  # the run was interrupted before it deleted this file
                file.unlink()
    return job, attempts


def _used_bytes(job: Job, staging: Path) -> int:
    """Return the bytes of the staged artifact plus those reserved for tuning."""
    return sum(nbytes_by_file(staging).values()) + job.reserved_for_tuning


def _check_size(job: Job, staging: Path) -> None:
    if job.size is None:
        return
    total = _used_bytes(job, staging)
    if total > job.size:
        reserved = f"including {job.reserved_for_tuning} reserved for tuning"
        raise RecipeError(
            f"the artifact takes {total:,} bytes, {reserved}, more than --size {job.size:,}; aim at a smaller size"
        )
