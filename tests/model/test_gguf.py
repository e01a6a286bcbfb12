"""Reading a GGUF file, written here from the tiny Llama."""

import json

import pytest
import torch

from reallm.model import load, load_tokenizer, open_source, walk

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


def interleaved(weight, heads):
    """Rows of q and k in the order GGUF keeps them: rotary pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(tiny_llama, tmp_path_factory):
    """The tiny Llama and its tokenizer as one GGUF file of float32 tensors."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model, config = load(tiny_llama), load(tiny_llama).config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tiny_llama)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        tensor = interleaved(tensor, heads) if heads else tensor
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def test_a_gguf_file_reads_as_the_model_it_was_made_of(file, tiny_llama):
    source = open_source(file)
    state = load(tiny_llama).state_dict()
    assert source.names() == list(state) and source.dtype == torch.float32
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


def test_opening_and_walking_decode_nothing(file, monkeypatch):
    monkeypatch.setattr(gguf, "dequantize", lambda *args: pytest.fail("weights were decoded"))
    found = walk(open_source(file).skeleton)
    assert len(found.matrices) == 15 and found.tied_heads == ["lm_head"]


def test_the_config_has_no_trace_of_gguf(file):
    config = open_source(file).config
    assert not hasattr(config, "quantization_config")
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings


def test_a_gguf_file_loads_and_computes_as_the_model(file, tiny_llama):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = load(tiny_llama)(ids).logits
        torch.testing.assert_close(load(file)(ids).logits, expected, rtol=0, atol=1e-5)


def test_the_tokenizer_of_a_gguf_file_survives_saving(file, tiny_llama, tmp_path):
    open_source(file).save_companions(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    saved, read, original = load_tokenizer(tmp_path), load_tokenizer(file), load_tokenizer(tiny_llama)
    for text in ("The river sees\nstone.", "<s>user</s> 12 é"):
        assert saved(text).input_ids == read(text).input_ids == original(text).input_ids
    assert saved.eos_token == "</s>" and saved.bos_token == "<s>"
    assert saved.chat_template == "{{ messages[0]['content'] }}"


def test_a_file_is_parsed_once_and_again_when_it_has_changed(file, tmp_path, monkeypatch):
    copy, parsed = tmp_path / "copy.gguf", []
    copy.write_bytes(file.read_bytes())
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda *a: parsed.append(1) or build(*a))
    open_source(copy).save_companions(tmp_path)
    assert len(parsed) == 1
    copy.write_bytes(file.read_bytes().replace(b"llama.context_length", b"llama.contexT_length"))
    assert open_source(copy).config.max_position_embeddings != open_source(file).config.max_position_embeddings


def test_reading_leaves_gguf_as_it_was(file):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    open_source(file).read("model.norm.weight")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
