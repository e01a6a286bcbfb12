"""`--dry-run` takes seconds with any options: it never runs the model."""

import sys

import pytest
import torch

from reallm.cli import main
from reallm.errors import RecipeError, SourceError
from reallm.pipeline import Settings, analysis_seconds, estimate, prepare
from reallm.pipeline.compress_settings import analysis_settings

COSTS = sys.modules["reallm.pipeline.cost"]
SAID = "predicted from typical sensitivities of each role; the run measures them first: about "
GOALS = {
    "bits": ["--bits", "4"],
    "size": ["--size", "90KB"],
    "bits per parameter": ["--bits-per-parameter", "8"],
    "recipe": ["--recipe", "rtn4"],
    "recipe and size": ["--recipe", "rtn4", "--size", "120KB"],
}
TEXTS = {"no text": [], "file": ["--calibration", "FILE"], "self": ["--calibration", "self"]}
MORE = {
    "plain": [],
    "outputs": ["--objective", "outputs"],
    "guided": ["--objective", "guided"],
    "neural": ["--candidates", "neural"],
    "trellis": ["--state-bits", "16"],
}


# Every budget with every text, and every other option that takes a file.
COMBINATIONS = [
    (goal, text, more)
    for goal in GOALS
    for text, more in [*((text, "plain") for text in TEXTS), *(("file", more) for more in MORE if more != "plain")]
    if (goal, more) != ("recipe", "neural")  # refused: a recipe names every format
]


@pytest.fixture
def never_asked(monkeypatch):
    """Forbid gradients, loading the model, and timing formats."""

    def asked(*_arguments, **_options):
        raise AssertionError("a dry run asked the model")

    monkeypatch.setattr("reallm.calibrate.loss_gradients._backward_each", asked)
    monkeypatch.setattr("reallm.source.model_source.FolderSource.load", asked)
    monkeypatch.setattr(COSTS, "_timed_fit", lambda *_: 1e-3)
    monkeypatch.setattr(COSTS, "seconds_per_step", lambda *_: 1e-3)
    monkeypatch.setattr(COSTS, "_sample_decoders", lambda *_: ({}, 0.0))


@pytest.mark.parametrize(("goal", "text", "more"), COMBINATIONS)
def test_a_dry_run_asks_the_model_nothing_and_says_what_the_run_will(
    tiny_llama, text_file, tmp_path, capsys, monkeypatch, never_asked, goal, text, more
):
    words = [*GOALS[goal], *TEXTS[text], *MORE[more], "--calibration-context", "64"]
    words = [str(text_file) if word == "FILE" else word for word in words]
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "out"), *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (SAID in printed) == (goal != "recipe" and text != "no text")
    assert "bits/weight" in printed and list(tmp_path.iterdir()) == []


def settings(text_file, tmp_path, **more):
    text = {"calibration": (str(text_file),), "calibration_windows": 4, "calibration_context": 64}
    return Settings(**{"size": 90_000, "analysis": str(tmp_path / "kept"), **text, **more})


def test_an_analysis_that_is_kept_is_used(tiny_llama, text_file, tmp_path):
    wanted = settings(text_file, tmp_path)
    before, job = prepare(tiny_llama, wanted, analyse=False), prepare(tiny_llama, wanted)
    after = prepare(tiny_llama, wanted, analyse=False)
    assert before.forecast.to_analyse and analysis_seconds(before) > 0 and not before.forecast.calibrated
    assert after.plan == job.plan and after.forecast == job.forecast and after.forecast.calibrated
    assert analysis_seconds(after) == 0
    other = prepare(tiny_llama, settings(text_file, tmp_path, calibration_windows=3), analyse=False)
    assert other.forecast.to_analyse, "of other windows"


def test_the_time_of_a_run_counts_its_analysis(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(COSTS, "seconds_of_analysis", lambda *_: 1e6)
    job = prepare(tiny_llama, settings(text_file, tmp_path), analyse=False)
    assert estimate(job).seconds > 1e6


def test_a_size_that_the_run_refuses_is_refused(tiny_llama, text_file, tmp_path):
    least = []
    for analyse in (False, True):
        with pytest.raises(RecipeError, match=r"smallest possible is ([\d,]+) bytes") as caught:
            prepare(tiny_llama, settings(text_file, tmp_path, size=30_000), analyse=analyse)
        least.append(int(str(caught.value).split("possible is ")[1].split(" bytes")[0].replace(",", "")))
    # The smallest artifact mixes formats, whose names differ in length.
    assert least[0] == pytest.approx(least[1], rel=0.02)


def test_the_cost_of_an_analysis_is_told_before_it_begins(tiny_llama, text_file, tmp_path):
    told = []
    prepare(tiny_llama, settings(text_file, tmp_path), lambda *now: told.append(now))
    assert told[0][0].startswith("analysis of 4 windows of 64 tokens, about ") and told[0][1:] == (0, 4)


def test_an_analysis_reads_at_most_16_windows_of_1024():
    few = analysis_settings(Settings(size=1, calibration=("x",), calibration_windows=128, calibration_context=2048))
    assert (few.calibration_windows, few.calibration_context) == (16, 1024)
    few = analysis_settings(Settings(size=1, calibration=("x",), calibration_windows=3, calibration_context=2048))
    assert (few.calibration_windows, few.calibration_context) == (6, 1024)


@pytest.fixture
def damaged(tiny_llama, tmp_path):
    """damaged(tensor, number): the model with one weight set to `number`."""
    import shutil

    from safetensors.torch import load_file, save_file

    def damage(name, number):
        folder = tmp_path / "damaged"
        shutil.copytree(tiny_llama, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[5] = number
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return damage


@pytest.mark.parametrize("goal", [{"recipe": "rtn4"}, {"size": 90_000}, {"recipe": "rtn4", "objective": "guided"}])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("text", ["file", "self"])
def test_a_weight_that_is_no_number_is_named_and_no_text_blamed(damaged, text_file, tmp_path, goal, name, text):
    import reallm

    folder = damaged(name, torch.nan if text == "file" else torch.inf)
    calibration = {"calibration": text_file if text == "file" else "self", "calibration_windows": 2}
    with pytest.raises(SourceError, match=rf"^{name}: 1 of [\d]+ weights are NaN or infinite"):
        reallm.compress(folder, tmp_path / "out", **goal, **calibration, calibration_context=64)
