"""Plan and cost tables of `--dry-run`."""

import json
import math
import sys

import pytest

from reallm.cli.tables.costs import cost_table
from reallm.formats import from_spec
from reallm.pipeline import Settings, estimate, prepare

COSTS = sys.modules["reallm.pipeline.cost"]


@pytest.mark.parametrize(
    ("original", "said"),
    [
        (500_992, "84.83 kB (5.9 times smaller than the 500.99 kB of tiny-llama)"),
        (85_341, "84.83 kB (0.6 % smaller than the 85.34 kB of tiny-llama)"),
        (84_832, "84.83 kB (as large as the 84.83 kB of tiny-llama)"),
        (84_000, "84.83 kB (1.0 % larger than the 84.00 kB of tiny-llama)"),
        (42_416, "84.83 kB (2.0 times larger than the 42.42 kB of tiny-llama)"),
    ],
)
def test_all_tensors_are_called_larger_where_they_are_and_the_model_by_its_name(
    tiny_llama, monkeypatch, original, said
):
    monkeypatch.setattr(COSTS, "_predicted_seconds", lambda job: 1.0)
    job = prepare(tiny_llama, Settings(recipe="rtn4"))
    monkeypatch.setattr(type(job.source), "nbytes", original)
    (line,) = (line for line in cost_table(job).splitlines() if line.startswith("all tensors"))
    assert line.endswith(said)


@pytest.fixture
def job(tiny_llama, tmp_path):
    """A plan of 14 block matrices of 2,048 to 11,264 weights, each entropy-coded at a different rate."""
    names = [
        e.matrix.name for e in prepare(tiny_llama, Settings(recipe="rtn4")).plan.entries if e.matrix.block is not None
    ]
    rules = [
        {"match": name, "format": {"format": "entropy_coded", "bits": 2 + number / 4, "largest": 31}}
        for number, name in enumerate(names)
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"rules": rules}))
    return prepare(tiny_llama, Settings(recipe=str(tmp_path / "recipe.yaml")))


@pytest.fixture
def timed(monkeypatch):
    """Collect (format, shape) of all timing samples; no fit runs, and each counts as one second."""
    found = []
    monkeypatch.setattr(COSTS, "_timed_fit", lambda fmt, shape, device: found.append((fmt, shape)) or 1.0)
    return found


def test_no_sample_is_larger_than_the_matrix_it_stands_for(job, timed):
    seconds = estimate(job).seconds
    assert set(timed) == {(entry.fmt, entry.matrix.shape) for entry in job.plan.entries}
    assert len(timed) == 15 and seconds == pytest.approx(15, abs=0.5)


def test_a_residual_of_rank_one_is_so_many_fits_of_its_base(tiny_llama, timed):
    base = {"format": "uniform", "bits": 4}
    residual = {"format": "low_rank_plus", "rank": 1, "factors": "int8", "base": base}
    seconds = []
    for fmt in (base, residual):
        seconds.append(estimate(prepare(tiny_llama, Settings(recipe="rtn3", embedding=fmt))).seconds)
        assert "low_rank_plus" not in {sample.name for sample, _ in timed}
    assert seconds[1] - seconds[0] == pytest.approx(3, abs=0.5)


def test_samples_that_took_their_time_stand_for_formats_that_fit_in_the_same_way(job, timed, monkeypatch):
    monkeypatch.setattr(COSTS, "_SAMPLE_SECONDS", 0.0)
    seconds = estimate(job).seconds
    assert [fmt.name for fmt, _ in timed] == ["uniform", "entropy_coded"]
    weights = sum(entry.matrix.weights for entry in job.plan.entries if entry.matrix.block is not None)
    assert seconds == pytest.approx(1 + weights / math.prod(timed[1][1]), abs=0.5)


def test_a_format_that_takes_long_is_timed_on_small_samples(monkeypatch):
    shapes = []

    def timed(fmt, shape, device):
        shapes.append(shape)
        return 0.1 + 1e-3 * math.prod(shape)  # 16-bit trellis codes

    monkeypatch.setattr(COSTS, "_timed_fit", timed)
    fixed, slope = COSTS.fitting_cost(from_spec({"format": "uniform", "bits": 4}), "cpu")
    assert (fixed, slope) == (pytest.approx(0.1), pytest.approx(1e-3)) and shapes == [(16, 16), (16, 64)]
    shapes.clear()
    monkeypatch.setattr(COSTS, "_timed_fit", lambda fmt, shape, device: shapes.append(shape) or 5.0)
    assert COSTS.fitting_cost(from_spec({"format": "uniform", "bits": 4}), "cpu") == (5.0, 0.0)
