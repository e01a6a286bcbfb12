"""Every family from end to end: compressed, saved, loaded in both modes, generating; logits of the decoded matrices."""

import pytest
import torch
from safetensors.torch import load_file

import reallm
from reallm.checkpoint import read_manifest
from reallm.hf import MODES, load, unquantized_tensors
from reallm.source import meta_model, open_source, walk

RECIPE = """
rules:
- role: [q, qkv, gate_up, fc1]
  format: {format: low_rank_plus, rank: 2, base: {format: uniform, bits: 4, group_size: 16}}
- {match: "*", format: {format: codebook, index_bits: 4, vector_dim: 1}}
embedding: {format: uniform, bits: 8, group_size: 16, symmetric: true}
head: {format: normal_float, bits: 6, group_size: 16}
"""
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
PLAIN = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> transformers' config class and its arguments
FAMILIES = {
    "llama 2": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama 3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "gemma 2": ("Gemma2Config", {**SIZES, "head_dim": 12, "query_pre_attn_scalar": 12}),
    "gemma 3": ("Gemma3TextConfig", {**SIZES, "head_dim": 12, "query_pre_attn_scalar": 12}),
    "qwen 2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen 3": ("Qwen3Config", {**SIZES, "head_dim": 12}),
    "phi 3": ("Phi3Config", SIZES),
    "gpt 2": ("GPT2Config", {**PLAIN, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt neox": ("GPTNeoXConfig", SIZES),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "olmo": ("OlmoConfig", SIZES),  # its norms have no weights: compressed, nothing but buffers is left
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen 3 moe": (
        "Qwen3MoeConfig",
        {**SIZES, "head_dim": 12, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    # Experts that do not follow the interface of transformers: batched products, one by one, under `weight`.
    "llama 4": (
        "Llama4TextConfig",
        {
            **SIZES,
            "head_dim": 12,
            "intermediate_size_mlp": 80,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "jet moe": (
        "JetMoeConfig",
        {
            **{key: value for key, value in SIZES.items() if key != "num_attention_heads"},
            "kv_channels": 12,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "inkling": (
        "InklingTextConfig",
        {
            **SIZES,
            "head_dim": 12,
            "n_routed_experts": 3,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    # Of these the library has no table: state spaces, linears of a class of their own, low-rank attention.
    "mamba": ("MambaConfig", {**PLAIN, "hidden_size": 48, "num_hidden_layers": 2}),
    "falcon": ("FalconConfig", {**PLAIN, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
}
IDS = torch.arange(2, 18).view(2, 8)


def build(family):
    import transformers

    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**arguments)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.normal_(std=0.1)  # zeros would hide a bias that got lost
    return model


def decode_into(model, folder):
    """Put the decoded matrices into the dense model, without the loader."""
    tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
    formats = {matrix.name: matrix.fmt for matrix in read_manifest(folder).matrices}
    for matrix in walk(model).matrices:
        fmt = formats[matrix.name]
        stored = {local: tensors[f"{matrix.name}.{local}"] for local in fmt.layout(matrix.shape)}
        weight = fmt.decode(fmt.unpack(stored, matrix.shape), matrix.shape)
        target = state[matrix.parameter] if matrix.expert is None else state[matrix.parameter][matrix.expert]
        target.copy_(weight.T if matrix.transposed else weight)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def compressed(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    reallm.compress(tmp_path / "model", tmp_path / "out", recipe=str(tmp_path / "recipe.yaml"))
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_compressed_saved_loaded_and_generates_what_its_decoded_matrices_say(family, tmp_path):
    model = build(family)
    original = logits(model)
    out = compressed(model, tmp_path)
    expected = logits(decode_into(model, out))
    assert not torch.allclose(expected, original, atol=1e-4)
    for mode in MODES:
        loaded = load(out, mode)
        # Experts run one by one here and batched there.
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        words = loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        assert torch.equal(words, model.generate(IDS[:1], max_new_tokens=3, do_sample=False))
        loaded.save_pretrained(tmp_path / mode)
        torch.testing.assert_close(logits(load(tmp_path / mode)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "llama 4", "jet moe", "inkling"])
def test_every_expert_of_fused_parameters_is_compressed(family):
    model = build(family)
    found = walk(model)
    named = model.named_parameters()
    experts = {name for name, p in named if p.ndim == 3 and ("expert" in name or "put_linear" in name)}
    assert experts and experts == {matrix.parameter for matrix in found.matrices if matrix.expert is not None}
    hidden = model.config.hidden_size
    for matrix in (m for m in found.matrices if m.expert is not None):
        reads = any(word in matrix.parameter for word in ("gate", "up_proj", "input_linear"))
        assert (matrix.shape[1] if reads else matrix.shape[0]) == hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_compressed_is_listed_with_its_reason(family, tmp_path):
    model = build(family)
    out = compressed(model, tmp_path)
    reasons = unquantized_tensors(out)
    stored = load_file(out / "model.safetensors")
    owned = {m.name for m in read_manifest(out).matrices}
    unquantized = {name for name in stored if name in model.state_dict() and stored[name].numel()}
    assert unquantized == set(reasons) and all(reasons.values())
    assert len(owned) > 4 and not owned & set(reasons)
    big = {name for name in reasons if stored[name].ndim == 2 and "router" not in reasons[name]}
    assert all("position" in reasons[name] or "parameter of" in reasons[name] for name in big), big


def strange_family():
    """A family that nobody has seen: registered by a user's code, with modules of its own."""
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class StrangeConfig(PreTrainedConfig):
        model_type = "strange_of_reallm"

        def __init__(self, hidden_size=32, num_hidden_layers=2, vocab_size=96, **others):
            self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
            super().__init__(**others)

    class Own(nn.Module):  # acts as a linear, and is none
        def __init__(self, rows, columns):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(rows, columns))

        def forward(self, x):
            return x @ self.weight.T

    class Clamped(nn.Linear):  # is a linear, and acts as another thing
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    class Cell(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.alpha, self.beta, self.gamma = Own(2 * size, size), nn.Linear(2 * size, size), Clamped(size, size)
            self.mix = nn.Parameter(torch.empty(size, size))

        def forward(self, x):
            return x + self.gamma(self.beta(torch.relu(self.alpha(x)))) @ self.mix

    class StrangeModel(PreTrainedModel):
        config_class = StrangeConfig
        base_model_prefix = "trunk"

        def __init__(self, config):
            super().__init__(config)
            self.words = nn.Embedding(config.vocab_size, config.hidden_size)
            self.cells = nn.ModuleList(Cell(config.hidden_size) for _ in range(config.num_hidden_layers))
            self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def _init_weights(self, module):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.3)

        def get_input_embeddings(self):
            return self.words

        def get_output_embeddings(self):
            return self.out

        def forward(self, input_ids=None, **_):
            x = self.words(input_ids)
            for cell in self.cells:
                x = cell(x)
            return CausalLMOutput(logits=self.out(x))

    AutoConfig.register("strange_of_reallm", StrangeConfig, exist_ok=True)
    AutoModelForCausalLM.register(StrangeConfig, StrangeModel, exist_ok=True)
    return StrangeModel(StrangeConfig()).eval()


def test_a_family_that_nobody_has_seen_works_too(tmp_path):
    torch.manual_seed(0)
    model = strange_family()
    out = compressed(model, tmp_path)
    names = {matrix.name for matrix in read_manifest(out).matrices}
    assert names == {"words", "out", *(f"cells.{n}.{part}" for n in (0, 1) for part in ("alpha", "beta"))}
    reasons = unquantized_tensors(out)
    assert reasons["cells.0.gamma.weight"] == "2-D parameter of Clamped"
    assert reasons["cells.0.mix"] == "2-D parameter of Cell" and reasons["cells.1.beta.bias"] == "bias"
    expected = logits(decode_into(model, out))
    for mode in MODES:
        torch.testing.assert_close(logits(load(out, mode)), expected, rtol=1e-5, atol=1e-5)


def test_the_ledger_shows_what_is_not_compressed(tiny_llama, tmp_path, capsys):
    import json

    from reallm.cli import main

    reallm.compress(tiny_llama, tmp_path / "out", recipe="rtn4", exclude=("*.1.mlp.up_proj",))
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["not_compressed"]
    assert found["model.layers.1.mlp.up_proj.weight"] == "left out by the plan" and found["model.norm.weight"] == "norm"
    source = open_source(tiny_llama)
    assert set(found) == {k.name for k in walk(meta_model(source.config)).unquantized} | {
        "model.layers.1.mlp.up_proj.weight"
    }
    assert main(["info", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "unquantized because" in text and "left out by the plan" in text
