"""Read models lazily and safely, with a one-line error for every failure."""

import fnmatch
import json
import logging
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from reallm.errors import SourceError
from reallm.source import open_source, read_matrix, walk
from reallm.source.model_source import DOWNLOADS


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "gpt2", "opt", "phi3", "mixtral", "gpt_oss"])
def test_every_tensor_reads_as_the_model_has_it(original, family, build):
    model, source = build(family), open_source(original(family))
    state = model.state_dict()
    assert source.names() == list(state)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


def test_matrices_read_as_out_in(original, build):
    source, model = open_source(original("gpt2")), build("gpt2")
    matrix = next(m for m in walk(source.skeleton).matrices if m.name == "transformer.h.1.mlp.c_fc")
    assert torch.equal(read_matrix(source, matrix), model.transformer.h[1].mlp.c_fc.weight.T)


def test_an_expert_reads_as_its_slice(original, build):
    source, model = open_source(original("mixtral")), build("mixtral")
    matrix = next(m for m in walk(source.skeleton).matrices if m.name == "model.layers.1.mlp.experts.down_proj.2")
    assert torch.equal(read_matrix(source, matrix), model.model.layers[1].mlp.experts.down_proj[2])


MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "phimoe", "granitemoe", "jetmoe"]


def mixture(family, build, tmp_path):
    """A tiny mixture-of-experts model as transformers saves it, mostly expert by expert."""
    import transformers as t

    if family in ("mixtral", "qwen3_moe"):
        model = build(family)
    else:
        names = {"qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe", "deepseek_v3": "DeepseekV3", "phimoe": "Phimoe"}
        names |= {"granitemoe": "GraniteMoe", "jetmoe": "JetMoe"}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2}
        sizes |= {"num_experts": 11, "n_routed_experts": 11, "num_local_experts": 11, "first_k_dense_replace": 1}
        sizes |= {"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
        sizes |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "shared_expert_intermediate_size": 24, "pad_token_id": None}
        sizes |= {"bos_token_id": 0, "eos_token_id": 1, "decoder_sparse_step": 1}
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(getattr(t, f"{names[family]}Config")(**sizes))
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_saved_expert_by_expert_is_read_part_by_part(family, build, tmp_path):
    model = mixture(family, build, tmp_path)
    source = open_source(tmp_path)
    whole = source.load(torch.float32).state_dict()
    assert source.names() == list(whole) == list(model.state_dict())
    for name, tensor in whole.items():
        assert torch.equal(source.read(name), tensor), name
        if tensor.ndim == 3:
            assert all(torch.equal(source.read(name, i), part) for i, part in enumerate(tensor)), name
    assert source.reads_lazily and "_complete" not in vars(source)


def test_a_family_that_is_converted_otherwise_is_read_whole_and_says_so(build, tmp_path, monkeypatch):
    from transformers.core_model_loading import Concatenate

    model = mixture("mixtral", build, tmp_path)
    monkeypatch.setattr("transformers.core_model_loading.MergeModulelist", Concatenate)  # no known conversion is left
    source = open_source(tmp_path)
    assert not source.reads_lazily and "converts tensors of this family" in source.full_load_reason
    assert all(torch.equal(source.read(name), tensor) for name, tensor in model.state_dict().items())


