"""Fused experts, which a model computes with one batched product, are tuned like others."""

import pytest
import torch
from safetensors.torch import load_file

import reallm
from reallm.hf import load


@pytest.fixture(scope="module")
def llama4(tmp_path_factory, tiny_llama):
    """(a tiny Llama 4 with experts in every block, its artifact)."""
    import shutil

    from transformers import AutoModelForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        num_local_experts=3,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("llama4")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    reallm.compress(folder / "model", folder / "out", recipe="rtn4")
    return folder / "model", folder / "out"


SMALL = {"context": 32, "batch": 2, "tokens": 128, "validation_windows": 2, "block_windows": 4, "block_epochs": 1}


@pytest.mark.parametrize("method", ["end-to-end", "blockwise"])
def test_batched_experts_are_tuned(llama4, text_file, tmp_path, method):
    model, out = llama4
    reallm.tune(out, tmp_path / "tuned", reference=str(model), method=method, text=str(text_file), **SMALL)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "tuned"))
    changed = [name for name in before if ".experts." in name and not torch.equal(before[name], after[name])]
    assert changed
    load(tmp_path / "tuned")


def test_an_adapter_is_trained_over_batched_experts(llama4, text_file, tmp_path):
    _, out = llama4
    reallm.tune(out, tmp_path / "adapter", adapter=2, loss="ce", text=str(text_file), **SMALL)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        assert not torch.equal(load(out, adapter=tmp_path / "adapter")(ids).logits, load(out)(ids).logits)
