"""The pipeline: what an interrupted run leaves, how it goes on, and what it refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import reallm
import reallm.checkpoint.writer
from reallm.checkpoint import work_folder
from reallm.errors import ArtifactError, RecipeError, SourceError
from reallm.pipeline import Settings, prepare, run
from reallm.pipeline import fit_job as fitting
from reallm.pipeline import run_job as running

RECIPE = """
rules:
- {role: [q, up], format: {format: codebook, index_bits: 4, vector_dim: 2}}
- {match: "*", format: {format: uniform, bits: 3}}
"""
MATRICES = 15  # of the tiny Llama: 14 in blocks and the embedding


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def job(tiny_llama, recipe):
    return prepare(tiny_llama, Settings(recipe=recipe))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(job, folder)
    return folder


@pytest.fixture
def interrupted(job, tmp_path, killed):
    """An output whose run was killed after four matrices."""
    out = tmp_path / "out"
    with killed(at=4) as kill:
        run(job, out, progress=kill)
    return out


def count_fits(monkeypatch):
    names, original = [], fitting.load_weight  # every fit begins with it
    monkeypatch.setattr(fitting, "load_weight", lambda *a: names.append(a[1].name) or original(*a))
    return names


def test_an_interrupted_run_leaves_finished_matrices_and_no_output(interrupted, finished_matrices):
    assert not interrupted.exists() and len(finished_matrices(interrupted)) == 4


def test_a_resumed_run_gives_the_same_bytes_and_fits_nothing_twice(
    job, whole, interrupted, monkeypatch, same_files, finished_matrices
):
    before, fitted = finished_matrices(interrupted), count_fits(monkeypatch)
    run(job, interrupted, resume=True)
    assert same_files(interrupted, whole)
    assert len(fitted) == MATRICES - 4 and not {f"{name}.safetensors" for name in fitted} & set(before)
    assert not work_folder(interrupted).exists()


def test_a_run_may_be_interrupted_more_than_once_and_at_its_very_end(
    job, whole, interrupted, monkeypatch, killed, same_files
):
    with killed(at=9) as kill:
        run(job, interrupted, resume=True, progress=kill)
    with killed(at=MATRICES) as kill:
        run(job, interrupted, resume=True, progress=kill)
    (work_folder(interrupted) / "artifact").mkdir()  # killed while writing the shards
    (work_folder(interrupted) / "artifact" / "shard-00001.safetensors.partial").write_bytes(b"half")
    fitted = count_fits(monkeypatch)
    run(job, interrupted, resume=True)
    assert same_files(interrupted, whole) and fitted == []


def test_progress_counts_matrices_that_were_taken_over(job, interrupted):
    seen = []
    run(job, interrupted, resume=True, progress=lambda *values: seen.append(values))
    assert len(seen) == MATRICES and seen[-1][1] == seen[-1][2]


def test_resume_without_an_interrupted_run_simply_starts(job, whole, tmp_path, same_files):
    run(job, tmp_path / "out", resume=True)
    assert same_files(tmp_path / "out", whole)


def test_a_work_folder_without_resume_is_refused_with_both_remedies(job, interrupted, finished_matrices):
    with pytest.raises(ArtifactError, match=r"out\.work is left .* add --resume to go on, or remove it"):
        run(job, interrupted)
    assert len(finished_matrices(interrupted)) == 4


def test_somebody_elses_folder_is_never_taken_for_a_work_folder(job, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="not the work folder"):
        run(job, tmp_path / "out", resume=True)
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"rank": 2}, "the format of model.layers.0.self_attn.q_proj was .*codebook.* and is now .*low_rank_plus"),
        ({"exclude": ("*embed_tokens",)}, "model.embed_tokens was .*uniform.* and is now not in the plan"),
    ],
)
def test_a_changed_plan_is_refused_naming_what_changed(
    tiny_llama, recipe, interrupted, change, says, finished_matrices
):
    other = prepare(tiny_llama, Settings(**{"recipe": recipe, **change}))
    with pytest.raises(RecipeError, match=f"--resume: .*{says}"):
        run(other, interrupted, resume=True)
    assert len(finished_matrices(interrupted)) == 4


def test_a_changed_source_is_refused(other_llama, recipe, interrupted):
    with pytest.raises(RecipeError, match="the weights of the source are not those"):
        run(prepare(other_llama, Settings(recipe=recipe)), interrupted, resume=True)


@pytest.mark.parametrize("damage", [lambda d: d[:-5], lambda d: d[:3], lambda d: b"", lambda d: b"x" * len(d)])
def test_a_damaged_finished_matrix_is_named_and_not_trusted(
    job, whole, interrupted, damage, same_files, finished_matrices
):
    file = work_folder(interrupted) / finished_matrices(interrupted)[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactError, match=f"{file.name}: damaged .* remove this file and add --resume"):
        run(job, interrupted, resume=True)
    file.unlink()
    run(job, interrupted, resume=True)
    assert same_files(interrupted, whole)


def test_a_finished_matrix_with_other_tensors_is_not_trusted(job, interrupted, finished_matrices):
    file = work_folder(interrupted) / finished_matrices(interrupted)[0]
    save_file({name + "x": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match="its tensors differ from the plan"):
        run(job, interrupted, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan": 3}'])
def test_a_damaged_state_is_one_error_with_the_remedy(job, interrupted, text):
    (work_folder(interrupted) / "state.json").write_text(text)
    with pytest.raises(ArtifactError, match="state.json: damaged; remove"):
        run(job, interrupted, resume=True)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failing"),
    [
        (reallm.checkpoint.writer, "save_file", full_in_rust),
        (running, "_write_auxiliary_files", full),
        (running, "write_shards", full_in_rust),
        (os, "rename", full),
        (os, "replace", full),
    ],
)
def test_a_full_disk_is_one_error_and_the_run_can_go_on(job, whole, tmp_path, module, name, failing, same_files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(ArtifactError, match="No space left on device.*fix the cause") as caught:
            run(job, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert ("add --resume" in str(caught.value)) == (tmp_path / "out.work").exists()
    run(job, tmp_path / "out", resume=True)
    assert same_files(tmp_path / "out", whole)


def test_a_damaged_source_leaves_no_work_folder_but_never_removes_an_older_one(
    tiny_llama, recipe, tmp_path, killed, finished_matrices
):
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    job, out = prepare(source, Settings(recipe=recipe)), tmp_path / "out"
    with pytest.raises(SourceError, match="up_proj"):
        run(job, out)
    assert not work_folder(out).exists()
    with killed(at=3) as kill:
        run(job, out, progress=kill)
    with pytest.raises(SourceError, match="up_proj"):
        run(job, out, resume=True)
    assert len(finished_matrices(out)) > 3


@pytest.mark.slow
def test_ctrl_c_says_where_the_finished_matrices_are_and_how_to_go_on(
    tiny_llama, recipe, whole, tmp_path, same_files, finished_matrices
):
    code = "import sys; from reallm.cli import main; sys.exit(main(sys.argv[1:]))"
    slow = "import time, reallm.pipeline.fit_job as m, sys; f = m.load_weight;"
    slow += "m.load_weight = lambda *a: (time.sleep(0.5), f(*a))[1];"
    arguments = ["compress", str(tiny_llama), "-o", str(tmp_path / "out"), "--recipe", recipe]
    running = subprocess.Popen(
        [sys.executable, "-c", slow + code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    assert running.stderr.readline().startswith("work folder: ")
    running.stderr.read(1)  # a matrix is finished
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert (
        err.splitlines()[-1] == f"stopped; finished matrices are in {tmp_path / 'out'}.work: add --resume to continue"
    )
    assert finished_matrices(tmp_path / "out") and not (tmp_path / "out").exists()
    reallm.compress(tiny_llama, tmp_path / "out", recipe=recipe, resume=True)
    assert same_files(tmp_path / "out", whole)


def test_the_work_folder_holds_the_state_that_must_not_change(interrupted):
    state = json.loads((work_folder(interrupted) / "state.json").read_text())
    assert set(state) == {"source", "seed", "device", "calibration", "plan"} and len(state["plan"]) == MATRICES
