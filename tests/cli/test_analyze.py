import importlib.util
import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reallm.analyze import Scope, prepare
from reallm.analyze.run_analysis import sample_matrix, sampled_shape
from reallm.cli import main
from reallm.cli.tables.structure import bits_over_all
from reallm.errors import FormatError
from reallm.formats import from_spec

UNIFORM = "{format: uniform, bits: 3}"


def test_everything_is_printed_by_role_and_written(tiny_llama, tmp_path, capsys):
    assert main(["analyze", str(tiny_llama), "-o", str(tmp_path / "out"), "--codec", UNIFORM]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("15 of 15 matrices, 0.1 million weights, 45 fits of codecs; about ")
    lines = out.splitlines()
    roles = ["embedding", "q", "k", "v", "o", "gate", "up", "down"]
    assert [line.split()[0] for line in lines[1:9]] == roles
    assert lines[0].split()[:4] == ["matrices", "n", "top", "1/16"]
    assert sum(" greedy " in line for line in lines) == len(roles)
    shifts = lines.index(next(line for line in lines if line.split()[:2] == ["matrices", "matrix"]))
    assert [line.split()[0] for line in lines[shifts + 1 : shifts + 9]] == roles
    assert "uniform 3 64 float16: the order is worth" in out
    found = json.loads((tmp_path / "out" / "structure.json").read_text())
    assert list(found) == ["versions", "model", "scope", "matrices_in_model", "weights", "matrices"]
    assert found["model"]["name"] == tiny_llama.name and len(found["model"]["sha256"]) == 64
    assert [from_spec(spec) for spec in found["scope"]["codecs"]] == [from_spec({"format": "uniform", "bits": 3})]
    row = found["matrices"][1]
    assert (row["name"], row["role"], row["block"]) == ("model.layers.0.self_attn.q_proj", "q", 0)
    assert [view["name"] for view in row["orders"]] == [view["name"] for view in row["noise_orders"]]
    assert list(row["shifts"]) == ["matrix", "rows", "columns"]
    assert len(row["spectrum"]["curve"]) == 65 and row["codecs"][0]["real"] > 0


def test_files_are_written_when_the_reader_of_the_tables_goes_away(tiny_llama, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["analyze", str(tiny_llama), "-o", str(tmp_path / "out"), "--role", "q", "--codec", "none"]) == 0
    assert (tmp_path / "out" / "structure.json").is_file()


def test_random_weights_look_like_noise(tiny_llama, tmp_path):
    assert main(["analyze", str(tiny_llama), "--json", str(tmp_path / "found.json"), "--codec", UNIFORM]) == 0
    for row in json.loads((tmp_path / "found.json").read_text())["matrices"]:
        assert row["spectrum"]["top_share"] == pytest.approx(row["spectrum"]["noise_top_share"], rel=0.2), row["name"]
        assert row["spectrum"]["rank_bits"] == 0 and row["scales"]["rows"] + row["scales"]["columns"] < 0.1
        for side in ("along_rows", "along_columns"):
            alike = row["orders"][0][side]["alike"]
            assert abs(alike["value"]) < 5 * alike["error"]
        assert all(view["net_bits"] < 0.02 for view in row["orders"])
        assert abs(row["codecs"][0]["order_bits"]) < 0.05


def test_structure_planted_in_a_model_is_found(tiny_llama, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    stored[key] = stored[key] + 2 * torch.outer(torch.ones(176), torch.arange(64.0).sin())
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert (
        main(["analyze", str(folder), "--role", "up", "--json", str(tmp_path / "found.json"), "--codec", "none"]) == 0
    )
    plain, planted = json.loads((tmp_path / "found.json").read_text())["matrices"]
    assert (plain["spectrum"]["best_rank"], planted["spectrum"]["best_rank"]) == (0, 1)
    raw = {row["name"]: row["orders"][0]["along_columns"]["alike"]["value"] for row in (plain, planted)}
    assert abs(raw[plain["name"]]) < 0.1 and raw[planted["name"]] > 0.9


def test_matrices_are_chosen_by_block_role_and_name(tiny_llama):
    def names(**scope):
        work = prepare(tiny_llama, Scope(codecs=(), **scope))
        return [matrix.name.removeprefix("model.").removeprefix("layers.") for matrix in work.matrices]

    assert names(blocks=(-1,), roles=("q", "down")) == ["1.self_attn.q_proj", "1.mlp.down_proj"]
    assert names(roles=("embedding",)) == ["embed_tokens"]
    assert names(matrices=("*.o_proj", "*embed*")) == ["embed_tokens", "0.self_attn.o_proj", "1.self_attn.o_proj"]
    assert len(names(blocks=(0,))) == 7
    assert len(names(every_block=True)) == len(names()) == 15


def test_without_a_choice_four_blocks_stand_for_all(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=9, vocab_size=16, **sizes)).save_pretrained(tmp_path)
    work = prepare(tmp_path, Scope(roles=("q",), codecs=()))
    assert [matrix.block for matrix in work.matrices] == [0, 1, 4, 8]
    assert len(prepare(tmp_path, Scope(roles=("q",), every_block=True, codecs=())).matrices) == 9


def test_every_matrix_has_a_line_if_asked_for(tiny_llama, capsys):
    assert main(["analyze", str(tiny_llama), "--codec", "none", "--by-matrix", "--role", "q"]) == 0
    first, *_ = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in first.splitlines()[1:]] == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--matrix", "*.nothing"], "--matrix '*.nothing' fits no matrix (one is model.embed_tokens)"),
        (["--block", "2"], "--block 2 is not in the model, which has 2 blocks from 0 on"),
        (["--role", "qkv"], "--role 'qkv' is not in the model; its roles: embedding, q, k, v, o, gate, up, down"),
        (["--role", "q", "--matrix", "*.v_proj"], "no matrix has the block, role and name asked for together"),
        (["--codec", "{format: nf5}"], "unknown format 'nf5'"),
        (["--codec", "{format: uniform"], "--codec: not valid YAML"),
        (["--codec", "{format: low_rank_plus, rank: 60, base: {format: dense}}"], "k_proj: low_rank_plus: rank=60"),
        (["--sample", "1"], "--sample 1 is below 2"),
        (["--device", "no-such"], "--device 'no-such' is not available"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: not a file in an existing folder"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(tiny_llama, capsys, options, says):
    assert main(["analyze", str(tiny_llama), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_weights_that_are_not_finite_are_refused(tiny_llama, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert main(["analyze", str(folder), "--role", "up", "--codec", "none"]) == 2
    assert "up_proj.weight: 1 of 11264 weights are NaN or infinite" in capsys.readouterr().err


def test_a_matrix_of_zeros_is_left_out(tiny_llama, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert main(["analyze", str(folder), "--block", "0", "--role", "up", "--codec", "none"]) == 0
    assert capsys.readouterr().out == "all weights are 0; there is nothing to analyze\n"


def test_only_a_sample_of_a_large_matrix_is_looked_at(tiny_llama):
    work = prepare(tiny_llama, Scope(roles=("embedding",), sample=50))
    assert work.shape(work.matrices[0]) == (50, 50) and work.weights == 2500


@pytest.mark.parametrize(("size", "most"), [(1000, 96), (50, 50), (30, 50), (100, 5), (65, 64)])
def test_a_sample_is_runs_of_neighbours_from_both_ends_on(size, most):
    weight = torch.arange(size * 4.0).view(size, 4)
    rows = (sample_matrix(weight, most)[:, 0] / 4).long() if most >= 4 else None
    assert sampled_shape((size, 4), most) == tuple(sample_matrix(weight, most).shape)
    assert rows[0] == 0 and rows[-1] == size - 1 and (rows.diff() > 0).all()
    if size > 2 * most > 32:
        assert (rows.diff() == 1).float().mean() > 0.8


def test_a_codec_that_cannot_store_a_sample_is_named_with_its_matrix(tiny_llama):
    fmt = from_spec({"format": "low_rank_plus", "rank": 40, "base": {"format": "dense"}})
    with pytest.raises(FormatError, match="rank=40 exceeds"):
        prepare(tiny_llama, Scope(codecs=(fmt,), sample=39))


def test_without_matplotlib_there_are_no_pictures(tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--role", "q", "--codec", "none", "-o", str(tmp_path / "out")]
    assert main(["analyze", str(tiny_llama), *options]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["structure.json"]
    assert "(no plots: matplotlib is not installed)" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib, the extra [report]")
@pytest.mark.parametrize("codec", [UNIFORM, "none"])
def test_pictures_are_drawn_of_what_was_found(tiny_llama, tmp_path, capsys, codec):
    assert main(["analyze", str(tiny_llama), "--block", "0", "--codec", codec, "-o", str(tmp_path)]) == 0
    written = {file.name for file in tmp_path.iterdir()}
    codecs = {"codecs.png"} if codec != "none" else set()
    assert written == {"structure.json", "spectra.png", "orders.png"} | codecs
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in written if name.endswith("png"))


def test_the_bits_over_all_matrices_count_large_ones_for_more():
    rows = [
        {"shape": [8, 8], "codecs": [{"bits_per_weight": 6.0}]},
        {"shape": [24, 8], "codecs": [{"bits_per_weight": 2.0}]},
    ]
    assert bits_over_all(rows, 0) == 3.0


@pytest.mark.parametrize("json_first", [True, False])
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_refused(
    tiny_llama, tmp_path, capsys, json_first
):
    file = tmp_path / "file"
    file.write_text("mine")
    options = ["--json", str(tmp_path)] if json_first else ["-o", str(file)]
    assert main(["analyze", str(tiny_llama), *options]) == 2
    assert "give a" in capsys.readouterr().err and file.read_text() == "mine"


@pytest.mark.parametrize("there", ["structure.json", "codecs.png"])
def test_what_an_earlier_run_left_is_neither_written_over_nor_left_beside_new_figures(
    tiny_llama, tmp_path, capsys, there
):
    (tmp_path / there).write_text("mine")
    assert main(["analyze", str(tiny_llama), "--role", "q", "--codec", "none", "-o", str(tmp_path)]) == 2
    assert f"{there} exists; give another name or remove it" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(("name", "says"), [("text.txt", "name it .json"), ("old.json", "exists; give another name")])
def test_json_is_not_written_over_a_file_of_the_user(tiny_llama, tmp_path, capsys, name, says):
    (tmp_path / name).write_text("mine")
    options = ["--role", "q", "--codec", "none", "--json", str(tmp_path / name)]
    assert main(["analyze", str(tiny_llama), *options]) == 2
    assert says in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
