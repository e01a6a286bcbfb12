"""Tensors and files that a model does not use: listed with a reason, or refused with a remedy."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.cli import main
from reallm.errors import SourceError
from reallm.source import open_source, walk

ONE = torch.ones(64)


@pytest.fixture
def replace_tensors(original, tmp_path):
    """folder = replace_tensors(family, extra, config=…): a saved tiny model whose file holds additional tensors."""

    def make(family, extra, renamed=None, **config):
        folder = shutil.copytree(original(family), tmp_path / "model")
        held = load_file(folder / "model.safetensors")
        held = {renamed(name) if renamed else name: tensor for name, tensor in held.items()}
        extra = {name: tensor.clone() for name, tensor in extra.items()}
        save_file(held | extra, folder / "model.safetensors", {"format": "pt"})
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        return folder

    return make


LISTED = {
    "mtp.fc.weight": ("mtp", "multi-token prediction"),
    "model.mtp_block.mlp.weight": ("model.mtp_block", "multi-token prediction"),
    "model.visual.blocks.0.attn.qkv.weight": ("model.visual", "text model alone"),
    "vision_tower.encoder.layers.3.q.bias": ("vision_tower", "text model alone"),
    "audio_tower.conv.weight": ("audio_tower", "text model alone"),
    "model.multi_modal_projector.linear.weight": ("model.multi_modal_projector", "text model alone"),
    "v_head.summary.weight": ("v_head", "has no place for it"),
    "model.layers.1.self_attn.rotary_emb.inv_freq": (
        "model.layers.*.self_attn.rotary_emb.inv_freq",
        "a table that the model computes itself",
    ),
    "model.rotary_emb.inv_freq": ("model.rotary_emb.inv_freq", "a table that the model computes itself"),
}


@pytest.mark.parametrize("key", LISTED)
def test_a_tensor_without_a_place_is_listed_with_its_reason(replace_tensors, key):
    (one,) = open_source(replace_tensors("llama", {key: ONE})).unused
    name, reason = LISTED[key]
    assert (one.name, one.tensors, one.nbytes) == (name, 1, 256) and reason in one.reason


def test_a_bias_of_zeros_is_listed_and_one_of_other_numbers_refused(replace_tensors):
    key = "model.layers.1.self_attn.o_proj.bias"
    folder = replace_tensors("llama", {key: 0 * ONE})
    (one,) = open_source(folder).unused
    assert one.reason == "zeros, which add nothing"
    save_file(load_file(folder / "model.safetensors") | {key: ONE}, folder / "model.safetensors")
    with pytest.raises(SourceError, match="would compute other values without it; give the config.json"):
        open_source(folder)


def test_a_causal_mask_of_an_old_checkpoint_is_listed(replace_tensors):
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    folder = replace_tensors("gpt2", {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": ONE[0]})
    assert {one.reason for one in open_source(folder).unused} == {"a table that the model computes itself"}


def test_blocks_after_the_last_are_a_prediction_head_or_belong_to_another_model(replace_tensors):
    extra = {f"model.layers.2.{name}": ONE for name in ("mlp.norm.weight", "self_attn.weight")}
    with pytest.raises(SourceError, match="config.json describes 2 blocks; weights and config are of different models"):
        open_source(replace_tensors("llama", extra))


def test_blocks_that_the_config_counts_as_a_prediction_head_are_listed(replace_tensors):
    extra = {f"model.layers.2.{name}": ONE for name in ("mlp.norm.weight", "self_attn.weight")}
    (one,) = open_source(replace_tensors("llama", extra, num_nextn_predict_layers=1)).unused
    assert (one.name, one.tensors) == ("model.layers.2", 2) and "multi-token prediction" in one.reason


def test_tensors_that_transformers_ignores_are_listed(replace_tensors, monkeypatch):
    from transformers import LlamaForCausalLM

    key = "model.layers.0.mlp.post_norm.weight"
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"post_norm"])
    assert [one.tensors for one in open_source(replace_tensors("llama", {key: ONE})).unused] == [1]


REFUSED = {
    "model.layers.0.self_attn.q_proj.bias": "has no place.*give the config.json",
    "model.layers.0.self_attn.q_norm.weight": "has no place.*give the config.json",
    "lm_head.bias": "has no place",
    "model.embed_norm.weight": "has no place",
    "model.layers.0.self_attn.q_proj.weight_scale_inv": "part of quantized weights.*give the original model",
    "model.layers.1.mlp.up_proj.qzeros": "part of quantized weights.*give the original model",
    "model.layers.1.mlp.up_proj.weight.absmax": "part of quantized weights.*give the original model",
    "model.layers.1.self_attn.k_proj.lora_A.default.weight": "belongs to an adapter; merge it",
    "model.layers.1.self_attn.k_proj.base_layer.weight": "belongs to an adapter; merge it",
    "base_model.model.model.norm.weight": "belongs to an adapter; merge it",
    "model.layers.1.mlp.up_proj.hada_w1_a": "belongs to an adapter; merge it",
    "_orig_mod.model.norm.weight": r"name of a wrapper \(_orig_mod\).*save the model inside",
    "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight": "name of a wrapper",
    "module.model.norm.weight": r"name of a wrapper \(module\)",
    "norm.weight": "'norm.weight' and another tensor of the files are both 'model.norm.weight' in the model",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_tensor_without_which_the_model_computes_something_else_is_refused_with_the_remedy(replace_tensors, key):
    with pytest.raises(SourceError, match=REFUSED[key]) as caught:
        open_source(replace_tensors("llama", {key: ONE}))
    assert "\n" not in str(caught.value)


WRAPPED = {
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "module": lambda name: f"module.{name}",
    "adapter": lambda name: re.sub(r"(q_proj|v_proj|w1)\.", r"\1.base_layer.", name),
}


@pytest.mark.parametrize("family", ["llama", "tied", "mixtral", "gpt2"])
@pytest.mark.parametrize("how", WRAPPED)
def test_a_dry_run_refuses_names_of_wrappers_as_the_run_does(replace_tensors, family, how, tmp_path, capsys):
    if family == "gpt2" and how == "adapter":
        how = "_orig_mod"
    folder = replace_tensors(family, {}, WRAPPED[how])
    capsys.readouterr()  # what saving printed
    for more in (["--dry-run"], []):
        assert main(["compress", str(folder), "-o", str(tmp_path / "out"), "--recipe", "rtn4", *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and ("wrapper" in err or "adapter" in err)


def test_a_tensor_that_a_mixture_lacks_is_missed_before_the_run(replace_tensors, tmp_path, capsys):
    folder = replace_tensors("mixtral", {})
    held = load_file(folder / "model.safetensors")
    gone = [name for name in held if "layers.1" in name and "experts" in name] + ["model.norm.weight"]
    save_file({name: tensor for name, tensor in held.items() if name not in gone}, folder / "model.safetensors")
    assert main(["compress", str(folder), "-o", str(tmp_path / "out"), "--recipe", "rtn4", "--dry-run"]) == 2
    assert "is missing; copy or download" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["one too many", "one too few", "one of each too many"])
def test_experts_that_are_not_complete_are_refused_before_the_run(replace_tensors, change):
    folder = replace_tensors("mixtral", {})
    held = load_file(folder / "model.safetensors")
    of_one = {name: tensor for name, tensor in held.items() if "layers.1" in name and "experts.3." in name}
    name = next(name for name in of_one if "w1" in name)
    if change == "one too few":
        del held[name]
    else:
        more = of_one if "each" in change else {name: of_one[name]}
        held |= {key.replace("experts.3.", "experts.4."): tensor.clone() for key, tensor in more.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"there are \d of|has shape \(5, "):
        open_source(folder)


def test_experts_of_a_prediction_block_are_listed_with_the_block(tmp_path):
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2}
    sizes |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
    sizes |= {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = t.DeepseekV3Config(**sizes, num_nextn_predict_layers=1)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    block = {"model.layers.2.eh_proj.weight": torch.ones(32, 64)}
    block |= {f"model.layers.2.mlp.experts.{e}.gate_proj.weight": torch.ones(24, 32) for e in range(4)}
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | block, tmp_path / "model.safetensors", {"format": "pt"})
    assert [(one.name, one.tensors) for one in open_source(tmp_path).unused] == [("model.layers.2", 5)]
    scale = {"model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv": torch.ones(1, 1)}
    save_file(held | scale, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="part of quantized weights"):
        open_source(tmp_path)


def test_what_is_not_used_is_said_in_the_plan_by_the_run_and_by_info(replace_tensors, tmp_path, capsys):
    extra = {"mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": ONE}
    folder, out = replace_tensors("llama", extra), tmp_path / "out"
    line = "not used: mtp, 2 tensors, 33.02 kB (multi-token prediction, which LlamaForCausalLM does not have)"
    assert main(["compress", str(folder), "-o", str(out), "--recipe", "rtn4", "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    assert main(["compress", str(folder), "-o", str(out), "--recipe", "rtn4"]) == 0
    assert line in capsys.readouterr().out
    assert main(["info", str(out)]) == 0
    assert line in capsys.readouterr().out
    assert main(["info", str(out), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["unused"]
    assert (row["name"], row["tensors"], row["nbytes"]) == ("mtp", 2, 33024)


def test_an_artifact_whose_list_of_unused_tensors_is_nonsense_is_shown_without(replace_tensors, tmp_path, capsys):
    folder, out = replace_tensors("llama", {"mtp.norm.weight": ONE}), tmp_path / "out"
    reallm.compress(folder, out, recipe="rtn4")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["provenance"]["unused"] = [{"name": 1}, "x", {"name": "a\x1b", "reason": "b"}]
    (out / "config.json").write_text(json.dumps(config))
    assert main(["info", str(out)]) == 0 and "not used" not in capsys.readouterr().out


def test_unused_tensors_do_not_count_as_compressed(original, replace_tensors):
    with_more = open_source(replace_tensors("llama", {"model.visual.weight": torch.ones(1000, 64)}))
    assert with_more.nbytes == open_source(original("llama")).nbytes


def test_unused_tensors_of_another_dtype_do_not_decide_the_models_dtype(replace_tensors, build, save, tmp_path):
    folder = save(build("llama", torch.bfloat16), tmp_path / "bf16")
    held = load_file(folder / "model.safetensors")
    save_file(held | {"visual.weight": torch.ones(4096, 256)}, folder / "model.safetensors", {"format": "pt"})
    source = open_source(folder)
    assert source.dtype == source.config.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in source.skeleton.state_dict().values()} == {torch.bfloat16}


def multimodal(kind):
    """A tiny multimodal model from which AutoModelForCausalLM builds the text model only."""
    import transformers as t

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, **heads}
    vision = {"hidden_size": 32, "intermediate_size": 32}
    if kind == "qwen3_5":
        linear = {f"linear_{part}_head_dim": 16 for part in ("key", "value")}
        text |= {**linear, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
        return t.AutoModelForImageTextToText.from_config(t.Qwen3_5Config(text_config=text, vision_config=vision))
    text |= {"intermediate_size_mlp": 32, "num_local_experts": 2, "interleave_moe_layer_step": 2, "pad_token_id": None}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision |= {f"{part}_dim": 32 for part in ("vision_output", "projector_input", "projector_output")}
    return t.AutoModelForImageTextToText.from_config(t.Llama4Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize(("kind", "words"), [("qwen3_5", ["visual"]), ("llama4", ["vision_model", "multi_modal"])])
def test_of_a_multimodal_model_what_is_left_is_a_text_model_and_the_rest_is_said(kind, words, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = multimodal(kind)
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    text = sum(p.numel() for p in source.skeleton.parameters())
    assert source.nbytes == 4 * text < 4 * model.num_parameters()
    assert all(any(word in one.name for one in source.unused) for word in words)
    assert sum(one.nbytes for one in source.unused) == 4 * (model.num_parameters() - text)
    reallm.compress(tmp_path / "model", tmp_path / "out", recipe="rtn4")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == f"{kind}_text" and config.architectures == [type(source.skeleton).__name__]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == config.architectures[0]


def test_weights_of_two_kinds_in_a_folder_are_refused_naming_both(original, tmp_path, build, capsys):
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    build("tied").save_pretrained(tmp_path / "other", max_shard_size="100KB")
    shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
    for call in (open_source, reallm.load):
        with pytest.raises(SourceError, match=r"two sets of weights, model.safetensors and the \d+ files that model.s"):
            call(folder)


def test_an_index_of_the_single_file_is_one_set_of_weights(original, tmp_path):
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in open_source(folder).files()] == ["model.safetensors"]


def test_weight_files_that_are_not_read_are_listed(original, tmp_path):
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    others = ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
    shards = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    for name in (*others, *shards):
        (folder / name).write_bytes(b"x" * 10)
    found = {one.name: (one.tensors, one.nbytes) for one in open_source(folder).unused}
    assert found == {**dict.fromkeys(others, (0, 10)), "model-*-of-*.safetensors": (0, 20)}


def test_shards_without_an_index_and_variants_alone_say_what_is_missing(original, tmp_path):
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    for name in ("model-00001-of-00001.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
        file = (folder / "model.safetensors").rename(folder / name)
        with pytest.raises(SourceError, match=f"holds {name}, but neither model.safetensors nor model.safetensors.i"):
            open_source(folder)
        file.rename(folder / "model.safetensors")


def test_an_adapter_beside_a_model_is_refused(original, tmp_path):
    folder = shutil.copytree(original("llama"), tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    with pytest.raises(SourceError, match="holds a model and an adapter.*move the adapter"):
        open_source(folder)


LOSSLESS = """
rules: [{match: "*", format: {format: dense, dtype: float32}}]
embedding: {format: dense, dtype: float32}
head: {format: dense, dtype: float32}
"""


@pytest.mark.parametrize("family", ["tied", "gpt2", "opt", "gemma3"])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(replace_tensors, build, family, ids, tmp_path):
    shape = build(family).get_input_embeddings().weight.shape
    head = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4
    folder = replace_tensors(family, {"lm_head.weight": head})
    source = open_source(folder)
    found = walk(source.skeleton)
    assert [m.kind for m in found.matrices if m.kind != "block"] == ["embedding", "head"] and not found.tied_heads
    assert torch.equal(source.read("lm_head.weight"), head)
    (tmp_path / "lossless.yaml").write_text(LOSSLESS)
    reallm.compress(folder, tmp_path / "out", recipe=tmp_path / "lossless.yaml")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        theirs, ours = (reallm.load(place) for place in (folder, tmp_path / "out"))
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        assert not theirs.config.tie_word_embeddings and torch.equal(theirs.lm_head.weight, head)


def test_a_head_equal_to_the_embedding_stays_tied_though_it_is_stored_twice(replace_tensors, build):
    head = build("tied").get_input_embeddings().weight.detach().clone()
    source = open_source(replace_tensors("tied", {"lm_head.weight": head}))
    assert walk(source.skeleton).tied_heads == ["lm_head"] and source.config.tie_word_embeddings and not source.unused


def test_a_head_that_differs_in_one_number_of_the_last_row_is_untied(replace_tensors, build, monkeypatch):
    monkeypatch.setattr("reallm.checkpoint.headers._CHUNK", 1000)
    head = build("tied").get_input_embeddings().weight.detach().clone()
    head[-1, -1] += 1
    assert walk(open_source(replace_tensors("tied", {"lm_head.weight": head})).skeleton).tied_heads == []


@pytest.fixture
def gguf_file(build, tmp_path):
    """file = gguf_file(extra, without=…): the tiny Llama as a GGUF file with additional tensors."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")

    def make(extra, without=(), kind="llama", config=None):
        model = build("tied") if config is None else config
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), kind)
        sizes = {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
        sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 256}
        for key, value in sizes.items():
            writer.add_uint32(f"{kind}.{key}", value)
        writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_token_list([str(number) for number in range(256)])
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        names = gguf.get_tensor_name_map(arch, 2)
        tied = set(model.all_tied_weights_keys)
        held = {names.get_name(n, (".weight", ".bias")): t for n, t in model.state_dict().items() if n not in tied}
        for name, tensor in (held | extra).items():
            if name not in without:
                writer.add_tensor(name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "x.gguf"

    return make


def test_tensors_of_a_gguf_file_without_a_place_are_listed(gguf_file):
    extra = {"rope_freqs.weight": torch.ones(8), "v.blk.0.attn_q.weight": torch.ones(4, 4)}
    extra |= {"blk.2.nextn.eh_proj.weight": torch.ones(4, 4), "blk.0.attn_q.bias": torch.zeros(64)}
    source = open_source(gguf_file(extra))
    assert sum(one.tensors for one in source.unused) == 4
    assert source.nbytes == source.path.stat().st_size - 4 * (8 + 16 + 16 + 64)


@pytest.mark.parametrize("key", ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight", "output.bias", "blk.3.attn_q.weight"])
def test_tensors_of_a_gguf_file_that_change_what_is_computed_are_refused(gguf_file, key):
    with pytest.raises(SourceError, match="no place|different models"):
        open_source(gguf_file({key: torch.ones(64)}))


def test_a_gguf_file_that_lacks_a_tensor_is_refused_before_the_run(gguf_file):
    with pytest.raises(SourceError, match="'model.layers.1.mlp.down_proj.weight' is missing"):
        open_source(gguf_file({}, without=("blk.1.ffn_down.weight",)))


def test_a_head_in_a_gguf_file_of_a_family_that_ties_is_kept_where_it_differs(gguf_file, monkeypatch):
    import reallm.source.model_source as source_module

    monkeypatch.setattr(
        source_module, "quantization_method", lambda config: config.update({"tie_word_embeddings": True})
    )
    head = torch.randn(256, 64)
    source = open_source(gguf_file({"output.weight": head}))
    assert walk(source.skeleton).tied_heads == [] and torch.equal(source.read("lm_head.weight"), head)
    embedding = source.read("model.embed_tokens.weight")
    assert walk(open_source(gguf_file({"output.weight": embedding})).skeleton).tied_heads == ["lm_head"]
