"""User errors print one line on stderr with the cause and the remedy, and leave no files."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reallm.checkpoint import read_manifest
from reallm.cli import main

ALL_3_BITS = 'rules: [{match: "*", format: {format: uniform, bits: 3}}]'


@pytest.fixture
def refused(tmp_path, capsys):
    """err = refused(model, *arguments): exit code 2, one line, and neither OUT nor a work folder remains."""

    def run(model, *arguments, out=tmp_path / "out"):
        capsys.readouterr()
        before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
        code = main(["compress", str(model), "-o", str(out), *map(str, arguments)])
        stdout, err = capsys.readouterr()
        # Progress before the bad weight is read.
        progress = [li for li in err.splitlines() if li.startswith("work folder: ") or li.lstrip()[:1].isdigit()]
        lines = [line for line in err.splitlines() if line not in progress]
        assert (code, stdout, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("error: ")
        assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
        return lines[0]

    return run


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def damaged(tiny_llama, tmp_path):
    """folder = damaged(change): a copy of the tiny Llama with tensors changed in place."""

    def make(change):
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("bits", ["0", "17", "-1", "nan", "inf", "1.01"])
def test_bits_beyond_the_possible_say_what_is_possible(tiny_llama, refused, bits):
    err = refused(tiny_llama, "--bits", bits)
    assert f"--bits {float(bits):g}" in err and "between 1." in err and "16.00" in err


def test_bits_that_are_no_number_name_the_option(tiny_llama, refused):
    assert "--bits" in refused(tiny_llama, "--bits", "abc")


def test_the_range_that_is_named_is_one_that_works(tiny_llama, refused):
    from reallm.pipeline import Settings, prepare

    words = refused(tiny_llama, "--bits", "0").split()
    for word in (words[words.index("between") + 1], words[words.index("and") + 1]):
        prepare(tiny_llama, Settings(bits=float(word)))


def test_bits_and_recipe_together_are_refused(tiny_llama, refused):
    assert "either --bits or --recipe, not both" in refused(tiny_llama, "--bits", 3, "--recipe", "mixed")


def test_a_missing_output_option_names_it(tiny_llama, capsys):
    assert main(["compress", str(tiny_llama), "--bits", "3"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["./nowhere", "no/such/folder", "nowhere.gguf"])
def test_a_missing_model_is_named(refused, model):
    assert model in refused(model, "--bits", 3)


def test_an_existing_output_is_left_alone(tiny_llama, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "out exists" in refused(tiny_llama, "--bits", 3) and "remove it" in refused(tiny_llama, "--resume")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_link_to_nowhere_is_an_existing_output(tiny_llama, tmp_path, refused):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "out exists" in refused(tiny_llama, "--bits", 3)


def test_an_output_in_no_folder_names_the_folder(tiny_llama, tmp_path, refused):
    assert "does not exist" in refused(tiny_llama, "--bits", 3, out=tmp_path / "no" / "out")


def test_an_empty_output_is_refused(tiny_llama, capsys):
    assert main(["compress", str(tiny_llama), "-o", "", "--bits", "3"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
def test_a_folder_that_nothing_can_be_written_to_is_named(tiny_llama, capsys):
    assert main(["compress", str(tiny_llama), "-o", "/proc/out", "--recipe", "rtn3"]) == 2
    assert "/proc/out.work" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tiny_llama, tmp_path, refused):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "Permission denied" in refused(tiny_llama, "--recipe", "rtn3", out=tmp_path / "locked" / "out")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [{match: '*', format: {format: magic}}]", "unknown format 'magic'; known formats: additive"),
        ("rules: [{match: '*', format: {format: uniform, bit: 3}}]", "unknown field 'bit'; its fields: bits"),
        ("rules: [{match: '*', format: {format: uniform, bits: 9}}]", "bits=9"),
        ("rules: [{match: '*', format: {format: uniform, bits: '3'}}]", "bits='3' is not of type int"),
        ("rules: [{match: '*', format: {format: uniform}}]", "field 'bits' is missing"),
        ("rules: [{match: '*', format: {format: low_rank_plus, rank: 1}}]", "field 'base' is missing"),
        ("rules: [{match: '*', format: 3}]", "got 3"),
        ("rules: [{match: '*', form: keep}]", "form"),
        ("rules: [{match: '*'}]", "format"),
        ("rulez: []", "rules"),
        ("rules: []", "no rule for"),
        (f"{ALL_3_BITS}\nembeding: keep", "embeding"),
        (f"{ALL_3_BITS}\nembedding: {{format: magic}}", "unknown format 'magic'"),
        (f"{ALL_3_BITS}\nhead: 8", "got 8"),
        ("rules: [{match: '*.nothing', format: keep}, {match: '*', format: keep}]", "'*.nothing' fits no matrix"),
        ("rules: [{match: '*q_proj', format: keep}]", "no rule for model.layers.0.self_attn.k_proj"),
        ("rules: [{role: vv, format: keep}, {match: '*', format: keep}]", "unknown role 'vv'; known roles: q, k, v"),
        ("rules: [{match: '*', format: keep}]\nembedding: keep", "compresses nothing"),
        ("rules: [", "not valid YAML"),
        ("rules: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("", "not a recipe"),
        ("hello", "not a recipe"),
        (b"\xff\xfe\x00\x80", "not readable as text"),
        (b"\x00\x01", "not valid YAML"),
    ],
)
def test_a_recipe_that_cannot_be_followed_names_the_place(tiny_llama, refused, recipe, text, says):
    err = refused(tiny_llama, "--recipe", recipe(text))
    assert says in err and len(err) < 400


def test_an_unknown_recipe_lists_the_shipped_ones(tiny_llama, refused):
    err = refused(tiny_llama, "--recipe", "best")
    assert "best" in err and "mixed" in err and "rtn3" in err


@pytest.mark.parametrize("choice", [("--bits", 3), ("--recipe", "rtn3")])
def test_a_rank_larger_than_a_matrix_names_the_matrix(tiny_llama, refused, choice):
    assert "model.layers.0.self_attn.k_proj" in refused(tiny_llama, *choice, "--rank", 33)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "-1"], "--rank -1"),
        (["--seed", "-1"], "--seed"),
        (["--device", "toaster"], "'toaster' is not available"),
        (["--device", "meta"], "use cpu"),
        (["--embedding", "9"], "--embedding '9' is neither a number from 1 to 8 nor keep"),
        (["--head", "x"], "--head 'x'"),
        (["--include", "*.nothing"], "--include '*.nothing' fits no matrix"),
        (["--exclude", "*.nothing"], "--exclude '*.nothing' fits no matrix"),
        (["--exclude", "*"], "loosen --include/--exclude"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tiny_llama, refused, arguments, says):
    assert says in refused(tiny_llama, "--recipe", "rtn3", *arguments)


def test_bits_for_no_block_matrix_are_refused(tiny_llama, refused):
    assert "no block matrix is left" in refused(tiny_llama, "--bits", 3, "--exclude", "*layers*")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_names_the_remedy(tiny_llama, refused):
    assert "use cpu" in refused(tiny_llama, "--recipe", "rtn3", "--device", "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_named_and_no_work_folder_stays(refused, damaged, name, value):
    folder = damaged(lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    assert f"{name}: 2 of " in refused(folder, "--recipe", "rtn3")


def test_kept_weights_are_checked_before_anything_is_fitted(refused, damaged, monkeypatch):
    monkeypatch.setattr(sys.modules["reallm.pipeline.fit_job"], "fit", None)
    folder = damaged(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert "model.norm.weight" in refused(folder, "--recipe", "rtn3")


def test_weights_too_large_to_square_are_named(refused, damaged):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = damaged(lambda tensors: tensors[name].mul_(1e30))
    assert name in refused(folder, "--recipe", "mixed")


def test_weights_beyond_a_dense_dtype_are_stored_in_one_that_holds_them(damaged, recipe, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    folder = damaged(lambda tensors: tensors[f"{name}.weight"].mul_(1e6))
    text = "rules: [{match: '*', format: {format: dense, dtype: float16}}]"
    assert main(["compress", str(folder), "-o", str(tmp_path / "out"), "--recipe", str(recipe(text))]) == 0
    formats = {matrix.name: matrix.fmt for matrix in read_manifest(tmp_path / "out").matrices}
    assert formats[name].dtype == "bfloat16" and formats["model.layers.1.mlp.up_proj"].dtype == "float16"


def test_a_missing_tensor_is_named(refused, damaged):
    folder = damaged(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in refused(folder, "--recipe", "rtn3")


@pytest.mark.parametrize("kept", [-10, 100, 3, 0])
def test_a_truncated_checkpoint_is_named(refused, damaged, kept):
    folder = damaged(lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors: damaged" in refused(folder, "--recipe", "rtn3")


def test_a_pickle_checkpoint_is_refused_with_the_remedy(refused, damaged):
    folder = damaged(lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    err = refused(folder, "--bits", 3)
    assert "pytorch_model.bin" in err and "pickle" in err and "save_pretrained" in err


def test_a_compressed_model_is_not_compressed_again(tiny_llama, tmp_path, refused):
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "first"), "--recipe", "rtn3"]) == 0
    assert "already compressed" in refused(tmp_path / "first", "--bits", 2)


def test_a_config_that_is_not_json_is_named(refused, damaged):
    folder = damaged(lambda tensors: None)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder, "--bits", 3)


def test_an_artifact_of_a_later_version_names_the_remedy_in_every_command(tiny_llama, tmp_path, text_file, capsys):
    folder = tmp_path / "out"
    assert main(["compress", str(tiny_llama), "-o", str(folder), "--recipe", "rtn3"]) == 0
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(values))
    capsys.readouterr()
    for arguments in (["info"], ["eval", "--text", str(text_file), "--context", "64"], ["generate", "hello"]):
        assert main([arguments[0], str(folder), *arguments[1:]]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "version 99" in err and "pip install -U" in err


@pytest.mark.parametrize("option", ["--fits", "--analysis"])
def test_a_file_in_place_of_a_folder_that_keeps_is_refused_before_any_work(tiny_llama, refused, tmp_path, option):
    (tmp_path / "text.txt").write_text("mine")
    err = refused(tiny_llama, "--bits", "3", option, tmp_path / "text.txt")
    assert f"{option} {tmp_path / 'text.txt'}: is a file; give a folder" in err