def test_an_expert_of_another_shape_than_the_others_is_an_error(build, tmp_path):
    mixture("mixtral", build, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.3.w2.weight"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError):
        source = open_source(tmp_path)
        for name in source.names():
            source.read(name)


def test_the_stored_dtype_is_preserved(tmp_path, build, save):
    source = open_source(save(build("llama", torch.bfloat16), tmp_path))
    assert source.dtype == torch.bfloat16 and source.config.dtype == torch.bfloat16
    assert source.read("lm_head.weight").dtype == torch.bfloat16


def test_shards_read_as_one_model(tmp_path, build):
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    source = open_source(tmp_path)
    assert len(source.files()) > 2
    assert all(torch.equal(source.read(name), tensor) for name, tensor in model.state_dict().items())


def test_sizes_are_those_of_the_original(original, build):
    source, model = open_source(original("tied")), build("tied")
    assert source.total_parameters == sum(p.numel() for p in model.parameters())
    assert source.nbytes == 4 * source.total_parameters


def test_the_fingerprint_changes_with_one_weight(tmp_path, build, save):
    model = build("tied")
    before = open_source(save(model, tmp_path / "a")).fingerprint()
    assert open_source(save(model, tmp_path / "b")).fingerprint() == before
    model.model.norm.weight.data[3] += 1
    assert open_source(save(model, tmp_path / "c")).fingerprint() != before


def test_auxiliary_files_are_copied_byte_for_byte(tiny_llama, tmp_path):
    open_source(tiny_llama).save_auxiliary_files(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes() == (tiny_llama / name).read_bytes() for name in names)


COPIED = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("spiece.model", "sentencepiece.bpe.model", "bpe.codes", "vocab.bpe", "encoder.json", "source.spm", "dict.txt"),
    *("qwen.tiktoken", "tekken.json", "vocab", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
    *("additional_chat_templates/tool_use.jinja", "qformer_tokenizer/tokenizer_config.json"),
    *("qformer_tokenizer/vocab.txt", "words/of.mine"),
)
NOT_COPIED = (
    *("modeling_own.py", "tokenizer.py", "tokenizer.pkl", "vocab.bin", "training_args.bin", "README.md", "model.gguf"),
    *("pytorch_model.bin.index.json", "trainer_state.json", "consolidated.safetensors", ".gitattributes", "a.png"),
    *("onnx/config.json", "onnx/tokenizer_config.json", "onnx/tokenizer.json", "other/notes.txt", "words/of.pkl"),
)


def extra_files(original, tmp_path, names):
    folder = copy_model(original, tmp_path)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)
    named = {
        "vocab_file": "words/of.mine",
        "merges": ["words/of.pkl", "../x.txt", "/etc/hostname", "config.json", "a\0b"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def test_auxiliary_files_of_tokenizers_and_processors_travel_and_code_and_pickles_do_not(original, tmp_path):
    folder, out = extra_files(original, tmp_path, COPIED + NOT_COPIED), tmp_path / "out"
    (tmp_path / "x.txt").write_text("outside")
    out.mkdir()
    source = open_source(folder)
    source.save_auxiliary_files(out)
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert found == {*COPIED, "tokenizer_config.json", "generation_config.json"} == set(source.auxiliary_file_bytes)
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in found)


def test_the_same_files_are_downloaded(tmp_path, monkeypatch):
    from reallm.source.model_source import DOWNLOADS_BELOW, NOT_DOWNLOADED

    def any_of(name, patterns):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    def fetched(name):
        return (any_of(name, DOWNLOADS) and not any_of(name, NOT_DOWNLOADED)) or any_of(name, DOWNLOADS_BELOW)

    named = "words/of.mine"  # downloaded once the settings that name it are present
    assert [name for name in COPIED if not fetched(name)] == [named]
    dangerous = [name for name in NOT_COPIED if name.endswith((".py", ".bin", ".pkl", ".gguf")) and "/" not in name]
    assert not any(map(fetched, [*dangerous, "onnx/model.safetensors", "original/x.bin"]))


def test_files_that_settings_of_a_hub_model_name_are_fetched_too(original, tmp_path, monkeypatch):
    folder, asked = extra_files(original, tmp_path, ["words/of.mine"]), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append(how) or str(folder))
    source = open_source("someone/model")
    assert "words/of.mine" in asked[1]["allow_patterns"] and "words/of.pkl" not in asked[1]["allow_patterns"]
    assert source.label == "someone/model"


def test_a_file_larger_than_any_tokenizer_is_not_copied_but_listed(original, tmp_path, monkeypatch):
    monkeypatch.setattr("reallm.source.auxiliary_files.LARGEST", 10_000)
    folder = copy_model(original, tmp_path)
    (folder / "corpus.txt").write_text("x" * 10_001)
    source = open_source(folder)
    assert [(one.name, one.nbytes) for one in source.unused] == [("corpus.txt", 10_001)]
    assert "corpus.txt" not in source.auxiliary_file_bytes


