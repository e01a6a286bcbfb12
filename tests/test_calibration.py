"""Compression along the stream of calibration text."""

import filecmp
import sys
import time

import pytest
import torch

import reallm
from reallm.calibrate.text import load_text, tokenize
from reallm.calibrate.windows import generate_windows, windows_from_files
from reallm.checkpoint import work_folder
from reallm.cli import main
from reallm.errors import ArtifactError, RecipeError, TextError
from reallm.hf import load, load_tokenizer
from reallm.pipeline import Settings, prepare, run
from reallm.source import open_source

RECIPE = """
rules:
- {role: [v], format: {format: low_rank_plus, rank: 2, base: {format: normal_float, bits: 3}}}
- {role: [q, up], format: {format: codebook, index_bits: 6, vector_dim: 2}}
- {match: "*", format: {format: uniform, bits: 3}}
"""
CALIBRATION = {"calibration_windows": 8, "calibration_context": 64}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def job(tiny_llama, recipe, text_file):
    return prepare(tiny_llama, Settings(recipe=recipe, calibration=(str(text_file),), **CALIBRATION))


@pytest.fixture(scope="module")
def calibrated(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "out"
    run(job, out)
    return out


def divergence(original, compressed, ids):
    with torch.no_grad():
        logits = [load(folder)(ids).logits.log_softmax(-1) for folder in (original, compressed)]
    return (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()


def test_calibration_brings_the_model_nearer_to_the_original(tiny_llama, recipe, calibrated, text_file, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "plain", recipe=recipe)
    ids = tokenize(load_tokenizer(tiny_llama), load_text(text_file))[600:856].view(4, 64)  # behind the windows used
    assert divergence(tiny_llama, calibrated, ids) < 0.9 * divergence(tiny_llama, tmp_path / "plain", ids)


def test_a_calibrated_artifact_is_as_large_as_an_uncalibrated_one(tiny_llama, recipe, calibrated, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "plain", recipe=recipe)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (calibrated, tmp_path / "plain")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("matrices", [1, 3, 8, 15])
def test_a_resumed_calibrated_run_gives_the_same_bytes(job, calibrated, tmp_path, matrices, killed):
    with killed(at=matrices) as kill:
        run(job, tmp_path / "out", progress=kill)
    run(job, tmp_path / "out", resume=True)
    assert filecmp.cmp(calibrated / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    assert filecmp.cmp(calibrated / "config.json", tmp_path / "out" / "config.json", shallow=False)


def test_another_calibration_is_refused_on_resume(tiny_llama, recipe, job, tmp_path):
    (work_folder(tmp_path / "out")).mkdir()
    with pytest.raises(ZeroDivisionError):
        run(job, tmp_path / "out", resume=True, progress=lambda *_: 1 / 0)
    with pytest.raises(RecipeError, match="--resume: calibration was texts .*and is now None"):
        run(prepare(tiny_llama, Settings(recipe=recipe)), tmp_path / "out", resume=True)


def test_a_model_can_be_calibrated_on_what_it_writes(tiny_llama, recipe, tmp_path):
    for name in ("one", "two"):
        settings = {"calibration_windows": 3, "calibration_context": 24}
        reallm.compress(tiny_llama, tmp_path / name, recipe=recipe, calibration=("self",), **settings)
    assert filecmp.cmp(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors", shallow=False)


def test_a_resumed_run_asks_the_original_for_no_text_and_no_gradients_again(tiny_llama, tmp_path, monkeypatch, killed):
    (tmp_path / "own.yaml").write_text("rules: [{match: '*', format: {format: uniform, bits: 3}}]")
    settings = {"recipe": str(tmp_path / "own.yaml"), "calibration": ("self",), "objective": "guided"}
    job = prepare(tiny_llama, Settings(**settings, calibration_windows=3, calibration_context=24))
    run(job, tmp_path / "whole")

    with killed(when=lambda name, *_: name == "model.layers.0.self_attn.v_proj") as kill:
        run(job, tmp_path / "out", progress=kill)
    monkeypatch.setattr("reallm.pipeline.calibration_inputs.generate_windows", None)
    monkeypatch.setattr("reallm.pipeline.teacher_outputs.guidance", None)
    (work_folder(tmp_path / "out") / "model.layers.0.self_attn.q_proj.safetensors").unlink()  # as a size would
    run(job, tmp_path / "out", resume=True)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert filecmp.cmp(*files, shallow=False)


def test_the_whole_original_is_gone_once_it_has_written_and_given_its_gradients(tiny_llama, tmp_path, originals_alive):
    (tmp_path / "own.yaml").write_text("rules: [{match: '*', format: {format: uniform, bits: 3}}]")
    settings = {"recipe": str(tmp_path / "own.yaml"), "calibration": ("self",), "objective": "guided"}
    run(prepare(tiny_llama, Settings(**settings, calibration_windows=3, calibration_context=24)), tmp_path / "out")
    originals, alive = originals_alive
    assert originals and alive and max(alive) == 0


def test_damaged_text_of_its_own_is_named(tiny_llama, recipe, tmp_path):
    settings = {"recipe": recipe, "calibration": ("self",), "calibration_windows": 2, "calibration_context": 16}
    job = prepare(tiny_llama, Settings(**settings))
    with pytest.raises(ZeroDivisionError):
        run(job, tmp_path / "out", progress=lambda name, *_: name.startswith("model") and 1 / 0)
    (work_folder(tmp_path / "out") / "written.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="written.safetensors: damaged .*remove .*out.work to start again"):
        run(job, tmp_path / "out", resume=True)


def test_every_phase_of_a_calibrated_budget_is_told(tiny_llama, tmp_path, capsys):
    options = ["--calibration", "self", "--calibration-windows", "2", "--calibration-context", "16", "--no-check"]
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), "--bits", "4", *options]) == 0
    lines = [line.split("%  ") for line in capsys.readouterr().err.splitlines() if "%  " in line]
    begun = [name for percent, name in lines if percent.strip() == "0"]
    text = "writing text to calibrate on"
    assert begun[0].startswith("analysis of 2 windows of 16 tokens, about ")
    assert begun[1:] == [text, "analysis: gradients", text, "gradients of the end-to-end loss"]
    assert ["100 ", text] in lines and ["100 ", "gradients of the end-to-end loss"] in lines
    assert any(name.startswith("analysis of model.layers.1") for _, name in lines)


def test_the_dry_run_counts_the_writing_of_text(tiny_llama, recipe):
    from reallm.pipeline import estimate
    from reallm.pipeline.cost import _generation_seconds

    sizes = {"calibration_windows": 20, "calibration_context": 128}
    job = prepare(tiny_llama, Settings(recipe=recipe, calibration=("self",), **sizes))
    model, tokenizer = job.source.load(torch.float32, "cpu").eval(), load_tokenizer(tiny_llama)
    begun = time.perf_counter()
    generate_windows(model, tokenizer, 20, 128, seed=0, device="cpu")
    seconds = time.perf_counter() - begun
    assert seconds / 5 < _generation_seconds(job) < 5 * seconds
    assert estimate(job).seconds > seconds / 5


def test_written_windows_begin_a_text_and_differ(tiny_llama):
    model, tokenizer = open_source(tiny_llama).load(torch.float32, "cpu"), load_tokenizer(tiny_llama)
    written = generate_windows(model, tokenizer, 20, 16, seed=0, device="cpu")
    assert written.shape == (20, 16) and (written[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(row) for row in written.tolist()}) == 20


def test_windows_are_the_text_in_order(tiny_llama, text_file):
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenize(tokenizer, load_text(text_file))
    assert torch.equal(windows_from_files([text_file], tokenizer, 3, 50), ids[:150].view(3, 50))
    assert len(windows_from_files([text_file], tokenizer, 10_000, 50)) == len(ids) // 50


def test_documents_behind_the_windows_asked_for_are_not_tokenized(tiny_llama):
    tokenizer, seen = load_tokenizer(tiny_llama), []

    def counting(document, **options):
        seen.append(document)
        return tokenizer(document, **options)

    counting.eos_token_id = tokenizer.eos_token_id
    documents = ["the stone", "a river", "never", "house"]
    enough = len(tokenize(tokenizer, documents[:2]))
    assert torch.equal(tokenize(counting, documents, enough), tokenize(tokenizer, documents[:2]))
    assert seen == documents[:2]


def test_several_files_are_joined_by_the_end_of_text(tiny_llama, text_file, jsonl_file):
    tokenizer = load_tokenizer(tiny_llama)
    joined = windows_from_files([jsonl_file, text_file], tokenizer, 1, 400)[0].tolist()
    assert joined.count(tokenizer.eos_token_id) == 3


def test_a_text_that_fills_no_window_says_so(tiny_llama, jsonl_file):
    with pytest.raises(TextError, match=r"tokens do not fill one window of 9999; lower --calibration-context"):
        windows_from_files([jsonl_file], load_tokenizer(tiny_llama), 1, 9999)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibration", "missing.txt"], "missing.txt: no such file; --calibration takes a .txt"),
        (["--calibration", "self", "--calibration", "README.md"], "self cannot be mixed with files"),
        (["--objective", "guided"], "--objective guided needs text"),
        (["--objective", "hessian"], "--objective 'hessian' is not one of outputs, guided"),
        (["--calibration", "self", "--calibration-windows", "0"], "--calibration-windows 0 is below 1"),
        (["--calibration", "self", "--calibration-context", "1"], "--calibration-context 1 is below 2"),
    ],
)
def test_a_bad_calibration_is_one_line_and_exit_2(tiny_llama, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(sys, "argv", ["reallm", "compress", str(tiny_llama), "-o", str(tmp_path / "out"), *options])
    assert main() == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_objective_of_the_end_loss_brings_the_model_nearer_too(tiny_llama, recipe, text_file, tmp_path):
    settings = {"recipe": recipe, "calibration": (str(text_file),), **CALIBRATION}
    reallm.compress(tiny_llama, tmp_path / "plain", recipe=recipe)
    reallm.compress(tiny_llama, tmp_path / "guided", objective="guided", **settings)
    ids = tokenize(load_tokenizer(tiny_llama), load_text(text_file))[600:856].view(4, 64)
    plain = divergence(tiny_llama, tmp_path / "plain", ids)
    assert divergence(tiny_llama, tmp_path / "guided", ids) < 0.9 * plain


@pytest.mark.parametrize(
    ("goal", "chosen"),
    [
        ({"bits": 4.0}, "guided"),
        ({"size": 75_000}, "guided"),
        ({"bits": 4.0, "objective": "outputs"}, "outputs"),
        ({"recipe": ""}, "outputs"),
        ({"recipe": "objective: guided"}, "guided"),
        ({"recipe": "objective: guided", "objective": "outputs"}, "outputs"),
    ],
)
def test_a_budget_asks_the_end_loss_and_a_recipe_only_if_it_says_so(tiny_llama, text_file, tmp_path, goal, chosen):
    if "recipe" in goal:
        (tmp_path / "own.yaml").write_text(f"{RECIPE}{goal['recipe']}\n")
        goal = {**goal, "recipe": str(tmp_path / "own.yaml")}
    job = prepare(tiny_llama, Settings(calibration=(str(text_file),), **CALIBRATION, **goal))
    assert job.settings.objective == chosen


def test_the_plan_beside_a_guided_artifact_gives_the_same_bytes_again(tiny_llama, text_file, tmp_path):
    settings = {"calibration": (str(text_file),), **CALIBRATION}
    reallm.compress(tiny_llama, tmp_path / "one", bits=4.0, **settings)
    reallm.compress(tiny_llama, tmp_path / "again", recipe=str(tmp_path / "one" / "plan.yaml"), **settings)
    assert "objective: guided" in (tmp_path / "one" / "plan.yaml").read_text()
    assert filecmp.cmp(tmp_path / "one" / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


def test_an_objective_in_a_recipe_means_nothing_without_text(tiny_llama, recipe, tmp_path):
    (tmp_path / "own.yaml").write_text(f"{RECIPE}objective: guided\n")
    for name, file in (("with", str(tmp_path / "own.yaml")), ("without", recipe)):
        reallm.compress(tiny_llama, tmp_path / name, recipe=file)
    assert filecmp.cmp(tmp_path / "with" / "plan.yaml", tmp_path / "without" / "plan.yaml", shallow=False)


def test_the_dry_run_counts_what_calibration_takes(tiny_llama, recipe, job):
    from reallm.pipeline import estimate

    plain = prepare(tiny_llama, Settings(recipe=recipe))
    assert estimate(job).peak_memory_bytes > estimate(plain).peak_memory_bytes
    assert abs(estimate(job).disk_bytes - estimate(plain).disk_bytes) < 300  # config and plan name it


def test_windows_that_the_text_has_not_are_neither_counted_nor_passed_over(tiny_llama, recipe, text_file, capsys):
    ids = tokenize(load_tokenizer(tiny_llama), load_text(text_file))
    settings = {"recipe": recipe, "calibration": (str(text_file),), "calibration_context": 64}
    few, many = (prepare(tiny_llama, Settings(calibration_windows=n, **settings)) for n in (len(ids) // 64, 4000))
    assert many.settings == few.settings and many.settings.calibration_windows == len(ids) // 64
    options = ["--recipe", recipe, "--calibration", str(text_file), "--calibration-context", "64", "--dry-run"]
    assert main(["compress", str(tiny_llama), "-o", "out", "--calibration-windows", "4000", *options]) == 0
    printed = capsys.readouterr()
    there = f"{len(ids) // 64} windows of 64 tokens"
    assert f"calibration: {there}: the text has no more, 4,000 were requested" in printed.err and there in printed.out


def test_a_context_beyond_what_the_model_was_made_for_is_not_counted(tiny_llama, recipe, text_file):
    job = prepare(tiny_llama, Settings(recipe=recipe, calibration=(str(text_file),), calibration_context=4096))
    assert job.settings.calibration_context == 512


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"size": 81_000},
        {"size": 110_000},
        {"recipe": "mixed", "calibration": ("self",), "objective": "guided", **CALIBRATION},
    ],
    ids=["bits", "small", "large", "self"],
)
def test_the_work_folder_stays_within_what_is_announced_and_twice_the_source(
    tiny_llama, tmp_path, settings, monkeypatch
):
    from reallm.pipeline import run_job as running
    from reallm.pipeline import work_bytes
    from reallm.pipeline.artifact_size import nbytes_by_file

    job = prepare(tiny_llama, Settings(**settings))
    found, staged = [], running._stage_artifact

    def counted(*arguments):
        folder = staged(*arguments)
        found.append(sum(nbytes_by_file(work_folder(tmp_path / "out")).values()))
        return folder

    monkeypatch.setattr(running, "_stage_artifact", counted)
    run(job, tmp_path / "out")
    assert 0.7 * work_bytes(job) < max(found) <= work_bytes(job) < 2 * job.source.nbytes
