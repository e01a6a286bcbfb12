"""What is printed before any work."""

import sys

import pytest

from reallm.pipeline import Settings, prepare
from reallm.report.cost import cost_table


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
    monkeypatch.setattr(sys.modules["reallm.pipeline.cost"], "_predicted_seconds", lambda job: 1.0)
    job = prepare(tiny_llama, Settings(recipe="rtn4"))
    monkeypatch.setattr(type(job.source), "nbytes", original)
    (line,) = (line for line in cost_table(job).splitlines() if line.startswith("all tensors"))
    assert line.endswith(said)
