import json
import math

import pytest

from reallm.cli import main
from reallm.fit import Quality
from reallm.formats import from_spec, known_formats
from reallm.report.formats import formats_dict, formats_text, measured_formats

SMALL = (32, 64)


def printed(capsys, *arguments):
    assert main(["formats", *arguments]) == 0
    return capsys.readouterr().out


def test_every_registered_format_is_listed(capsys):
    lines = printed(capsys).splitlines()
    assert [line.split(":")[0] for line in lines if line.split(":")[0] in known_formats()] == list(known_formats())


def test_names_choose_the_formats(capsys):
    found = json.loads(printed(capsys, "--json", "uniform", "dense", "uniform"))
    assert list(found["formats"]) == ["uniform", "dense"]


def test_a_format_shows_its_fields_papers_and_bits(capsys):
    out = printed(capsys, "codebook")
    assert "index_bits, vector_dim=2, group_size=64, scales=two_level" in out
    assert "codebook[code] · scale." in out and "arXiv:2405.13155" in out
    assert "codebook 6 2 64 two_level" in out and "3.129" in out and "1024×1024" in out


def test_measuring_adds_error_bound_gap_and_seconds(capsys):
    header = next(line for line in printed(capsys, "uniform", "--measure").splitlines() if line.startswith("setting"))
    assert header.split("  ")[1:] and all(word in header for word in ("error", "bound", "gap", "fit", "decode"))


def test_progress_of_measuring_is_not_in_the_json(capsys):
    assert main(["formats", "dense", "--measure", "--json"]) == 0
    out, err = capsys.readouterr()
    (setting,) = json.loads(out)["formats"]["dense"]["settings"]
    assert err == "measuring dense bfloat16\n" and setting["bits_per_weight"] == 16


def test_the_keys_of_the_json_are_these():
    found = measured_formats(["codebook"], SMALL)
    assert list(found) == ["shape", "formats"] and found["shape"] == list(SMALL)
    entry = found["formats"]["codebook"]
    assert list(entry) == ["description", "fields", "papers", "decoding", "settings"]
    assert entry["fields"][1] == {"name": "vector_dim", "type": "int", "required": False, "default": 2}
    assert entry["fields"][0] == {"name": "index_bits", "type": "int", "required": True, "default": None}
    setting = entry["settings"][0]
    assert list(setting) == ["name", "spec", "nbytes", "bits_per_weight", "measured"]
    assert list(setting["measured"]) == [
        "relative_error", "shannon_error", "gap_bits", "fit_seconds_per_million", "decode_seconds_per_million",
    ]  # fmt: skip
    assert formats_dict(["codebook"], SMALL)["formats"]["codebook"]["settings"][0]["measured"] is None
    assert from_spec(setting["spec"]).nbytes(SMALL) == setting["nbytes"]


def test_an_unknown_format_is_one_line_that_lists_the_known_ones(capsys):
    assert main(["formats", "uniform", "nf5", "--measure"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: unknown format 'nf5'; known formats: {', '.join(known_formats())}\n")


@pytest.mark.parametrize("name", known_formats())
def test_every_format_says_what_it_is_and_has_examples(name):
    entry = formats_dict([name])["formats"][name]
    own = known_formats()[name].__doc__
    assert own and not own.startswith(f"{known_formats()[name].__name__}("), "dataclass wrote this docstring"
    assert entry["description"] and entry["decoding"]
    assert entry["settings"], f"{name}: `examples` is empty, so that nothing is rated or measured"


def test_a_lossless_format_has_no_gap_and_no_word_for_it_in_json():
    found = formats_dict(["dense"], SMALL, lambda fmt, shape: Quality(32.0, 0.0, 0.1, 0.1))
    assert found["formats"]["dense"]["settings"][0]["measured"]["gap_bits"] is None
    assert "–" in formats_text(found)
    assert Quality(32.0, 0.0, 0.1, 0.1).gap_bits == -math.inf
