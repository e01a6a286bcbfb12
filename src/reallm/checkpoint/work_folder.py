"""The work folder: holds finished matrices next to the output until all are there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from reallm.checkpoint.manifest import read_manifest
from reallm.checkpoint.validation import read_json, suffix_of
from reallm.errors import ArtifactError, FormatError, RecipeError, SourceError
from reallm.formats import Tensors, to_spec

STATE_FILE = "state.json"
STAGING = "artifact"  # subfolder of the work folder in which the output is assembled


def work_folder(out: Path) -> Path:
    """Return the folder for finished matrices: next to the output, so that the last step is one rename."""
    return out.with_name(out.name + ".work")


def finished_file(work: Path, name: str) -> Path:
    """Return the file of one finished matrix; it appears by a rename, so it is either complete or absent."""
    return work / f"{name}.safetensors"


def check_output(out: Path, resume: bool = False, read: Callable[[Path], Any] = read_manifest) -> None:
    """Refuse an existing output or work folder before any work starts.

    `read` must raise ArtifactError or FormatError on a folder that a finished run did not write.
    Errors: ArtifactError with the remedy.
    """
    if not out.name:
        raise ArtifactError(f"--output {str(out)!r} is not the name of a new folder; give one")
    if os.path.lexists(out) and not (resume and _may_be_finished(out, read)):
        raise ArtifactError(f"{out} exists; give another --output or remove it")
    if not out.absolute().parent.is_dir():
        raise ArtifactError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")
    if (around := _enclosing_artifact(out)) is not None:
        raise ArtifactError(f"{out} would lie in {around} and count towards its bytes; give an --output outside it")
    work = work_folder(out)
    if not os.path.lexists(work):
        return
    if not resume:
        raise ArtifactError(f"{work} is left from an interrupted run; add --resume to go on, or remove it")
    # The run removes this folder at the end: never take over a folder that another program made.
    if not work.is_dir() or (any(work.glob("[!.]*")) and not any(work.glob(f"{STATE_FILE}*"))):
        raise ArtifactError(f"{work} is not the work folder of an interrupted run; give another --output or remove it")


def check_new_file(file: Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that exists or cannot be written, before any work starts. `suffixes` are those of its file type.

    Errors: ArtifactError that names the option, with the remedy.
    """
    if suffixes and suffix_of(file) not in suffixes:
        raise ArtifactError(f"{option} {file}: the file is written as {suffixes[0][1:].upper()}; name it {suffixes[0]}")
    if not file.absolute().parent.is_dir():
        raise ArtifactError(f"{option} {file}: the folder {file.absolute().parent} does not exist; make it first")
    if os.path.lexists(file):
        raise ArtifactError(f"{option}: {file} exists; give another name or remove it")


def _may_be_finished(out: Path, read: Callable[[Path], Any]) -> bool:
    """Return whether a run may have been killed after its last rename, which moved the result to `out`."""
    try:
        read(out)
    except (ArtifactError, FormatError):
        return False
    return not (work_folder(out) / STAGING).exists()


def _enclosing_artifact(out: Path) -> Path | None:
    """Return the compressed model that encloses a new folder, if there is one."""
    for folder in out.absolute().parents:
        with contextlib.suppress(ArtifactError, FormatError, OSError):  # some other config.json
            read_manifest(folder)
            return folder
    return None


def check_finished_output(out: Path, state: dict[str, Any], formats_may_differ: bool = False) -> None:
    """Check that the artifact a killed run left at `out` is the one this run would write.

    `formats_may_differ`: the run may have changed formats while it compressed, so only the plan's names are compared.
    Errors: ArtifactError if its source, seed, calibration or plan differs.
    """
    manifest = read_manifest(out)
    found = {key: manifest.provenance.get(key) for key in ("seed", "calibration")}
    found["source"] = manifest.provenance.get("source_sha256")
    found["plan"] = {matrix.name: to_spec(matrix.fmt) for matrix in manifest.matrices}
    for key, value in found.items():
        wanted = state[key]
        if formats_may_differ and key == "plan":
            value, wanted = set(value), set(wanted)
        if value != wanted:
            raise ArtifactError(f"{out} exists and has another {key}; give another --output or remove it")


