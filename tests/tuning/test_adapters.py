"""Adapters: train, load, switch, merge and split them, and compare with PEFT."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import reallm
from reallm.checkpoint import read_ledger, read_manifest, work_folder
from reallm.cli import main
from reallm.errors import ArtifactError
from reallm.hf import load
from reallm.tuning.adapter_merge import Adapters, Factors, merge, read_adapter, save_adapter, split

try:
    import peft
except ImportError:
    peft = None
needs_peft = pytest.mark.skipif(peft is None, reason='not tested with PEFT: pip install ".[peft]"')

IDS = torch.arange(48).view(2, 24) + 5
PATH = "model.layers.0.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    rows = [
        {"prompt": f"Count to {n % 5}: ", "response": "one two three four five" + " six" * (n % 3)} for n in range(120)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def adapters(compressed, task, tmp_path_factory):
    """Two adapters with different seeds over one base."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        options = {"context": 32, "batch": 4, "learning_rate": 0.1, "validate_every": 20, "loss": "ce", "seed": seed}
        tuned = reallm.tune(compressed, folder / name, text=(task,), adapter=2, **options)
        assert tuned.end_to_end["after"]["ce"] < 0.85 * tuned.end_to_end["before"]["ce"]
    return folder


def test_an_adapter_is_two_small_files(adapters, compressed):
    files = {file.name: file.stat().st_size for file in (adapters / "one").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    shapes = [matrix.shape for matrix in read_manifest(compressed).matrices if matrix.kind == "block"]
    assert sum(pair.left.numel() + pair.right.numel() for pair in read_adapter(adapters / "one").values()) == sum(
        2 * (rows + columns) for rows, columns in shapes
    )


def test_adapters_are_switched_and_leave_the_base_as_it_was(adapters, compressed):
    model = load(compressed)
    base, several = logits(model), Adapters(model)
    several.load("one", adapters / "one")
    several.load("two", adapters / "two")
    assert torch.equal(logits(model), base)
    several.switch("one")
    one = logits(model)
    several.switch("two")
    two = logits(model)
    assert not torch.allclose(one, base) and not torch.allclose(one, two)
    several.switch("one")
    assert torch.equal(logits(model), one)
    several.switch("one", "two")
    both = logits(model)
    assert not torch.allclose(both, one) and not torch.allclose(both, two)
    several.switch()
    assert torch.equal(logits(model), base)


def test_an_adapter_loaded_in_place_of_one_at_work_is_at_work(adapters, compressed):
    model = load(compressed)
    several = Adapters(model)
    several.load("mine", adapters / "two")
    several.switch("mine")
    two = logits(model)
    several.load("mine", adapters / "one")
    one = logits(model)
    several.switch("mine")
    assert torch.equal(logits(model), one) and not torch.allclose(one, two)


def test_adapters_at_work_follow_the_dtype_of_what_they_are_given(adapters, compressed):
    module = load(compressed).get_submodule("model.layers.0.self_attn.q_proj")
    model = load(compressed)
    several = Adapters(model)
    several.load("one", adapters / "one")
    several.switch("one")
    adapted, x = model.get_submodule("model.layers.0.self_attn.q_proj"), torch.ones(1, 2, module.in_features)
    added = adapted(x) - module(x)
    for dtype in (torch.bfloat16, torch.float32):
        adapted.to(dtype), module.to(dtype)
        found = adapted(x.to(dtype)) - module(x.to(dtype))
        assert found.dtype == dtype
    torch.testing.assert_close(found, added, rtol=1e-2, atol=1e-2)


def test_a_merged_artifact_answers_as_with_the_adapter_and_counts_its_bytes(adapters, compressed, tmp_path):
    model = load(compressed)
    several = Adapters(model)
    several.load("one", adapters / "one")
    several.switch("one")
    merge(compressed, adapters / "one", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4)
    factors = sum(2 * (p.left.numel() + p.right.numel()) for p in read_adapter(adapters / "one").values())
    rows = [read_ledger(folder).sum_bytes("role")["residual"] for folder in (compressed, tmp_path / "merged")]
    assert rows[1] - rows[0] == factors


def test_what_is_split_off_and_merged_again_is_the_same_artifact(adapters, compressed, tmp_path):
    merge(compressed, adapters / "one", tmp_path / "merged")
    split(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()
    files = [folder / "adapter_model.safetensors" for folder in (adapters / "one", tmp_path / "adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("merged", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_residual_of_the_embedding_stays_when_others_are_split_off(adapters, tiny_llama, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        'rules: [{match: "*", format: {format: uniform, bits: 4}}]\n'
        "embedding: {format: low_rank_plus, rank: 1, base: {format: uniform, bits: 4}}"
    )
    reallm.compress(tiny_llama, tmp_path / "in", recipe=str(tmp_path / "mine.yaml"))
    merge(tmp_path / "in", adapters / "one", tmp_path / "merged")
    split(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    assert read_adapter(tmp_path / "adapter").keys() == read_adapter(adapters / "one").keys()
    answers = [reallm.load(tmp_path / "base", adapter=tmp_path / "adapter"), load(tmp_path / "merged")]
    torch.testing.assert_close(*map(logits, answers), rtol=1e-4, atol=1e-4)
    with pytest.raises(ArtifactError, match="nothing to split"):
        split(tmp_path / "in", tmp_path / "other", tmp_path / "another")


def test_residuals_of_experts_stay_when_others_are_split_off(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=128, num_local_experts=3, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "mine.yaml").write_text(
        'rules: [{match: "*", format: {format: low_rank_plus, rank: 1, base: {format: uniform, bits: 4}}}]'
    )
    reallm.compress(tmp_path / "model", tmp_path / "in", recipe=str(tmp_path / "mine.yaml"))
    split(tmp_path / "in", tmp_path / "base", tmp_path / "adapter")
    answers = [reallm.load(tmp_path / "base", adapter=tmp_path / "adapter"), load(tmp_path / "in")]
    torch.testing.assert_close(*map(logits, answers), rtol=1e-4, atol=1e-4)


def test_merging_into_an_entropy_coded_artifact_keeps_its_codes(tiny_llama, adapters, tmp_path):
    (tmp_path / "mine.yaml").write_text('rules: [{match: "*", format: {format: uniform, bits: 5, group_size: 16}}]')
    reallm.compress(tiny_llama, tmp_path / "in", recipe=str(tmp_path / "mine.yaml"), coding=True)
    model = load(tmp_path / "in")
    several = Adapters(model)
    several.load("one", adapters / "one")
    several.switch("one")
    merge(tmp_path / "in", adapters / "one", tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)
    rows = [read_ledger(tmp_path / name).sum_bytes("role")["codes"] for name in ("in", "out")]
    assert rows[0] == rows[1]


def test_an_artifact_without_residuals_has_nothing_to_split(tiny_llama, tmp_path):
    reallm.compress(tiny_llama, tmp_path / "plain", recipe="rtn4")
    with pytest.raises(ArtifactError, match="nothing to split"):
        split(tmp_path / "plain", tmp_path / "base", tmp_path / "adapter")
    assert not (tmp_path / "base").exists() and not (tmp_path / "adapter").exists()


def test_an_adapter_of_another_model_is_refused(compressed, tmp_path):
    for name, path in (("place", "model.layers.9.mlp.up_proj"), ("shape", PATH)):
        (tmp_path / name).mkdir()
        save_adapter({path: Factors(torch.ones(7, 2), torch.ones(5, 2))}, tmp_path / name, "other")
        with pytest.raises(ArtifactError, match="is no linear of this model"):
            Adapters(load(compressed)).load("x", tmp_path / name)
        with pytest.raises(ArtifactError, match="is no compressed matrix|has the shape"):
            merge(compressed, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_says_so(compressed, tmp_path):
    with pytest.raises(ArtifactError, match="is no adapter"):
        read_adapter(compressed)
    with pytest.raises(ArtifactError, match="adapter 'x' is not loaded; loaded: none"):
        Adapters(load(compressed)).switch("x")


def test_the_command_trains_an_adapter(compressed, task, tmp_path, capsys):
    words = ["--text", task, "--adapter", "1", "--loss", "ce", "--context", "32", "--batch", "4", "--tokens", "256"]
    assert main(["tune", str(compressed), "-o", str(tmp_path / "adapter"), *words]) == 0
    assert "bytes in addition to" in capsys.readouterr().out
    assert main(["tune", str(compressed), "-o", str(tmp_path / "x"), *words, "--method", "blockwise"]) == 2
    assert "--adapter 1 trains end to end" in capsys.readouterr().err


def test_load_takes_an_adapter_and_the_merged_artifact_says_the_same(adapters, compressed, tmp_path):
    merge(compressed, adapters / "two", tmp_path / "merged")
    with_it = logits(load(compressed, adapter=adapters / "two"))
    torch.testing.assert_close(with_it, logits(load(tmp_path / "merged")), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_it, logits(load(compressed)), rtol=1e-2, atol=1e-2)
    packed = logits(load(compressed, "decode_per_use", adapter=adapters / "two"))
    torch.testing.assert_close(packed, with_it, rtol=1e-4, atol=1e-4)


def test_load_reads_an_adapter_once_and_before_the_model(adapters, compressed, monkeypatch):
    began = []

    def noted(what, function):
        return lambda *words, **more: (began.append(what), function(*words, **more))[1]

    monkeypatch.setattr("reallm.hf.adapters.read_adapter", noted("adapter", read_adapter))
    loading = importlib.import_module("reallm.hf.load")  # reallm.hf.load is a function
    monkeypatch.setattr(loading, "read_adapter", noted("adapter", read_adapter))
    monkeypatch.setattr(loading, "read_manifest", noted("model", read_manifest))
    load(compressed, adapter=adapters / "two")
    assert began == ["adapter", "model"]


def run(capsys, *words):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_generate_and_eval_take_an_adapter_and_merging_says_its_bytes(
    adapters, compressed, text_file, tmp_path, capsys
):
    one = adapters / "one"
    code, out, _ = run(capsys, "merge", compressed, one, "-o", tmp_path / "merged")
    rows = {line.split()[0]: line.split(None, 1)[1] for line in out.splitlines()}
    more = sum(2 * (p.left.numel() + p.right.numel()) for p in read_adapter(one).values())
    nbytes = [read_ledger(folder).total_bytes for folder in (compressed, tmp_path / "merged")]
    assert code == 0 and rows["residuals"] == f"{more:,} bytes more" and nbytes[1] > nbytes[0] + more
    assert rows["files"] == f"{nbytes[0]:,} bytes before, {nbytes[1]:,} after"
    words = "Count to 3:", "--raw", "--max-new-tokens", 8
    bare, with_it, merged = (
        run(capsys, "generate", folder, *words, *more)
        for folder, more in ((compressed, ()), (compressed, ("--adapter", one)), (tmp_path / "merged", ()))
    )
    assert with_it == merged and with_it[0] == 0 and with_it[1] != bare[1]
    words = "--text", text_file, "--context", 64, "--windows", 4, "--json"
    bare, with_it, merged = (
        json.loads(run(capsys, "eval", folder, *words, *more)[1])
        for folder, more in ((compressed, ()), (compressed, ("--adapter", one)), (tmp_path / "merged", ()))
    )
    assert with_it["nll"] == pytest.approx(merged["nll"], rel=1e-4) and with_it["nll"] != bare["nll"]
    assert with_it["adapter"] == str(one) and bare["adapter"] is None
    assert f"adapter     {one}" in run(capsys, "eval", compressed, *words[:-1], "--adapter", one)[1]


def test_a_merged_folder_beyond_its_size_says_so_and_no_longer_claims_it(tiny_llama, adapters, tmp_path, capsys):
    reallm.compress(tiny_llama, tmp_path / "in", size=75_000)
    assert main(["merge", str(tmp_path / "in"), str(adapters / "one"), "-o", str(tmp_path / "out")]) == 0
    over = read_ledger(tmp_path / "out").total_bytes - 75_000
    assert f", {over:,} over the size limit of 75,000" in capsys.readouterr().out
    assert read_manifest(tmp_path / "in").size == 75_000 and read_manifest(tmp_path / "out").size is None


def test_what_cannot_be_merged_or_used_is_one_line_and_exit_2(adapters, compressed, other_llama, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text('rules: [{match: "*", format: {format: uniform, bits: 5}}]')
    reallm.compress(other_llama, tmp_path / "other", recipe=str(tmp_path / "mine.yaml"))
    (tmp_path / "bad").mkdir()
    save_adapter({PATH: Factors(torch.ones(64, 2), torch.ones(64, 2))}, tmp_path / "bad", "x")
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    (tmp_path / "small").mkdir()
    save_adapter({PATH: Factors(torch.ones(7, 2), torch.ones(5, 2))}, tmp_path / "small", "x")
    cases = [
        (tmp_path / "other", adapters / "one", "it is of another base"),
        (compressed, compressed, "is no adapter: it lacks adapter_config.json"),
        (compressed, tmp_path / "nowhere", "nowhere: is no adapter"),
        (compressed, tmp_path / "bad", f"{PATH} has factors of rank 2, adapter_config.json says 8"),
        (compressed, tmp_path / "small", "(7, 5)"),
    ]
    for base, adapter, says in cases:
        for words in (("merge", base, adapter, "-o", tmp_path / "out"), ("generate", base, "a", "--adapter", adapter)):
            code, out, err = run(capsys, *words)
            assert (code, out, err.count("\n")) == (2, "", 1) and says in err, words
    assert not (tmp_path / "out").exists() and not work_folder(tmp_path / "out").exists()
    assert "nowhere" in run(capsys, "merge", tmp_path / "nowhere", adapters / "one", "-o", tmp_path / "out")[2]
    (tmp_path / "out").mkdir()
    assert "out exists" in run(capsys, "merge", compressed, adapters / "one", "-o", tmp_path / "out")[2]


def test_an_adapter_of_an_artifact_is_refused_over_its_original(adapters, tiny_llama, text_file, capsys):
    says = "was trained over a compressed model, whose errors it makes up for, and this one is not compressed"
    for words in (("eval", tiny_llama, "--text", text_file), ("generate", tiny_llama, "a")):
        code, out, err = run(capsys, *words, "--adapter", adapters / "one")
        assert (code, out) == (2, "") and says in err, words
    with pytest.raises(ArtifactError, match=says):
        Adapters(load(tiny_llama)).load("one", adapters / "one")


def test_an_adapter_that_names_no_artifact_may_be_used_over_any_model(adapters, tiny_llama, tmp_path):
    save_adapter(read_adapter(adapters / "one"), tmp_path, "x")
    assert not torch.equal(logits(load(tiny_llama, adapter=tmp_path)), logits(load(tiny_llama)))


def test_a_damaged_artifact_gets_no_right_checksums_by_merging(adapters, compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "in")
    data = bytearray((tmp_path / "in" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "in" / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not as it was written"):
        merge(tmp_path / "in", adapters / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_peft
@pytest.mark.parametrize("how", ["both active", "added up"])
def test_two_adapters_at_once_in_peft_give_the_logits_of_both_residuals(adapters, compressed, how):
    from reallm.integrations.peft_adapters import load_peft_model

    several = Adapters(model := load(compressed))
    for name in ("one", "two"):
        several.load(name, adapters / name)
    several.switch("one", "two")
    theirs = load_peft_model(load_peft_model(load(compressed), adapters / "one", "one"), adapters / "two", "two")
    torch.testing.assert_close(logits(theirs), logits(load(compressed, adapter=adapters / "one")), rtol=1e-4, atol=1e-4)
    if how == "both active":
        theirs.base_model.set_adapter(["one", "two"])
    else:
        theirs.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
        theirs.set_adapter("sum")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


@needs_peft
def test_peft_reads_our_adapter_with_equal_logits(adapters, compressed):
    from reallm.integrations.peft_adapters import load_peft_model

    model = load(compressed)
    several = Adapters(model)
    several.load("one", adapters / "one")
    several.switch("one")
    ours = logits(model)
    theirs = logits(load_peft_model(load(compressed), adapters / "one"))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@needs_peft
def test_peft_needs_not_be_told_of_compressed_modules_as_the_readme_says(adapters, compressed):
    theirs = peft.PeftModel.from_pretrained(load(compressed), str(adapters / "one"))
    expected = logits(load(compressed, adapter=adapters / "one"))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


PROMPT = {"num_virtual_tokens": 4}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "PromptTuningConfig": PROMPT,
    "PromptTuningConfig of the vocabulary": PROMPT | {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "PrefixTuningConfig": PROMPT,
    "PromptEncoderConfig": PROMPT | {"encoder_hidden_size": 16},
    "IA3Config": TARGETS | {"feedforward_modules": ["down_proj"]},
    "LoraConfig": TARGETS,
    "LoraConfig of every linear": {"target_modules": "all-linear"},
    "LoraConfig of the embedding": {"target_modules": ["embed_tokens"]},
    "LoraConfig with magnitudes": TARGETS | {"use_dora": True},
    "LoraConfig with a whole head": TARGETS | {"modules_to_save": ["lm_head"]},
    "LoraConfig with a whole embedding": TARGETS | {"modules_to_save": ["embed_tokens"]},
    "LoraConfig with some tokens": TARGETS | {"trainable_token_indices": [1, 2]},
    "TrainableTokensConfig": {"token_indices": [1, 2]},
    "AdaLoraConfig": TARGETS | {"total_step": 10},
    "OFTConfig": TARGETS | {"oft_block_size": 16},
    "BOFTConfig": TARGETS | {"boft_block_size": 16},
    "VeraConfig": {"target_modules": ["q_proj"]},
    "LoHaConfig": TARGETS,
    "LoKrConfig": TARGETS,
    "HRAConfig": TARGETS,
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
}


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_peft_trains_over_an_artifact_and_comes_back(compressed, tmp_path, kind):
    config = getattr(peft, kind.split()[0])(task_type="CAUSAL_LM", **KINDS[kind])
    base = load(compressed, "decode_per_use")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    first = {name: p.detach().clone() for name, p in trained.items()}
    adam = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        adam.step()
    changed = [name for name, p in trained.items() if not torch.equal(p, first[name])]
    assert changed
    for whole in KINDS[kind].get("modules_to_save", []):
        assert any(f"{whole}.modules_to_save" in name for name in changed)
    if kind == "AdaLoraConfig":  # PEFT 0.21 computes no loss over one that is loaded for use
        return
    model.save_pretrained(tmp_path)
    fresh = load(compressed, "decode_per_use")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        found = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_peft
@pytest.mark.parametrize("mode", ["decode_at_load", "decode_per_use"])
def test_what_peft_would_write_into_weights_is_refused_and_changes_nothing(compressed, mode):
    refused = "cannot be merged into or changed.* take the default init_lora_weights"
    expected = logits(load(compressed, mode))
    for start in ("pissa", "olora"):
        with pytest.raises(ArtifactError, match=refused):
            peft.get_peft_model(load(compressed, mode), peft.LoraConfig(init_lora_weights=start, **TARGETS))
    model = peft.get_peft_model(load(compressed, mode), peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS))
    for merge_it in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ArtifactError, match=refused):
            merge_it()
    with pytest.raises(ArtifactError, match="cannot be merged into"):
        model.get_base_model().lm_head.weight = torch.nn.Parameter(torch.ones(2, 2))
    assert torch.equal(logits(model.unload()), expected)


@needs_peft
def test_a_model_whose_modules_peft_wrapped_is_not_saved_as_an_artifact_and_none_is_resized(compressed, tmp_path):
    wrapped = peft.get_peft_model(load(compressed), peft.LoraConfig(**TARGETS)).get_base_model()
    with pytest.raises(ArtifactError, match="no longer in the model under their names"):
        wrapped.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be merged into or changed"):
        load(compressed).resize_token_embeddings(600)


def test_an_adapter_whose_start_was_taken_out_of_its_base_is_refused(compressed, tmp_path):
    folder = hostile(tmp_path / "adapter", config={"init_lora_weights": "pissa_niter_4"})
    with pytest.raises(ArtifactError, match="'pissa_niter_4' took its first factors out of the weights"):
        load(compressed, adapter=folder)


@needs_peft
def test_our_residual_goes_to_peft_and_back_with_equal_logits(adapters, compressed, tmp_path):
    from reallm.integrations.peft_adapters import load_peft_model

    merge(compressed, adapters / "two", tmp_path / "with")
    split(tmp_path / "with", tmp_path / "base", tmp_path / "exported")
    wrapped = load_peft_model(load(tmp_path / "base"), tmp_path / "exported")
    expected = logits(load(tmp_path / "with"))
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-4)
    wrapped.save_pretrained(tmp_path / "saved")
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("exported", "saved")]
    assert configs[0]["revision"] == configs[1]["revision"] and configs[0]["revision"].startswith("sha256:")
    merge(tmp_path / "base", tmp_path / "saved", tmp_path / "back")
    torch.testing.assert_close(logits(load(tmp_path / "back")), expected, rtol=1e-4, atol=1e-4)


@needs_peft
@pytest.mark.parametrize("mode", ["decode_at_load", "decode_per_use"])
def test_peft_trains_lora_on_compressed_modules_without_a_warning_of_them(compressed, tmp_path, recwarn, mode):
    from peft import LoraConfig, get_peft_model

    from reallm.integrations.peft_adapters import accept_compressed_linears

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(compressed, mode), accept_compressed_linears(config))
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not [str(warning.message) for warning in recwarn if "CompressedLinear" in str(warning.message)]
    model.save_pretrained(tmp_path / "lora")
    several = Adapters(fresh := load(compressed))
    several.load("lora", tmp_path / "lora")
    several.switch("lora")
    torch.testing.assert_close(logits(fresh), logits(model.eval()), rtol=1e-3, atol=1e-3)
    with pytest.raises(ArtifactError, match="a compressed weight cannot be merged into"):
        model.merge_adapter()


def hostile(folder, *, config=None, text=None, tensors=None):
    """Write an adapter of rank 2 for PATH with contents that `save_adapter` never writes."""
    folder.mkdir()
    save_adapter({PATH: Factors(torch.ones(64, 2), torch.ones(64, 2))}, folder, "x")
    if config is not None:
        plain = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    if text is not None:
        (folder / "adapter_config.json").write_text(text)
    if tensors is not None:
        names = [f"base_model.model.{PATH}.lora_{side}.weight" for side in "AB"]
        save_file(dict(zip(names, tensors, strict=True)), folder / "adapter_model.safetensors")
    return folder


ONES = torch.ones
HOSTILE = {
    "a scale that is no number": {"config": {"lora_alpha": "many"}},
    "no scale": {"config": {"lora_alpha": None}},
    "an infinite scale": {"text": '{"peft_type": "LORA", "lora_alpha": Infinity}'},
    "a scale beyond all floats": {"config": {"lora_alpha": 10**400}},
    "a pattern that is a list": {"config": {"alpha_pattern": [1, 2]}},
    "a pattern of lists": {"config": {"alpha_pattern": {PATH: [1]}}},
    "deep JSON": {"text": "[" * 100_000},
    "a key twice": {"text": '{"peft_type": "LORA", "peft_type": "LORA"}'},
    "a config that is a number": {"text": "7"},
    "one axis": {"tensors": (ONES(64), ONES(64, 2))},
    "other ranks": {"tensors": (ONES(3, 64), ONES(64, 2))},
    "no rank": {"tensors": (ONES(0, 64), ONES(64, 0))},
    "integers": {"tensors": (ONES(2, 64, dtype=torch.int64), ONES(64, 2))},
    "no numbers": {"tensors": (torch.full((2, 64), float("nan")), ONES(64, 2))},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_strangers_adapter_is_read_or_refused_by_one_error(compressed, tmp_path, what):
    folder = hostile(tmp_path / "adapter", **HOSTILE[what])
    with pytest.raises(ArtifactError) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError):
        merge(compressed, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not work_folder(tmp_path / "out").exists()


def test_an_adapter_cut_short_or_led_to_a_device_is_refused(compressed, tmp_path):
    folder = hostile(tmp_path / "adapter")
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-9])
    with pytest.raises(ArtifactError, match="damaged"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError):
        read_adapter(folder)


def test_an_adapter_for_a_module_that_is_no_linear_is_refused(compressed, tmp_path):
    (tmp_path / "adapter").mkdir()
    save_adapter({"model": Factors(torch.ones(64, 2), torch.ones(64, 2))}, tmp_path / "adapter", "x")
    with pytest.raises(ArtifactError, match="is no linear of this model"):
        Adapters(load(compressed)).load("x", tmp_path / "adapter")
