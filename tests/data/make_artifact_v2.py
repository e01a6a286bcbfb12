"""Makes tests/data/artifact_v2: run once for version 2, kept so that it is known what the files are.

    python tests/data/make_artifact_v2.py FOLDER

Never run it again over the old files: that they were written by an old version is their use.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import reallm

# Version 2 brought entropy-coded tensors: symbols of several widths, LZMA, and matrices that stay as they are.
RECIPE = """
name: entropy-coded tensors
rules:
- {role: q, format: {format: uniform, bits: 4, symmetric: true}}
- {role: k, format: {format: uniform, bits: 3, group_size: 4}}
- {role: v, format: {format: normal_float, bits: 3, group_size: 8}}
- {role: o, format: {format: dense}}
- {role: gate, format: {format: low_rank_plus, rank: 8, factors: int8, base: {format: codebook, index_bits: 4}}}
- {role: up, format: {format: uniform, bits: 6, group_size: 0}}
- {match: "*", format: {format: rotated, base: {format: e8, bits: 2}}}
embedding: {format: uniform, bits: 8, group_size: 0, symmetric: true}
coding: true
"""
IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


def make(folder: Path) -> None:
    """Compress a tiny random model into `folder` and put its logits beside it, as `<folder>_logits.safetensors`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 60}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.2)
    with tempfile.TemporaryDirectory() as place:
        LlamaForCausalLM(config).save_pretrained(f"{place}/tiny")
        Path(place, "recipe.yaml").write_text(RECIPE)
        reallm.compress(f"{place}/tiny", folder, recipe=f"{place}/recipe.yaml", seed=1)
    with torch.no_grad():
        logits = reallm.load(folder)(torch.tensor(IDS)).logits
    save_file({"ids": torch.tensor(IDS), "logits": logits}, folder.with_name(folder.name + "_logits.safetensors"))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
