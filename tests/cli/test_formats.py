import json
import math
import sys

import pytest

from reallm.cli import main
from reallm.cli.tables.format_table import formats_dict, formats_text, measure_formats
from reallm.fit import Quality
from reallm.formats import from_spec, known_formats

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


ROTATED = "{format: rotated, base: {format: uniform, bits: 3}}"


def test_a_setting_is_measured_in_the_words_of_a_recipe(capsys):
    # With a name: if --spec were ignored, measuring all formats would take minutes.
    assert main(["formats", "dense", "--measure", "--device", "cpu", "--json", "--spec", ROTATED]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["formats"]
    assert list(found) == ["dense", "rotated"] and err.count("measuring") == 2
    (setting,) = found["rotated"]["settings"]
    assert from_spec(setting["spec"]) == from_spec({"format": "rotated", "base": {"format": "uniform", "bits": 3}})
    assert 2**-6 < setting["measured"]["relative_error"] < 0.05


def test_settings_alone_are_all_that_is_shown(capsys):
    assert list(json.loads(printed(capsys, "--json", "--spec", ROTATED))["formats"]) == ["rotated"]


def test_settings_stand_below_the_examples_of_the_formats_named(capsys):
    specs = ["--spec", "{format: uniform, bits: 7}", "--spec", '{"format": "trellis", "bits": 2}']
    found = json.loads(printed(capsys, "--json", "uniform", *specs))["formats"]
    assert list(found) == ["uniform", "trellis"]
    assert len(found["uniform"]["settings"]) > 1 and found["uniform"]["settings"][-1]["spec"]["bits"] == 7
    assert [setting["spec"]["state_bits"] for setting in found["trellis"]["settings"]] == [16]


def test_formats_are_measured_on_the_device_asked_for(monkeypatch):
    devices = []

    def measure(fmt, shape, device):
        devices.append(device)
        return Quality(3.0, 0.02, 0.1, 0.1)

    monkeypatch.setattr("reallm.cli.tables.format_table.gaussian_quality", measure)
    monkeypatch.setattr("reallm.source.devices.check_device", lambda device: None)
    assert main(["formats", "--measure", "--device", "cuda:1", "--spec", ROTATED]) == 0
    assert devices == ["cuda:1"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--spec", "{format: uniform"], "error: --spec: not valid YAML"),
        (["--spec", "uniform"], "error: a format is a mapping with the key 'format', not 'uniform'"),
        (["--spec", "{format: trellis, bits: 9}"], "error: trellis: bits=9 is not in 1 … 4"),
        (["--measure", "--device", "cuda:77"], "error: --device 'cuda:77' is not available"),
    ],
)
def test_a_setting_or_device_that_cannot_be_is_one_line(capsys, options, says):
    assert main(["formats", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(says) and err.count("\n") == 1


def test_the_keys_of_the_json_are_these():
    found = measure_formats(["codebook"], SMALL)
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


def test_a_format_whose_package_is_missing_is_left_out_and_the_others_are_measured(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    specs = ["--spec", "{format: entropy_coded, bits: 2}", "--spec", "{format: uniform, bits: 2}"]
    assert main(["formats", "--measure", *specs]) == 0
    out, err = capsys.readouterr()
    coded, grid = (next(line for line in out.splitlines() if line.startswith(f"{name} 2")).split() for name in NAMES)
    assert coded[-5:] == 5 * ["–"] and all(float(figure) for figure in grid[-5:])
    assert "not measured: entropy_coded needs the package 'constriction': pip install" in err


NAMES = ("entropy_coded", "uniform")
