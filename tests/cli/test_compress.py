"""`reallm compress` end to end: files written, budget met, and the result loads."""

import filecmp
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reallm
from reallm.allocate import shipped_recipes
from reallm.checkpoint import read_ledger, read_manifest
from reallm.cli import main
from reallm.hf import MODES, load_tokenizer
from reallm.pipeline import Settings, estimate, prepare
from reallm.source import walk

IDS = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(0))
# Rows of an artifact of the tiny Llama that are cheap to fit.
QUICK = ("--recipe", "rtn3")


def compress(*arguments):
    assert main(["compress", *map(str, arguments)]) == 0


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tensors(folder):
    return load_file(folder / "model.safetensors")


def formats(folder):
    return {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}


def decoded_state(source_folder, folder):
    """Return the source's state dict with every compressed matrix decoded, without using `reallm.load`."""
    stored, model = tensors(folder), reallm.load(source_folder)
    state = model.state_dict()
    by_name = formats(folder)
    for matrix in walk(model).matrices:
        if matrix.name not in by_name:
            continue
        fmt, prefix = by_name[matrix.name], f"{matrix.name}."
        local = {name: stored[prefix + name] for name in fmt.layout(matrix.shape)}
        weight = fmt.decode(fmt.unpack(local, matrix.shape), matrix.shape)
        target = state[matrix.parameter] if matrix.expert is None else state[matrix.parameter][matrix.expert]
        target.copy_(weight.T if matrix.transposed else weight)
    return model


def same_files(first: Path, second: Path) -> bool:
    names = sorted(p.name for p in first.iterdir())
    different = filecmp.cmpfiles(first, second, names, shallow=False)[1:]
    return names == sorted(p.name for p in second.iterdir()) and not any(different)


@pytest.fixture(scope="module")
def out3(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out3"
    compress(tiny_llama, "-o", folder, "--bits", 3)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """folder = models(name): random models of different families, wide enough for a residual of rank 64."""
    import transformers as t

    sizes = {"hidden_size": 128, "intermediate_size": 136, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    configs = {
        "untied": t.LlamaConfig(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.2),
        "gpt2": t.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=512, n_positions=64, initializer_range=0.2),
        "mixtral": t.MixtralConfig(**sizes, **heads, num_local_experts=2, num_experts_per_tok=2),
    }
    made: dict[str, Path] = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            configs[name].bos_token_id, configs[name].eos_token_id, configs[name].pad_token_id = 0, 1, None
            made[name] = tmp_path_factory.mktemp("models") / name
            model = t.AutoModelForCausalLM.from_config(configs[name])
            model.to(torch.bfloat16 if name == "untied" else torch.float32).save_pretrained(made[name])
        return made[name]

    return make


def test_the_folder_holds_weights_config_plan_and_tokenizer_and_nothing_else(out3, tiny_llama):
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in out3.iterdir()} == {"model.safetensors", "config.json", "plan.yaml"} | copied
    assert all(filecmp.cmp(out3 / name, tiny_llama / name, shallow=False) for name in copied)
    assert load_tokenizer(out3)("the river").input_ids == load_tokenizer(tiny_llama)("the river").input_ids
    assert not out3.with_name("out3.work").exists()


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_all_files_have_the_permissions_that_new_files_have(out3, tmp_path):
    (tmp_path / "new").touch()
    assert {p.stat().st_mode for p in out3.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_results_go_to_stdout_and_progress_to_stderr(tiny_llama, tmp_path, capsys):
    compress(tiny_llama, "-o", tmp_path / "out", *QUICK)
    out, err = capsys.readouterr()
    assert "bits per weight" in out and "reallm info" in out and "%" not in out
    assert err.splitlines()[-1].startswith("100 %")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_llama, out3, tmp_path):
    compress(tiny_llama, "-o", tmp_path / "again", "--bits", 3)
    assert same_files(tmp_path / "again", out3)
    compress(tiny_llama, "-o", tmp_path / "other", "--bits", 3, "--seed", 10**30)  # beyond 64 bits
    assert not filecmp.cmp(tmp_path / "other" / "model.safetensors", out3 / "model.safetensors", shallow=False)


def test_the_plan_as_run_is_a_recipe_that_gives_the_same_bytes(tiny_llama, out3, tmp_path):
    compress(tiny_llama, "-o", tmp_path / "again", "--recipe", out3 / "plan.yaml")
    assert same_files(tmp_path / "again", out3)


