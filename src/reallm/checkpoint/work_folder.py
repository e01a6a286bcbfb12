"""The work folder: finished matrices wait beside the output until all are there."""

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
STAGING = "artifact"  # where the output is put together, inside the work folder


def work_folder(out: Path) -> Path:
    """Where finished matrices wait: beside the output, so that a rename suffices at the end."""
    return out.with_name(out.name + ".work")


def finished_file(work: Path, name: str) -> Path:
    """The file of one finished matrix; it appears by a rename, so that it is there whole or not at all."""
    return work / f"{name}.safetensors"


def check_output(out: Path, resume: bool = False, read: Callable[[Path], Any] = read_manifest) -> None:
    """Refuse an output that is in the way, before any work. `read` fails on what a finished run does not leave.

    Errors: ArtifactError with the remedy.
    """
    if not out.name:
        raise ArtifactError(f"--output {str(out)!r} is not the name of a new folder; give one")
    if os.path.lexists(out) and not (resume and _may_be_finished(out, read)):
        raise ArtifactError(f"{out} exists; give another --output or remove it")
    if not out.absolute().parent.is_dir():
        raise ArtifactError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")
    if (around := _enclosing_artifact(out)) is not None:
        raise ArtifactError(f"{out} would lie in {around} and count as its bytes; give an --output beside it")
    work = work_folder(out)
    if not os.path.lexists(work):
        return
    if not resume:
        raise ArtifactError(f"{work} is left from an interrupted run; add --resume to go on, or remove it")
    # It is removed at the end: never take a folder that is somebody else's.
    if not work.is_dir() or (any(work.glob("[!.]*")) and not any(work.glob(f"{STATE_FILE}*"))):
        raise ArtifactError(f"{work} is not the work folder of an interrupted run; give another --output or remove it")


def check_new_file(file: Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that cannot be written or is there already, before any work. `suffixes`: of what it will hold.

    Errors: ArtifactError that names the option, with the remedy.
    """
    if suffixes and suffix_of(file) not in suffixes:
        raise ArtifactError(f"{option} {file}: what is written is {suffixes[0][1:].upper()}; name it {suffixes[0]}")
    if not file.absolute().parent.is_dir():
        raise ArtifactError(f"{option} {file}: the folder {file.absolute().parent} does not exist; make it first")
    if os.path.lexists(file):
        raise ArtifactError(f"{option}: {file} exists; give another name or remove it")


def _may_be_finished(out: Path, read: Callable[[Path], Any]) -> bool:
    """Whether a run may have been killed after it had put what it made at `out`, by the last of its renames."""
    try:
        read(out)
    except (ArtifactError, FormatError):
        return False
    return not (work_folder(out) / STAGING).exists()


def _enclosing_artifact(out: Path) -> Path | None:
    """The compressed model that a new folder would lie in, if there is one."""
    for folder in out.absolute().parents:
        with contextlib.suppress(ArtifactError, FormatError, OSError):  # a config.json of anything else
            read_manifest(folder)
            return folder
    return None


def check_finished_output(out: Path, state: dict[str, Any], formats_may_differ: bool = False) -> None:
    """What a killed run left at `out` must be what this one would make.

    `formats_may_differ`: the run may have changed formats on the way, so that the plan is compared by its names.
    Errors: ArtifactError if it is of another source, seed, calibration or plan.
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
            raise ArtifactError(f"{out} exists and is of another {key}; give another --output or remove it")


def remove_work_folder(work: Path) -> None:
    """Remove a work folder, its state last: killed on the way, it still is known for one."""
    for path in work.iterdir():
        if path.name != STATE_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work)


@contextlib.contextmanager
def open_work_folder(work: Path, state: dict[str, Any]) -> Iterator[None]:
    """Make the work folder, or go on in one whose `state` (source, seed, device, plan) is the same.

    A run that fails leaves it for --resume, unless its own input is at fault, when nothing in it is of use, or nothing
    is in it yet.
    Errors: RecipeError naming what has changed; ArtifactError for a disk that is full or cannot be written.
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
        remedy = "make room, or give a folder that can be written"
        if work.exists():
            remedy += f"; finished matrices are in {work}: then add --resume"
        raise ArtifactError(f"{place}: {reason}; {remedy}") from error


def _has_results(work: Path) -> bool:
    return work.is_dir() and any(not path.name.startswith(STATE_FILE) for path in work.iterdir())


def check_finished(path: Path, layout: Tensors) -> None:
    """A finished matrix must be what its format writes.

    Errors: ArtifactError naming the damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); remove this file and add --resume") from error
    if found != {name: tuple(tensor.shape) for name, tensor in layout.items()}:
        raise ArtifactError(f"{path}: holds other tensors than the plan says; remove this file and add --resume")


def read_work_tensors(path: Path, like: Tensors) -> Tensors:
    """The tensors of a file of the work folder: of the names, shapes and dtypes of `like`.

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
        raise ArtifactError(f"{path}: holds another {name!r} than this run has; {remedy}")
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
    """What differs between two JSON values, a line each, by the innermost names."""
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _changes(key.replace("_", " "), old.get(key), new.get(key))
    elif old != new:
        yield f"{name} was {_describe(old)} and is now {_describe(new)}"


def _describe(value: Any) -> str:
    """A setting as a user would say it; of a sha256, which stands for a text or a model, the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_describe(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " + ".join(map(_describe, value)) or "none"
    if isinstance(value, str) and len(value) == 64:
        return f"the one of sha256 {value[:12]}…"
    return str(value)
