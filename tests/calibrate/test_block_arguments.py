"""Blocks with arguments other than hidden states: computed from tokens, outputs of other blocks, or shared by all."""

import pytest
import torch
import transformers

import reallm
from reallm.calibrate.block_arguments import output_states
from reallm.calibrate.hidden_states import HiddenStateCache, nbytes_per_token
from reallm.checkpoint import work_folder
from reallm.errors import SourceError
from reallm.source.decoder_blocks import decoder_blocks, decoder_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PER_LAYER = {
    "head_dim": 8,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
HEADS_OF_16 = {"num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_d_state": 8}
HYBRID = {**HEADS_OF_16, "layers_block_type": ["mamba", "hybrid"] * 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
SPARSE = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "indexer_types": ["full", "shared"] * 2}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}


def config_of(family):
    t = transformers
    match family:
        case "gemma3n":  # four residual streams in a leading dimension, per-layer inputs, shared keys and values
            return t.Gemma3nTextConfig(**SIZES, **PER_LAYER, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4)
        case "gemma4":
            return t.Gemma4TextConfig(**SIZES, **PER_LAYER, global_head_dim=8)
        case "zamba":  # blocks receive the embedding
            return t.ZambaConfig(**SIZES | HYBRID, mamba_expand=2, n_mamba_heads=2)
        case "glm_moe_dsa":  # blocks receive the tokens that an earlier one selected
            return t.GlmMoeDsaConfig(**SIZES | LATENT | EXPERTS, **SPARSE, qk_nope_head_dim=8, first_k_dense_replace=1)
        case "bloom":
            return t.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=256, initializer_range=0.2)
        case "mllama":  # cross-attention to images is skipped
            return t.MllamaConfig(text_config={**SIZES, "cross_attention_layers": [1, 3]})
        case "modernbert":  # get_decoder() returns the output matrix
            return t.ModernBertDecoderConfig(**SIZES)
        case "hrm_text":  # a loop over all blocks
            return t.HrmTextConfig(**SIZES | {"num_key_value_heads": 4}, head_dim=8)
        case "xlm":  # lists of the parts of blocks
            return t.XLMConfig(vocab_size=256, emb_dim=32, n_layers=2, n_heads=4, is_decoder=True, causal=True)
    return t.LlamaConfig(**SIZES)


@pytest.fixture(scope="module")
def model_of():
    def make(family):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_of(family)).eval().requires_grad_(False)
        return model

    return make


def windows(count=5, context=12):
    return torch.randint(3, 250, (count, context), generator=torch.Generator().manual_seed(0))


def plain_states(model, batch, block):
    """Return the output of a block in a forward pass of the whole model."""
    found = []
    hook = block.register_forward_hook(lambda _, __, output: found.append(output_states(output)))
    with torch.no_grad():
        decoder_of(model)(input_ids=batch, use_cache=False)
    hook.remove()
    return found[0]


def change(block, seed, changed):
    """Change the weights of a block, as compression does; shared weights change once."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        if parameter.ndim > 1 and id(parameter) not in changed:
            changed.add(id(parameter))
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "family", ["llama", "gemma3n", "gemma4", "zamba", "glm_moe_dsa", "bloom", "mllama", "modernbert"]
)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # "cpu:0" is another device to torch: tensors are copied
def test_block_wise_forward_of_several_batches_equals_the_forward_pass_of_the_changed_model(model_of, family, device):
    model, changed = model_of(family), set()
    stream = HiddenStateCache(model, windows(), device, batch=2)
    called = []
    for number, block in enumerate(stream.blocks):
        called += [block] if stream.is_reached else []
        change(block, number, changed)
        stream.advance()
    assert len(called) == {"mllama": 2}.get(family, 4)
    for batch, states in zip(stream.batches, stream.states, strict=True):
        torch.testing.assert_close(states, plain_states(model, batch, called[-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_pass_without_keep_does_not_change_what_later_blocks_receive(model_of, family):
    """Second moments and tuning run a block more often than the cache advances, also the teacher's block."""
    model, original = model_of(family), model_of(family)
    stream = HiddenStateCache(model, windows(), "cpu", batch=2)
    for number, block in enumerate(stream.blocks):
        change(block, number, set())
        stream.advance()
        with torch.no_grad():
            if number < 3:
                stream.forward_block(decoder_blocks(original)[number + 1], 0)
    expected = plain_states(model, stream.batches[0], stream.blocks[-1])
    torch.testing.assert_close(stream.states[0], expected, rtol=1e-5, atol=1e-5)


def test_arguments_equal_in_all_batches_are_stored_once(model_of):
    few, many = (HiddenStateCache(model_of("llama"), windows(count), "cpu", batch=2).nbytes for count in (2, 20))
    assert many - few == 18 * 12 * 32 * 4  # the hidden states