def test_the_plan_as_run_remembers_what_was_left_out_and_the_embedding(tiny_llama, tmp_path):
    compress(tiny_llama, "-o", tmp_path / "one", *QUICK, "--exclude", "*.1.*", "--embedding", "4", "--rank", 2)
    compress(tiny_llama, "-o", tmp_path / "two", "--recipe", tmp_path / "one" / "plan.yaml")
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_provenance_names_source_recipe_seed_and_versions_but_no_path_and_no_time(out3, tiny_llama):
    provenance = read_manifest(out3).provenance
    assert provenance["source"] == tiny_llama.name and provenance["recipe"] == "3 bits" and provenance["seed"] == 0
    assert {"reallm", "torch", "source_sha256", "device"} <= set(provenance)
    assert str(tiny_llama.parent) not in (out3 / "config.json").read_text()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_compresses_and_loads(models, tmp_path, name, monkeypatch):
    monkeypatch.setattr("reallm.fit.low_rank._ALTERNATIONS", 1)  # quality does not matter here
    monkeypatch.setattr("reallm.fit.kmeans._ITERATIONS", 3)
    compress(models("untied"), "-o", tmp_path / "out", "--recipe", name)
    expected = logits(decoded_state(models("untied"), tmp_path / "out"))
    assert torch.equal(logits(reallm.load(tmp_path / "out")), expected)
    assert read_manifest(tmp_path / "out").provenance["recipe"] == name