def remove_work_folder(work: Path) -> None:
    """Remove a work folder, its state file last: if the removal is killed, the folder is still recognized."""
    for path in work.iterdir():
        if path.name != STATE_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work)


@contextlib.contextmanager
def open_work_folder(work: Path, state: dict[str, Any]) -> Iterator[None]:
    """Create the work folder, or continue in one with the same `state` (source, seed, device, plan).

    A failed run leaves the folder for --resume, unless the run's own input is at fault (nothing in it can be reused)
    or the folder holds no results yet.
    Errors: RecipeError naming the changed setting; ArtifactError for a disk that is full or cannot be written.
    """
    new = not work.exists()
    try:
        _check_or_write(work, state)
        yield
    except BaseException as error:
        if new and (isinstance(error, SourceError | FormatError) or not _has_results(work)):
            shutil.rmtree(work, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or error
        place = getattr(error, "filename", None) or work
        remedy = (
            f"finished matrices are in {work}: fix the cause and add --resume" if work.exists() else "fix the cause"
        )
        raise ArtifactError(f"{place}: {reason}; {remedy}") from error


def _has_results(work: Path) -> bool:
    return work.is_dir() and any(not path.name.startswith(STATE_FILE) for path in work.iterdir())


def check_finished(path: Path, layout: Tensors) -> None:
    """Check that the file of a finished matrix holds the tensors its format writes.

    Errors: ArtifactError naming the damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); remove this file and add --resume") from error
    if found != {name: tuple(tensor.shape) for name, tensor in layout.items()}:
        raise ArtifactError(f"{path}: its tensors differ from the plan; remove this file and add --resume")


def read_work_tensors(path: Path, like: Tensors) -> Tensors:
    """Return the tensors of a file in the work folder; names, shapes and dtypes must equal those of `like`.

    Errors: ArtifactError naming the damaged file.
    """
    remedy = f"remove {path.parent} to start again"
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); {remedy}") from error
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (found, like)]
    if kinds[0] != kinds[1]:
        name = min(set(kinds[0].items()) ^ set(kinds[1].items()), key=lambda item: item[0])[0]
        raise ArtifactError(f"{path}: tensor {name!r} differs from this run's; {remedy}")
    return found


def _check_or_write(work: Path, state: dict[str, Any]) -> None:
    path = work / STATE_FILE
    if path.is_file():
        _check_state(path, state)
        return
    work.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(state), encoding="utf-8")
    os.replace(partial, path)


def _check_state(path: Path, now: dict[str, Any]) -> None:
    try:
        before = read_json(path)
        old_plan, new_plan = dict(before["plan"]), now["plan"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged; remove {path.parent} to start again") from error
    remedy = f"go back to that, or remove {path.parent} to start again"
    if before.get("source") != now["source"]:
        raise RecipeError(f"--resume: the weights of the source are not those the run began with; {remedy}")
    changes = [line for key in ("seed", "device", "calibration") for line in _changes(key, before.get(key), now[key])]
    if changes:
        raise RecipeError(f"--resume: {', '.join(changes)}; {remedy}")
    for name in old_plan | new_plan:
        old, new = (plan.get(name, "not in the plan") for plan in (old_plan, new_plan))
        if old != new:
            raise RecipeError(f"--resume: the format of {name} was {old} and is now {new}; {remedy}")


def _changes(name: str, old: Any, new: Any) -> Iterator[str]:
    """Yield one line per difference between two JSON values, with the innermost key as its name."""
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _changes(key.replace("_", " "), old.get(key), new.get(key))
    elif old != new:
        yield f"{name} was {_describe(old)} and is now {_describe(new)}"


def _describe(value: Any) -> str:
    """Return a setting as text; a sha256, which identifies a text or a model, is cut to 12 digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_describe(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " + ".join(map(_describe, value)) or "none"
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}…"
    return str(value)
