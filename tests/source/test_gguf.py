"""Read a GGUF file, written here from the tiny Llama."""

import json

import pytest
import torch

from reallm.errors import SourceError
from reallm.hf import load, load_tokenizer
from reallm.source import open_source, read_matrix, walk

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


def interleave_rotary(weight, heads):
    """Rows of q and k in GGUF order: interleaved rotary pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(tiny_llama, tmp_path_factory):
    """The tiny Llama and its tokenizer as one GGUF file of float32 tensors."""
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama)


@pytest.fixture
def parts(tiny_llama, tmp_path):
    """The same split into three files, as by llama-gguf-split."""
    write_llama(tmp_path / "tiny.gguf", tiny_llama, split_max_tensors=8)
    return sorted(tmp_path.glob("*.gguf"))


def write_llama(path, tiny_llama, **options):
    model, config = load(tiny_llama), load(tiny_llama).config
    writer = gguf.GGUFWriter(str(path), "llama", **options)
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
        tensor = interleave_rotary(tensor, heads) if heads else tensor
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
    open_source(file).save_auxiliary_files(tmp_path)
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
    open_source(copy).save_auxiliary_files(tmp_path)
    assert len(parsed) == 1
    copy.write_bytes(file.read_bytes().replace(b"llama.context_length", b"llama.contexT_length"))
    assert open_source(copy).config.max_position_embeddings != open_source(file).config.max_position_embeddings


def test_a_model_in_parts_is_read_as_the_one_file_it_was(file, parts, tiny_llama):
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    source, whole = open_source(parts[0]), open_source(file)
    assert (
        source.reads_lazily and source.files() == parts and source.nbytes == sum(part.stat().st_size for part in parts)
    )
    assert source.config.tie_word_embeddings and source.names() == whole.names()
    loaded = source.load().state_dict()
    for name in whole.names():
        assert torch.equal(source.read(name), whole.read(name)) and torch.equal(loaded[name], whole.read(name)), name
    assert load_tokenizer(parts[0])("river").input_ids == load_tokenizer(file)("river").input_ids


def test_parts_change_the_fingerprint_and_are_parsed_again(parts):
    before = open_source(parts[0]).fingerprint()
    data = bytearray(parts[2].read_bytes())
    data[-5] ^= 1
    parts[2].write_bytes(data)
    assert open_source(parts[0]).fingerprint() != before


def test_other_parts_than_the_first_name_it(parts):
    open_source(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        for read in (open_source, load_tokenizer):
            with pytest.raises(
                SourceError, match=f"is part {number} of 3 .* give the first, .*-00001-of-00003.gguf, or"
            ):
                read(part)


def test_parts_that_are_missing_swapped_or_renamed_are_one_line(parts, tiny_llama, tmp_path, capsys):
    from reallm.cli import main

    def refused(said, part=parts[0]):
        assert main(["compress", str(part), "-o", str(tmp_path / "out"), "--recipe", "rtn4", "--dry-run"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and said in err, err

    third = parts[2].read_bytes()
    parts[2].unlink()
    refused(f"{parts[2]}: part 3 of 3 of a GGUF model is missing; copy it there")
    parts[2].write_bytes(parts[1].read_bytes())
    refused(f"{parts[2]}: is not part 3 of 3 of the model of {parts[0].name}; copy it again")
    parts[2].write_bytes(third[:200])
    refused(f"{parts[2]}: cannot be read as GGUF")
    parts[2].write_bytes(third)
    refused("is part 1 of 3 of a GGUF model, but its name differs", parts[0].rename(tmp_path / "x.gguf"))
    refused("is part 1 of 3", (tmp_path / "x.gguf").rename(tmp_path / "tiny-00001-of-00002.gguf"))


def test_suffixes_in_capitals_are_gguf_too(file, parts, tmp_path):
    copy = tmp_path / "COPY.GGUF"
    copy.write_bytes(file.read_bytes())
    assert torch.equal(open_source(copy).read("model.norm.weight"), open_source(file).read("model.norm.weight"))
    assert torch.equal(load(copy).model.norm.weight, load(file).model.norm.weight)
    assert load_tokenizer(copy)("river").input_ids == load_tokenizer(file)("river").input_ids
    big = [part.rename(part.with_name(part.name.upper())) for part in parts]
    assert open_source(big[0]).files() == big
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source("NONE.GGUF")


def test_reading_leaves_gguf_as_it_was(file):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    open_source(file).read("model.norm.weight")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


# transformers' name: GGUF's name, and header fields in addition to the common sizes
KINDS = {
    "llama": ("llama", {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}),
    "qwen2": ("qwen2", {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}),
    "gemma3": ("gemma3", {"attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16}),
    "phi3": ("phi3", {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}),
    "gpt2": ("gpt2", {"attention.layer_norm_epsilon": 1e-5}),
    "qwen3_moe": (
        "qwen3moe",
        {
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "expert_count": 4,
            "expert_used_count": 2,
        },
    ),
}


def write(path, family, build, changed=()):
    """A GGUF file of a tiny model of a family with random numbers; matrices in 8-bit blocks if their shape allows."""
    import numpy as np

    kind, fields = KINDS[family]
    # transformers takes this width from its defaults and ignores the header.
    model = build(family, **({"moe_intermediate_size": 768} if family == "qwen3_moe" else {}))
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_name(family)
    for key, value in {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 256 if family == "gpt2" else 96,
        "attention.head_count": 4,
        "vocab_size": 256,
        **fields,
    }.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{kind}.{key}", value)
    writer.add_token_list([str(number) for number in range(256)])
    writer.add_pad_token_id(0)
    rng = np.random.default_rng(0)
    for name, shape in gguf_shapes(kind, model).items():
        numbers = rng.normal(size=shape).astype(np.float32)
        if name in changed:
            numbers = numbers[:-1]
        blocks = len(shape) > 1 and shape[-1] % 32 == 0
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(numbers, q8) if blocks else numbers, raw_dtype=q8 if blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_shapes(kind, model):
    """Shapes by GGUF names: Conv1D transposed, gate and up of experts separate."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, shapes = gguf.get_tensor_name_map(arch, 2), {}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        stem, suffix = next(((name.removesuffix(s), s) for s in (".weight", ".bias") if name.endswith(s)), (name, ""))
        shape = tuple(tensor.shape)
        if name in tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            half = (shape[0], shape[1] // 2, shape[2])
            shapes |= {f"blk.{block}.ffn_{part}_exps.weight": half for part in ("gate", "up")}
        elif stem == "transformer.wpe":  # transformers ignores the header's context here too
            shapes["position_embd.weight"] = (1024, shape[1])
        elif (found := names.get_name(stem)) is not None:
            transposed = "Conv1D" in type(model.get_submodule(stem)).__name__ if suffix else False
            shapes[found + (suffix or ".weight")] = shape[::-1] if transposed and suffix == ".weight" else shape
    return shapes


@pytest.mark.parametrize("family", KINDS)
def test_a_gguf_file_reads_tensor_by_tensor_as_transformers_reads_it_whole(family, build, tmp_path):
    source = open_source(write(tmp_path / "x.gguf", family, build))
    assert source.reads_lazily and source.loaded_nbytes == 0
    whole = source.load(torch.float32).state_dict()
    assert source.names() == list(whole)
    for name, tensor in whole.items():
        assert torch.equal(source.read(name), tensor), name
        if tensor.ndim == 3:
            assert all(torch.equal(source.read(name, i), part) for i, part in enumerate(tensor)), name
    assert "_complete" not in vars(source)


def test_an_expert_of_a_gguf_file_is_decoded_alone(build, tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "x.gguf", "qwen3_moe", build))
    matrix = next(m for m in walk(source.skeleton).matrices if m.name == "model.layers.1.mlp.experts.gate_up_proj.3")
    whole, decoded, original = source.read(matrix.parameter), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: decoded.append(data.shape) or original(data, kind))
    assert torch.equal(read_matrix(source, matrix), whole[3]) and [shape[0] for shape in decoded] == [1, 1]