@pytest.mark.parametrize("family", ["llama", "gemma3n", "gemma4", "zamba", "bloom"])
def test_bytes_per_token_are_predicted_without_weights(model_of, family):
    model = model_of(family)
    stream, most = HiddenStateCache(model, windows(40), "cpu", batch=2), 0
    few = HiddenStateCache(model, windows(2), "cpu", batch=2)
    for _ in stream.blocks:
        most = max(most, stream.nbytes - few.nbytes)
        stream.advance(), few.advance()
    predicted = nbytes_per_token(model.config, torch.float32)
    assert 0.9 * predicted <= most / (38 * 12) <= predicted


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("hrm_text", "HrmTextForCausalLM: it calls decoder block 0 more than once in a pass"),
        ("xlm", "XLMWithLMHeadModel: it changes the hidden states between blocks 0 and 1"),
    ],
)
def test_a_family_whose_blocks_do_more_than_follow_each_other_is_refused(model_of, family, reason):
    with pytest.raises(SourceError, match=f"{reason}; .* without --calibration") as caught:
        HiddenStateCache(model_of(family), windows(), "cpu")
    assert "\n" not in str(caught.value)


def altered(model, monkeypatch, **how):
    """Return a Llama whose loop over the blocks is changed."""
    decoder = model.model

    def forward(input_ids, use_cache):
        states = decoder.embed_tokens(input_ids)
        turns = decoder.rotary_emb(states, torch.arange(input_ids.shape[1])[None])
        for number, block in enumerate(decoder.layers):
            if "stored" in how:
                block.mlp.bias_of_batch = states.mean()
            given = states + 1 if "states" in how and number else states
            more = {"more": how["more"](states, input_ids)} if "more" in how else {}
            states = block(given, position_embeddings=turns, **more)
            if "failing" in how:
                raise ValueError("pixel_values are missing\nin two lines")
        return states

    monkeypatch.setattr(decoder, "forward", forward)
    return model


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"states": True}, "it changes the hidden states between blocks 0 and 1"),
        ({"more": lambda states, _: states.mean()}, "'more' of block 1 depends on outputs of earlier blocks"),
        ({"more": lambda *_: object()}, "the argument 'more' of block 0 is a object"),
        ({"stored": True}, "it stores tensors of each batch in its decoder blocks"),
        ({"failing": True}, r"its forward pass over token ids fails \(ValueError: pixel_values are missing\)"),
    ],
)
def test_a_model_that_cannot_run_block_by_block_is_refused(model_of, monkeypatch, how, reason):
    model = altered(model_of("llama"), monkeypatch, **how)
    with pytest.raises(SourceError, match=reason) as caught:
        HiddenStateCache(model, windows(), "cpu", batch=2)
    assert "\n" not in str(caught.value)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_later_blocks_receive_the_states_of_earlier_blocks_as_computed_block_by_block(model_of, monkeypatch):
    model = altered(model_of("llama"), monkeypatch, more=lambda states, ids: {"states": states, "ids": ids})
    seen = []
    stream = HiddenStateCache(model, windows(), "cpu", batch=2)
    for block in stream.blocks:
        hook = block.register_forward_pre_hook(lambda _, __, named: seen.append(named["more"]), with_kwargs=True)
        change(block, 0, set())
        before = list(stream.states)
        stream.advance()
        hook.remove()
        assert all(torch.equal(more["states"], states) for more, states in zip(seen, before, strict=True))
        assert all(torch.equal(more["ids"], batch) for more, batch in zip(seen, stream.batches, strict=True))
        seen.clear()


@pytest.mark.parametrize("family", ["modernbert", "mllama"])
def test_the_decoder_is_the_innermost_model_around_the_blocks(model_of, family):
    decoder = decoder_of(model_of(family))
    assert isinstance(decoder, transformers.PreTrainedModel) and not hasattr(decoder, "lm_head")


@pytest.mark.parametrize("named", [None, NotImplementedError])
def test_a_model_that_does_not_name_its_decoder_has_one(model_of, monkeypatch, named):
    model = model_of("llama")

    def get_decoder():
        if named is not None:
            raise named
        return named

    monkeypatch.setattr(model, "get_decoder", get_decoder)
    assert decoder_of(model) is model.model and decoder_blocks(model) == list(model.model.layers)


@pytest.mark.parametrize("family", ["gemma3n", "modernbert"])
def test_such_families_are_calibrated(model_of, tiny_llama, text_file, tmp_path, family):
    model_of(family).save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"calibration": [text_file], "calibration_windows": 4, "calibration_context": 16}
    reallm.compress(tmp_path / "model", tmp_path / "out", recipe="rtn4", **settings)
    assert (tmp_path / "out").is_dir() and not work_folder(tmp_path / "out").exists()
