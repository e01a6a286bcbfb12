"""What happens to a run around it: disks, permissions, files that vanish. Each is one line, and nothing is lost."""

import contextlib
import errno
import os
import resource
import shutil

import pytest

from reallm.checkpoint import read_manifest, work_folder
from reallm.cli import main
from reallm.errors import ArtifactError, RecipeError, SourceError
from reallm.pipeline import Settings, prepare, run
from reallm.source import open_source

RECIPE = "rules: [{match: '*', format: {format: uniform, bits: 3}}]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def whole(tiny_llama, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(prepare(tiny_llama, Settings(recipe=recipe)), folder)
    return folder


@pytest.fixture
def shards(tiny_llama, tmp_path):
    """A copy of the tiny Llama in several files."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="100KB")
    return folder


def once(action, after):
    """A progress callback that does something after so many matrices."""
    left = iter(range(after))

    def progress(name, done, total):
        if next(left, None) == after - 1:
            action()

    return progress


@contextlib.contextmanager
def files_no_larger_than(nbytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_system_refuses_to_write_on_and_the_run_goes_on_later(
    tiny_llama, recipe, whole, tmp_path, finished_matrices
):
    out = tmp_path / "out"
    # A limit of the operating system, as a quota is: matrices of 5 kB are written, the shard of 80 kB is not.
    with files_no_larger_than(30_000), pytest.raises(ArtifactError, match="too large.*add --resume") as caught:
        run(prepare(tiny_llama, Settings(recipe=recipe, exclude=("*embed_tokens",))), out)
    assert "\n" not in str(caught.value) and not out.exists() and len(finished_matrices(out)) == 14
    run(prepare(tiny_llama, Settings(recipe=recipe, exclude=("*embed_tokens",))), out, resume=True)
    assert not work_folder(out).exists() and len(read_manifest(out).matrices) == 14


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_folder_that_cannot_be_written_is_one_line(tiny_llama, recipe, tmp_path, monkeypatch, capsys, code):
    def refused(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), "--recipe", recipe]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and f"out.work: {os.strerror(code)}; fix the cause" in err[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tiny_llama, recipe, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="Permission denied"):
            run(prepare(tiny_llama, Settings(recipe=recipe)), tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_shard_that_vanishes_under_a_run_is_named_and_the_work_stays(
    shards, recipe, tmp_path, damage, same_files, finished_matrices
):
    out, job = tmp_path / "out", prepare(shards, Settings(recipe=recipe))
    names = job.source.files()
    last, kept = names[-1], names[-1].read_bytes()
    with pytest.raises(
        ArtifactError, match=f"{last.name}: .*finished matrices are in .*out.work: fix the cause and add"
    ):
        run(job, out, progress=once(last.unlink if damage == "deleted" else lambda: os.truncate(last, 300), 2))
    assert 2 <= len(finished_matrices(out)) < 15 and not out.exists()
    last.write_bytes(kept)
    run(prepare(shards, Settings(recipe=recipe)), out, resume=True)
    run(prepare(shards, Settings(recipe=recipe)), tmp_path / "other")
    assert same_files(out, tmp_path / "other")


def test_a_shard_that_vanishes_before_is_a_source_error(shards):
    source = open_source(shards)
    source.files()[0].unlink()
    with pytest.raises(SourceError, match="weight file is missing"):
        source.fingerprint()
    with pytest.raises(SourceError, match="weight file is missing"):
        open_source(shards)


def test_resuming_a_finished_run_changes_nothing_and_removes_what_is_left(
    tiny_llama, recipe, whole, tmp_path, same_files
):
    out = shutil.copytree(whole, tmp_path / "out")
    job = prepare(tiny_llama, Settings(recipe=recipe))
    for left_behind in (False, True):
        if left_behind:
            work_folder(out).mkdir()
        run(job, out, resume=True)
        assert same_files(out, whole) and not work_folder(out).exists()


@pytest.mark.parametrize(
    ("changed", "says"), [({"seed": 5}, "another seed"), ({"rank": 1}, "another plan"), ({}, "another source")]
)
def test_an_output_that_another_run_made_is_never_taken_for_ones_own(
    tiny_llama, other_llama, recipe, whole, tmp_path, changed, says, same_files
):
    out = shutil.copytree(whole, tmp_path / "out")
    job = prepare(tiny_llama if changed else other_llama, Settings(**{"recipe": recipe, **changed}))
    with pytest.raises(ArtifactError, match=f"out exists and has {says}; give another --output"):
        run(job, out, resume=True)
    assert same_files(out, whole)
    (tmp_path / "plain").mkdir()
    with pytest.raises(ArtifactError, match="plain exists"):
        run(job, tmp_path / "plain", resume=True)


def test_a_changed_calibration_is_refused_naming_it(tiny_llama, recipe, text_file, tmp_path, killed, finished_matrices):
    out = tmp_path / "out"

    with killed(at=3) as kill:
        run(prepare(tiny_llama, Settings(recipe=recipe)), out, progress=kill)
    other = Settings(recipe=recipe, calibration=(str(text_file),), calibration_windows=2, calibration_context=32)
    with pytest.raises(RecipeError, match="calibration was None and is now texts sha256 .*, windows 2,"):
        run(prepare(tiny_llama, other), out, resume=True)
    assert len(finished_matrices(out)) == 3