def test_a_gguf_file_whose_tensors_we_cannot_name_one_by_one_is_read_whole_and_says_so(file, monkeypatch):
    from transformers import modeling_gguf_pytorch_utils as theirs

    class Unknown(theirs.LlamaTensorProcessor):
        """A processor of a later transformers that converts all tensors at once."""

    monkeypatch.setitem(theirs.TENSOR_PROCESSORS, "llama", Unknown)
    source = open_source(file)
    assert not source.reads_lazily and "llama in GGUF files is not known" in source.full_load_reason
    assert source.loaded_nbytes == 4 * source.total_parameters
    assert torch.equal(source.read("model.norm.weight"), source.load().state_dict()["model.norm.weight"])


def test_a_run_says_that_it_reads_a_gguf_file_whole(file, tmp_path, monkeypatch, capsys):
    from transformers import modeling_gguf_pytorch_utils as theirs

    from reallm.cli import main

    class Unknown(theirs.LlamaTensorProcessor):
        pass

    monkeypatch.setitem(theirs.TENSOR_PROCESSORS, "llama", Unknown)
    assert main(["compress", str(file), "-o", str(tmp_path / "out"), "--recipe", "rtn4", "--dry-run"]) == 0
    assert f"{file.name} is read as a whole" in capsys.readouterr().out
    assert main(["compress", str(file), "-o", str(tmp_path / "out"), "--recipe", "rtn4"]) == 0
    assert f"{file.name} is read into memory as a whole" in capsys.readouterr().err


def test_a_tensor_of_a_gguf_file_of_another_shape_than_its_header_says_is_named(build, tmp_path):
    source = open_source(write(tmp_path / "x.gguf", "llama", build, changed=("blk.1.ffn_up.weight",)))
    with pytest.raises(SourceError, match=r"'model.layers.1.mlp.up_proj.weight' has shape \(95, 64\), not \(96, 64\)"):
        source.read("model.layers.1.mlp.up_proj.weight")


def test_a_gguf_file_that_becomes_shorter_under_a_run_is_an_error_and_no_crash(build, tmp_path):
    path = write(tmp_path / "x.gguf", "llama", build)
    source = open_source(path)
    source.read("model.norm.weight")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(OSError, match="became shorter"):
        for name in source.names():
            source.read(name)