def test_without_bits_and_recipe_the_default_recipe_is_taken(tiny_llama, tmp_path):
    compress(tiny_llama, "-o", tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["name"] == "mixed"


def test_a_dry_run_prints_plan_and_cost_and_writes_nothing(tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compress(tiny_llama, "-o", "out", "--bits", 3, "--dry-run")
    text = capsys.readouterr().out
    for words in ("embedding", "bits/weight", "compressed tensors", "time ", "peak memory", "disk while", "tied"):
        assert words in text
    assert list(tmp_path.iterdir()) == []
    # Lines of a role are adjacent.
    roles = [line.split()[0] for line in text.split("unquantized:")[0].splitlines()[1:]]
    assert [role for i, role in enumerate(roles) if role not in roles[:i]] == [k for k, _ in itertools.groupby(roles)]


def test_the_dry_run_foretells_bytes_and_bits_exactly(tiny_llama, out3, monkeypatch):
    monkeypatch.setattr(sys.modules["reallm.pipeline.cost"], "_predicted_seconds", lambda job: 1.0)
    cost, ledger = estimate(prepare(tiny_llama, Settings(bits=3))), read_ledger(out3)
    kinds = ledger.sum_bytes("kind")
    assert cost.compressed_bytes == kinds["block"] + kinds["embedding"]
    assert cost.unquantized_bytes == kinds["kept"]
    assert cost.bits_per_weight == pytest.approx(ledger.bits_per_weight, abs=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_bits_are_met_within_one_percent_and_never_exceeded(tiny_llama, rank):
    for bits in (1.2, 1.5, 2, 2.1, 2.5, 2.7, 3, 3.33, 3.5, 4, 5, 6.25, 8, 9.5, 12, 15, 16):
        if rank is None or bits > 2:  # the residual alone takes 0.75 bits per weight here
            plan = prepare(tiny_llama, Settings(bits=bits, rank=rank)).plan
            assert 0.99 * bits <= plan.block_bits <= bits


@pytest.mark.parametrize("bits", [1.2, 7.5, 16])
def test_the_ledger_measures_the_bits_that_were_asked_for(models, tmp_path, bits):
    compress(models("untied"), "-o", tmp_path / "out", "--bits", bits)
    assert 0.99 * bits <= read_ledger(tmp_path / "out").bits_per_weight <= bits


def test_rank_adds_a_residual_to_every_block_matrix_and_0_removes_one(tiny_llama, tmp_path):
    job = prepare(tiny_llama, Settings(recipe="rtn3", rank=3))
    blocks = [entry.fmt for entry in job.plan.entries if entry.matrix.kind == "block"]
    assert {(fmt.name, fmt.rank) for fmt in blocks} == {("low_rank_plus", 3)}
    removed = prepare(tiny_llama, Settings(recipe="lq-lora", rank=0))
    assert {entry.fmt.name for entry in removed.plan.entries if entry.matrix.kind == "block"} == {"normal_float"}


def test_embedding_and_head_have_their_own_bits_or_are_kept(models, tmp_path):
    compress(models("untied"), "-o", tmp_path / "a", *QUICK, "--embedding", "keep", "--head", "4")
    found = {matrix.kind: matrix for matrix in read_manifest(tmp_path / "a").matrices}
    assert "embedding" not in found and found["head"].fmt.bits == 4
    source = load_file(models("untied") / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors(tmp_path / "a")[name], source[name])
    assert read_ledger(tmp_path / "a").sum_bytes("kind").keys() >= {"block", "head", "kept", "file"}


def test_both_ends_are_at_8_bits_by_default(models):
    ends = [e for e in prepare(models("untied"), Settings(bits=3)).plan.entries if e.matrix.kind != "block"]
    assert [(e.matrix.kind, e.fmt.bits) for e in ends] == [("embedding", 8), ("head", 8)]


def test_include_compresses_only_what_fits_and_exclude_keeps_what_fits(tiny_llama, tmp_path):
    patterns = ("--include", "*_proj", "--exclude", "*.q_proj", "--exclude", "*v_proj")
    compress(tiny_llama, "-o", tmp_path / "a", *QUICK, *patterns)
    names = set(formats(tmp_path / "a"))
    assert len(names) == 10 and not any(name.endswith(("q_proj", "v_proj", "embed_tokens")) for name in names)
    assert torch.equal(logits(reallm.load(tmp_path / "a")), logits(decoded_state(tiny_llama, tmp_path / "a")))


def test_patterns_and_blocks_of_a_recipe_are_those_of_the_model_also_when_only_some_matrices_are_taken(
    tiny_llama, tmp_path
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "rules:\n"
        "- {match: '*down_proj', format: {format: uniform, bits: 6}}\n"
        "- {block: -1, format: {format: uniform, bits: 5}}\n"
        "- {match: '*', format: {format: uniform, bits: 3}}\n"
    )
    job = prepare(tiny_llama, Settings(recipe=str(recipe), include=("*layers.0*.q_proj",)))
    assert [(e.matrix.name, e.fmt.bits) for e in job.plan.entries] == [("model.layers.0.self_attn.q_proj", 3)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["tiny", "gpt2", "mixtral"])
def test_logits_are_those_of_the_decoded_weights_in_both_modes(family, mode, models, tiny_llama, tmp_path):
    source = tiny_llama if family == "tiny" else models(family)
    compress(source, "-o", tmp_path / "out", "--bits", 4)
    with torch.no_grad():
        expected = decoded_state(source, tmp_path / "out")(IDS).logits
        found = reallm.load(tmp_path / "out", mode)(IDS).logits
    # Experts run one at a time here and batched there; everything else is bit-identical.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if family == "mixtral" else 0)


def test_experts_of_one_tensor_are_compressed_together_or_not_at_all(models, tmp_path, capsys):
    arguments = ["compress", str(models("mixtral")), "-o", str(tmp_path / "out"), *QUICK]
    assert main([*arguments, "--exclude", "*gate_up_proj.0"]) == 2
    assert "1 of 2 experts would be compressed" in capsys.readouterr().err
    compress(*arguments[1:], "--exclude", "*gate_up_proj.*")
    assert torch.isfinite(reallm.load(tmp_path / "out")(IDS).logits).all()


@pytest.mark.slow
def test_a_clean_process_without_the_original_computes_the_same_logits_and_saves_them(tiny_llama, tmp_path):
    source, out = shutil.copytree(tiny_llama, tmp_path / "source"), tmp_path / "out"
    compress(source, "-o", out, "--bits", 3)
    expected = logits(decoded_state(source, out))
    shutil.rmtree(source)
    torch.save(IDS, tmp_path / "ids")
    code = f"""
import torch, reallm
from transformers import AutoModelForCausalLM
ids = torch.load({str(tmp_path / "ids")!r})
results = []
for mode in ("decode_at_load", "decode_per_use"):
    with torch.no_grad():
        results.append(reallm.load({str(out)!r}, mode)(ids).logits)
model = AutoModelForCausalLM.from_pretrained({str(out)!r})
model.save_pretrained({str(tmp_path / "saved")!r})
with torch.no_grad():
    results.append(model(ids).logits)
    results.append(AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r})(ids).logits)
torch.save(results, {str(tmp_path / "results")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found in torch.load(tmp_path / "results"):
        # Threads of another process may sum in a different order.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert tensors(tmp_path / "saved").keys() == tensors(out).keys()


def test_compressing_from_python_gives_the_same_bytes(tiny_llama, out3, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "out", bits=3)
    assert same_files(tmp_path / "out", out3)


def test_a_model_in_bfloat16_stays_one(models, tmp_path):
    compress(models("untied"), "-o", tmp_path / "out", *QUICK)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_matrices_far_smaller_than_a_group_are_compressed(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1, "vocab_size": 5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    config = LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for recipe, rank in (("mixed", None), ("reallm-lean", 1), ("reallm-vq", 2), ("rtn3", 0)):
        out = tmp_path / recipe
        reallm.compress(tmp_path / "model", out, recipe=recipe, rank=rank)
        assert torch.isfinite(reallm.load(out)(IDS % 5).logits).all()
