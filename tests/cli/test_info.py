"""`reallm info`: the ledger compared with the files."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm.checkpoint
from reallm.cli import main
from reallm.pipeline import Settings, prepare, run
from reallm.pipeline import run_job as running

IDS = torch.arange(12)[None]
ALL_ROLES = """
rules:
- format:
    format: permuted
    base:
      format: low_rank_plus
      rank: 4
      base: {format: codebook, index_bits: 6, vector_dim: 2}
"""


def info(capsys, *arguments):
    code = main(["info", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def ledger(capsys, folder):
    capsys.readouterr()  # output of compress
    code, out, err = info(capsys, folder, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def job(tiny_llama, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipe") / "all_roles.yaml"
    recipe.write_text(ALL_ROLES)
    return prepare(tiny_llama, Settings(recipe=str(recipe)))


@pytest.fixture(scope="module")
def out(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("info") / "out"
    run(job, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("info") / "sharded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write_shards", partial(reallm.checkpoint.write_shards, max_bytes=20_000))
        run(job, folder)
    return folder


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    """Qwen2 has biases inside modules whose weight is compressed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder / "m")
    run(prepare(folder / "m", Settings(recipe="rtn4")), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


@pytest.mark.parametrize("which", ["out", "sharded", "with_biases"])
def test_the_rows_sum_to_the_bytes_on_disk(which, request, capsys):
    folder = request.getfixturevalue(which)
    found = ledger(capsys, folder)
    assert found["total_bytes"] == sum(row["nbytes"] for row in found["rows"]) == bytes_on_disk(folder)
    assert sum(found["by_role"].values()) == sum(found["by_kind"].values()) == found["total_bytes"]
    assert {row["file"] for row in found["rows"]} == {p.name for p in folder.iterdir()}


def test_roles_name_what_the_bytes_are_for(out, capsys):
    roles = ledger(capsys, out)["by_role"]
    assert set(roles) == {
        *("codes", "codebooks", "scales", "residual", "permutation"),
        *("kept", "headers", "tokenizer", "metadata"),
    }
    # 64 entries of two float16 in each of the 14 block matrices.
    assert roles["codebooks"] == 14 * 64 * 2 * 2


def test_bits_are_those_of_block_matrices_and_of_the_whole_model(out, capsys):
    found = ledger(capsys, out)
    blocks = [row["nbytes"] for row in found["rows"] if row["kind"] == "block"]
    assert found["bits_per_weight"] == 8 * sum(blocks) / found["block_weights"]
    assert found["bits_per_parameter"] == 8 * bytes_on_disk(out) / 125_248  # of the tiny Llama, tied ones once
    assert found["resident_bytes"]["decode_per_use"] < found["resident_bytes"]["decode_at_load"]


def test_a_sharded_artifact_has_an_index_and_computes_the_same(out, sharded, capsys):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {p.name: load_file(p) for p in sharded.glob("*.safetensors")}
    assert index == {name: file for file, tensors in stored.items() for name in tensors}
    assert torch.equal(reallm.load(out)(IDS).logits, reallm.load(sharded)(IDS).logits)
    assert ledger(capsys, out)["bits_per_weight"] == ledger(capsys, sharded)["bits_per_weight"]


def test_a_bias_beside_a_compressed_weight_is_kept(with_biases, capsys):
    rows = [row for row in ledger(capsys, with_biases)["rows"] if row["name"].endswith(".bias")]
    assert len(rows) == 3 and {(row["kind"], row["role"], row["matrix"]) for row in rows} == {("kept", "kept", None)}


def test_the_text_shows_totals_bits_and_memory(out, capsys):
    code, text, err = info(capsys, out)
    assert (code, err) == (0, "")
    for words in (f"{bytes_on_disk(out):,}", "permutation", "bits per weight", "bits per parameter", "decode_per_use"):
        assert words in text


def test_the_matrices_are_listed_with_format_and_bits(out, capsys):
    _, text, _ = info(capsys, out, "--matrices")
    assert sum("_proj " in line and "permuted" in line for line in text.splitlines()) == 14


def test_an_artifact_that_keeps_all_blocks_has_null_bits_per_weight(tiny_llama, tmp_path, capsys):
    run(prepare(tiny_llama, Settings(recipe="rtn4", include=("*embed_tokens",))), tmp_path / "out")
    found = ledger(capsys, tmp_path / "out")
    assert found["bits_per_weight"] is None and found["bits_per_parameter"] > 8
    assert "bits per weight " not in info(capsys, tmp_path / "out")[1]


def test_a_file_that_a_user_adds_is_counted(copy, capsys):
    (copy / "notes").mkdir()
    (copy / "notes" / "README.md").write_text("mine")
    assert ledger(capsys, copy)["total_bytes"] == bytes_on_disk(copy)


def config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def truncate(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def drop_tensor(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.base.left"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda f: config(f, lambda c: c.pop("quantization_config")), "not compressed by reallm"),
        (lambda f: config(f, lambda c: c["quantization_config"].update(version=3)), "written by a newer reallm"),
        (lambda f: config(f, lambda c: c["quantization_config"].update(version=None)), "None is not a version"),
        (lambda f: config(f, lambda c: c["quantization_config"].pop("layouts")), "is damaged"),
        (lambda f: config(f, lambda c: c.update(model_type="llama99")), "'llama99' is not known"),
        (lambda f: (f / "model.safetensors").unlink(), "is missing"),
        (drop_tensor, "'model.layers.1.mlp.up_proj.base.left' is missing"),
        (lambda f: truncate(f, -10), "10 bytes are missing"),
        (lambda f: truncate(f, 100), "damaged safetensors file"),
        (lambda f: truncate(f, 3), "damaged safetensors file"),
        (lambda f: truncate(f, 0), "damaged safetensors file"),
    ],
)
def test_a_damaged_artifact_is_one_line_and_exit_2(copy, damage, says, capsys):
    damage(copy)
    code, out, err = info(capsys, copy)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and says in err


@pytest.mark.parametrize("arguments", [["info"], ["eval", "--text"], ["generate"]])
def test_every_command_refuses_a_bad_folder_in_one_line(arguments, tmp_path, text_file, capsys):
    rest = {"info": [], "eval": ["--text", str(text_file)], "generate": ["hello"]}[arguments[0]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    for place in ("nowhere/at/all", "empty", "file.txt"):
        assert main([arguments[0], str(tmp_path / place), *rest]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and place in err


def test_an_uncompressed_model_is_told_from_an_artifact(tiny_llama, capsys):
    code, _, err = info(capsys, tiny_llama)
    assert code == 2 and "not compressed by reallm" in err
