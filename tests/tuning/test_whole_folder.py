"""Tuning keeps the size limit of an artifact, over all its files including config.json."""

import json
import shutil

import pytest
import torch

import reallm
from reallm.checkpoint import encode_untrained_tensors, read_ledger, read_manifest
from reallm.checkpoint.entropy_coding import TRAINED_ROLES
from reallm.cli import main
from reallm.errors import RecipeError
from reallm.formats import from_spec
from reallm.hf import load
from reallm.pipeline.artifact_size import nbytes_by_file
from reallm.pipeline.job import RESERVED_FOR_TUNING
from reallm.tuning import DEFAULT_TRAIN
from reallm.tuning.artifact_update import write_tuned

QUICK = {"context": 32, "batch": 4, "tokens": 4 * 4 * 32, "validation_windows": 8, "validate_every": 2, "loss": "ce"}


def total(folder):
    return sum(nbytes_by_file(folder).values())


def weights(folder):
    return {name: nbytes for name, nbytes in nbytes_by_file(folder).items() if name.endswith(".safetensors")}


def provenance(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["provenance"]


@pytest.fixture(scope="module")
def sized(tiny_llama, tmp_path_factory):
    """An artifact with a size limit of 75 KB; read-only."""
    out = tmp_path_factory.mktemp("sized") / "out"
    reallm.compress(tiny_llama, out, size=75_000)
    return out


def test_a_tuned_folder_keeps_within_its_size_however_often_it_is_tuned(sized, tuning_text, tmp_path):
    assert provenance(sized)["size"] == 75_000
    folders = [sized, *(tmp_path / str(number) for number in range(1, 7))]
    for number, (before, after) in enumerate(zip(folders, folders[1:], strict=False)):
        reallm.tune(before, after, text=(tuning_text,), **QUICK, seed=number)
        assert total(after) <= 75_000 and weights(after) == weights(sized)
        notes = provenance(after)["tuned"]
        assert len(notes) + notes[0].get("earlier", 0) == number + 1
        assert notes[-1].get("seed", 0) == number and provenance(after)["size"] == 75_000
    assert total(folders[1]) > total(sized) and len(provenance(folders[2])["tuned"]) == 2


def test_scales_that_would_code_stay_as_they_are_under_a_size(tiny_llama, tuning_text, tmp_path):
    recipe = str(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text('rules: [{match: "*", format: {format: uniform, bits: 3, group_size: 8}}]')
    reallm.compress(tiny_llama, tmp_path / "plain", recipe=recipe)
    size = total(tmp_path / "plain") + RESERVED_FOR_TUNING + 100
    reallm.compress(tiny_llama, tmp_path / "coded", recipe=recipe, coding=True)
    reallm.compress(tiny_llama, tmp_path / "sized", recipe=recipe, size=size)
    roles = [{row.role for row in read_ledger(tmp_path / name).entropy_coded_rows} for name in ("coded", "sized")]
    assert "scales" in roles[0] and not roles[1] & TRAINED_ROLES
    loud = {**QUICK, "train": ("scales",), "learning_rate": 0.3, "tokens": 12 * 4 * 32}  # values that compress worse
    for before, after in (("coded", "grown"), ("sized", "one"), ("one", "two")):
        reallm.tune(tmp_path / before, tmp_path / after, text=(tuning_text,), **loud)
    assert total(tmp_path / "grown") - total(tmp_path / "coded") > 1000  # its size without the limit
    assert weights(tmp_path / "two") == weights(tmp_path / "one") == weights(tmp_path / "sized")
    assert total(tmp_path / "sized") < total(tmp_path / "one") <= total(tmp_path / "two") <= size
    files = [tmp_path / name / "model.safetensors" for name in ("sized", "two")]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_what_tuning_changes_is_coded_only_without_a_size():
    fmt, names = from_spec({"format": "uniform", "bits": 4, "group_size": 16}), {}
    parts = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in fmt.layout((512, 512)).items()}
    stored, names = encode_untrained_tensors(fmt, parts)
    assert "codes" in names and stored["codes"].nbytes < parts["codes"].nbytes
    assert "scales" not in names and torch.equal(stored["scales"], parts["scales"])
    assert set(DEFAULT_TRAIN) - {"norms"} == TRAINED_ROLES  # norms are never entropy-coded


def made_for(folder, out, size):
    """Copy an artifact and set a size limit in its provenance."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"]["size"] = size
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return out


def test_words_that_could_outgrow_the_size_are_refused_before_any_work(tiny_llama, tuning_text, tmp_path):
    (tmp_path / "mine.yaml").write_text('rules: [{match: "*", format: {format: dense, dtype: bfloat16}}]')
    reallm.compress(tiny_llama, tmp_path / "in", recipe=str(tmp_path / "mine.yaml"), coding=True)
    capped = made_for(tmp_path / "in", tmp_path / "capped", total(tmp_path / "in") + 40)
    with pytest.raises(RecipeError, match="--train dense: these are entropy-coded and could grow"):
        reallm.tune(capped, tmp_path / "out", text=(tuning_text,), train=("dense", "norms"), **QUICK)
    assert not (tmp_path / "out").exists()
    reallm.tune(capped, tmp_path / "norms", text=(tuning_text,), train=("norms",), **QUICK)
    assert total(tmp_path / "norms") <= provenance(capped)["size"] == provenance(tmp_path / "norms")["size"]


@pytest.mark.parametrize("room", [0, 110, 150, 300, 1000])
def test_notes_give_way_to_the_size_and_the_last_goes_last(sized, tmp_path, room):
    source = made_for(sized, tmp_path / "in", total(sized) + room)
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        note = {"text": "0" * 16, "method": "end-to-end", "steps": number}
        write_tuned(source, tmp_path / str(number), {}, note)
        source = tmp_path / str(number)
        assert total(source) <= provenance(source)["size"]
    notes = provenance(source).get("tuned", [{}])
    assert (
        ("tuned" in provenance(source)) == (room > 0)
        and notes[-1].get("steps", 2) == 2
        and (len(notes) == 3) == (room == 1000)
    )
    if room >= 150:
        assert len(notes) + notes[0].get("earlier", 0) == 3
    load(source)


def test_a_folder_that_outgrew_its_size_no_longer_counts_as_made_for_it(sized, tmp_path):
    source = made_for(sized, tmp_path / "in", total(sized) - 100)
    (tmp_path / "out").mkdir()
    write_tuned(source, tmp_path / "out", {}, {"text": "0" * 16})
    assert "size" not in provenance(tmp_path / "out") and provenance(tmp_path / "out")["tuned"]


@pytest.mark.parametrize("wrong", [{"tuned": 7}, {"tuned": [7, {"earlier": "x"}]}, {"size": "many"}, {"size": True}])
def test_a_provenance_of_a_stranger_breaks_nothing(sized, tmp_path, wrong):
    source = made_for(sized, tmp_path / "in", 75_000)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["provenance"] |= wrong
    (source / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_tuned(source, tmp_path / "out", {}, {"text": "0" * 16})
    assert read_manifest(tmp_path / "out").matrices == read_manifest(sized).matrices


def test_what_is_left_for_tuning_takes_any_usual_note(sized, tuning_text, tiny_llama, tmp_path):
    words = {"method": "both", "block_windows": 8, "block_epochs": 1, "train": ("scales", "norms"), "seed": 3}
    reference = {"reference": str(tiny_llama), "loss": "mix"}
    reallm.tune(
        sized, tmp_path / "out", text=(tuning_text,) * 2, **(QUICK | words | reference), block_learning_rate=1e-4
    )
    assert 190 < total(tmp_path / "out") - total(sized) < RESERVED_FOR_TUNING
    assert provenance(tmp_path / "out")["tuned"][0]["train"] == "scales,norms"


def test_the_command_says_the_bytes_of_all_files(sized, tuning_text, tmp_path, capsys):
    words = [w for n, v in QUICK.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    assert main(["tune", str(sized), "-o", str(tmp_path / "out"), "--text", tuning_text, *words]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("files"))
    assert (
        line.split(None, 1)[1] == f"{total(sized):,} bytes before, {total(tmp_path / 'out'):,} after; size limit 75,000"
    )