def test_a_size_counts_auxiliary_files_of_sub_folders(tiny_llama, tmp_path):
    import reallm

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x" * 20_000)
    (folder / "NOTICE").write_text("x" * 5_000)
    reallm.compress(folder, tmp_path / "out", size="130KB")
    taken = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert 0.98 * 130_000 < taken <= 130_000
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").is_file()


def test_opening_changes_no_setting_of_transformers(original):
    from transformers.utils import logging as theirs

    before = (theirs.get_verbosity(), theirs.is_progress_bar_enabled(), logging.getLogger("transformers").level)
    open_source(original("tied")).load()
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled(), logging.getLogger("transformers").level) == before


def copy_model(original, tmp_path, family="llama"):
    return shutil.copytree(original(family), tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", ["./nothing", "/no/such", "a/b/c", "nothing.gguf", "~/no-such-model", "two words"])
def test_a_path_that_does_not_exist_is_refused(name):
    with pytest.raises(SourceError, match="no such file or folder; MODEL is"):
        open_source(name)


def test_a_mistyped_name_in_an_existing_folder_is_taken_for_a_path(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such file or folder; MODEL is"):
        open_source("models/smoll")


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="not available from the Hugging Face hub") as caught:
        open_source("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_nothing_that_can_run_code_is_downloaded():
    dangerous = ("modeling_own.py", "pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "x.pkl")
    assert not [name for name in dangerous for pattern in DOWNLOADS if fnmatch.fnmatch(name, pattern)]


def test_an_empty_folder_has_no_config(tmp_path):
    with pytest.raises(SourceError, match="has no config.json"):
        open_source(tmp_path)


def test_a_config_that_is_not_json_is_named(original, tmp_path):
    folder = copy_model(original, tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match="config.json: is not JSON"):
        open_source(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "MODEL.PT"])
def test_a_pickle_checkpoint_is_refused_with_the_remedy(original, tmp_path, name):
    folder = copy_model(original, tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(SourceError, match="pickle.*save_pretrained"):
            open_source(path)


def test_a_folder_without_weights_names_the_files_it_needs(original, tmp_path):
    folder = copy_model(original, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="holds no safetensors weights"):
        open_source(folder)


def test_a_missing_shard_is_named(tmp_path, build):
    build("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(SourceError, match=f"{shard.name}: weight file is missing"):
        open_source(tmp_path)


def test_a_missing_tensor_is_named(original, tmp_path):
    folder = copy_model(original, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match="'model.layers.1.mlp.up_proj.weight' is missing"):
        open_source(folder).read("model.norm.weight")


def test_a_tensor_of_another_shape_is_named(original, tmp_path):
    folder = copy_model(original, tmp_path)
    edit_config(folder, intermediate_size=128)
    with pytest.raises(SourceError, match=r"shape \(96, 64\), config.json says \(128, 64\)"):
        open_source(folder)


def test_a_truncated_file_is_named(original, tmp_path):
    folder = copy_model(original, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    for length in (4, 100, len(data) - 10):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(SourceError, match="model.safetensors: damaged"):
            open_source(folder)


def test_model_code_in_the_folder_is_never_run(original, tmp_path):
    folder = copy_model(original, tmp_path)
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SourceError, match="model code from its own folder, which reallm never runs"):
        open_source(folder)


def test_an_unknown_model_type_is_named(original, tmp_path):
    folder = copy_model(original, tmp_path)
    edit_config(folder, model_type="llama99")
    with pytest.raises(SourceError, match="'llama99' is not known"):
        open_source(folder)


def test_a_model_that_is_not_a_causal_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(SourceError, match="'vit' is not a causal language model"):
        open_source(tmp_path)


@pytest.mark.parametrize(("method", "words"), [("reallm", "already compressed by reallm"), ("gptq", "with gptq")])
def test_a_quantized_model_asks_for_the_original(original, tmp_path, method, words):
    folder = copy_model(original, tmp_path)
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=f"{words}; give the original model"):
        open_source(folder)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense" * 10)
    with pytest.raises(SourceError, match="cannot be read as GGUF"):
        open_source(tmp_path / "x.gguf")


def test_a_missing_gguf_package_names_the_pip_command(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="pip install gguf"):
        open_source(tmp_path / "x.gguf")
