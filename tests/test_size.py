"""One budget for the whole file: met, never exceeded, or refused before any work."""

import pytest
import torch

import reallm
from reallm.artifact import read_ledger
from reallm.pipeline import Settings, prepare, run
from reallm.pipeline.whole import WholeFile, nbytes_by_file

CALIBRATION = {"calibration_windows": 6, "calibration_context": 64}


def total(folder):
    return sum(nbytes_by_file(folder).values())


def test_the_foretold_bytes_are_those_of_the_files(tiny_llama, tmp_path):
    for number, settings in enumerate(({"bits": 3}, {"recipe": "mixed", "exclude": ("*.1.*",), "embedding": "keep"})):
        job = prepare(tiny_llama, Settings(**settings))
        run(job, tmp_path / str(number))
        assert WholeFile(job).nbytes(job.plan) == total(tmp_path / str(number))


@pytest.mark.parametrize("size", [63_000, 75_000, 100_001, 180_000])
def test_a_size_is_met_within_half_a_percent_and_never_exceeded(tiny_llama, tmp_path, size):
    reallm.compress(tiny_llama, tmp_path / "out", size=size)
    assert 0.995 * size <= total(tmp_path / "out") <= size
    assert torch.isfinite(reallm.load(tmp_path / "out")(torch.arange(8)[None]).logits).all()


def test_bits_per_parameter_are_those_of_the_ledger(tiny_llama, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "out", bits_per_parameter=7.5)
    assert 0.995 * 7.5 <= read_ledger(tmp_path / "out").bits_per_parameter <= 7.5


@pytest.mark.parametrize("size", [70_000, 110_000])
def test_a_size_with_calibration_is_met_and_a_second_budget_asks_the_model_nothing(
    tiny_llama, text_file, tmp_path, size, monkeypatch
):
    settings = {"calibration": (str(text_file),), "analysis": str(tmp_path / "cache"), **CALIBRATION}
    reallm.compress(tiny_llama, tmp_path / "out", size=size, **settings)
    assert 0.995 * size <= total(tmp_path / "out") <= size
    monkeypatch.setattr("reallm.pipeline.budgeting.analysed", None)
    small, large = (prepare(tiny_llama, Settings(size=size + more, **settings)).forecast for more in (0, 20_000))
    assert small.calibrated and large.loss < small.loss
