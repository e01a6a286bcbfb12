import json

import pytest

from reallm.errors import ReallmError
from result_tables import number, table, update_page

PAGE = "before\n<!-- results:run -->\nold\n<!-- /results -->\nafter\n"


def arm(name: str, group: str, **figures) -> dict:
    defaults = {"format": None, "recipe": None, "bits": 3.2971, "perplexity": 78.7, "kl": None, "relative_error": 0.04}
    return defaults | {"name": name, "group": group, "fit_seconds": 1.24, "peak_memory_bytes": 10**9} | figures


def sample() -> dict:
    return {
        "command": "python benchmarks/run.py",
        "runs": [{"commit": "0123456789abcdef", "machine": "2 cores", "versions": {"torch": "2.13.0"}}],
        "model": {"name": "Tiny", "sha256": "aa" * 32},
        "text": {"name": "a text", "sha256": "bb" * 32},
        "context": 2048,
        "windows": 148,
        "original": {"perplexity": 21.78},
        "arms": [
            arm("rtn 3", "round to nearest"),
            arm("rank 16", "residual", same_bytes={"bits": 3.871, "perplexity": 40.0}, perplexity=48.91),
            arm("rtn 2", "round to nearest", perplexity=1.13e6),
        ],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(21.781, "21.78"), (182.34, "182.3"), (999.9, "999.9"), (1234.0, "1.2e3"), (1.13e6, "1.1e6"), (None, "–")],
)
def test_numbers_from_a_thousand_on_are_short(value, text):
    assert number(value) == text


def test_an_overflowed_perplexity_is_still_a_word():
    assert number(float("inf")) == "inf"


def test_rows_stand_under_their_group():
    rows = [line.split(" | ")[0] for line in table(sample()).splitlines() if line.startswith("|")][2:]
    assert rows == ["| **round to nearest**", "| rtn 3", "| rtn 2", "| **residual**", "| rank 16"]


def test_an_arm_with_a_residual_says_what_its_bytes_buy_without():
    line = next(line for line in table(sample()).splitlines() if line.startswith("| rank 16"))
    assert "| 3.297 | 48.91 | 40.00 at 3.871 |" in line


def test_a_column_that_nobody_fills_is_left_out():
    assert "KL" not in table(sample())


def test_an_arm_of_tuning_says_how_long_and_how_fast_and_one_that_was_not_tuned_says_neither():
    results = sample()
    tuned = {"seconds": 110.8, "tokens_per_second": 11620.1, "tokens": 2_323_200}
    results["arms"] = [arm("before", "2 bits", seconds=0.0, tokens_per_second=None), arm("both", "2 bits", **tuned)]
    before, both = [line for line in table(results).splitlines() if line.startswith("| b")]
    assert "| 2.3 | 110.8 | 11,620 |" in both and "| – | – | – |" in before


def test_an_arm_that_was_scored_on_another_text_names_it():
    results = sample()
    results["arms"] = [arm("usual", "rate", text=results["text"]["name"]), arm("own", "rate", text="wiki.valid.raw")]
    usual, own = [line for line in table(results).splitlines() if line.startswith(("| usual", "| own"))]
    assert usual.endswith("| – |") and own.endswith("| wiki.valid.raw |")
    assert "wiki.valid.raw" not in table(sample()) and "scored on" not in table(sample())


def test_an_arm_of_a_budget_shows_artifact_bytes_and_predicted_kl():
    results, seconds = sample(), {"plan": 1.6, "fit": 41.0, "measure": 9.0}
    more = {"nbytes": 59_990_000, "kl": 0.171, "seconds": seconds}
    results["arms"] = [
        arm("chosen by matrix", "60 MB", **more, predicted=0.1529),
        arm("one format", "60 MB", **more, predicted=None),
    ]
    for row in results["arms"]:
        row["key"] = f"{row['group']} | {row.pop('name')}"
        del row["fit_seconds"], row["relative_error"]
    lines = table(results).splitlines()
    head = "bits/weight | artifact, MB | perplexity | KL | predicted KL | plan, s | fit, s"
    assert any(head in line for line in lines)
    assert any("59.99 | 78.70 | 0.171 | 0.153 | 1.6 | 41.0" in line for line in lines)
    assert any("| one format |" in line and "| 0.171 | – |" in line for line in lines)


def test_the_command_and_the_machine_are_named():
    assert "`python benchmarks/run.py` at commit 0123456789ab, 2 cores, torch 2.13.0" in table(sample())


def test_every_run_that_measured_some_of_the_rows_is_named():
    results = sample()
    results["runs"].append({"commit": "fedcba9876543210", "machine": "a GPU", "versions": {"torch": "2.11.0"}})
    results["arms"][1]["run"] = 1
    text = table(results)
    assert "at commit 0123456789ab (2 of 3 rows), 2 cores, torch 2.13.0" in text
    assert "at commit fedcba987654 (1 of 3 rows), a GPU, torch 2.11.0" in text


def test_gaussian_settings_come_nearest_to_the_bound_first():
    row = {"bits_per_weight": 2.0, "relative_error": 0.07, "shannon_error": 0.0625}
    rows = [row | {"name": "far", "gap_bits": 0.3}, row | {"name": "near", "gap_bits": 0.05}]
    provenance = {"commit": "0123456789abcdef", "machine": "2 cores", "versions": {"torch": "2.13.0"}}
    text = table({"command": "python benchmarks/gaussian.py", "shape": [8, 8], "rows": rows, **provenance})
    assert text.index("| near | 2.000 | 0.0700 | 0.0625 | 0.050 |") < text.index("| far |")
    assert "at commit 0123456789ab, 2 cores" in text


def test_only_what_stands_between_the_markers_changes(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(sample()), encoding="utf-8")
    page = update_page(PAGE, tmp_path)
    assert page.startswith("before\n<!-- results:run -->\n\nTiny on a text") and "old" not in page
    assert page.endswith("<!-- /results -->\nafter\n")
    assert update_page(page, tmp_path) == page


def test_nothing_stands_between_the_markers_while_there_is_no_file(tmp_path):
    assert update_page(PAGE, tmp_path) == "before\n<!-- results:run -->\n<!-- /results -->\nafter\n"


def test_a_broken_results_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"arms": []}', encoding="utf-8")
    with pytest.raises(ReallmError, match="run.json"):
        update_page(PAGE, tmp_path)
