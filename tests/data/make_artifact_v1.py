"""Makes tests/data/artifact_v1: run once for version 1, kept so that it is known what the files are.

    python tests/data/make_artifact_v1.py FOLDER

Never run it again over the old files: that they were written by an old version is their use.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import reallm

# Every format, every way to store scales and factors, a codebook of each dimension.
RECIPE = """
name: every format of version 1
rules:
- {match: "*.0.*q_proj", format: {format: uniform, bits: 3, group_size: 16}}
- {match: "*.0.*k_proj", format: {format: uniform, bits: 5, group_size: 32, symmetric: true, scales: two_level}}
- {match: "*.0.*v_proj", format: {format: normal_float, bits: 4, group_size: 16, scales: two_level}}
- {match: "*.0.*o_proj", format: {format: normal_float, bits: 1, group_size: 0, scales: float16}}
- match: "*.0.*gate_proj"
  format: {format: low_rank_plus, rank: 3, base: {format: codebook, index_bits: 4, vector_dim: 1, group_size: 32}}
- match: "*.0.*up_proj"
  format: {format: low_rank_plus, rank: 4, factors: int8, base: {format: uniform, bits: 2, group_size: 16}}
- match: "*.0.*down_proj"
  format: {format: permuted, method: sort, base: {format: codebook, index_bits: 5, vector_dim: 2, group_size: 24}}
- match: "*.1.*q_proj"
  format: {format: permuted, method: greedy, block_rows: 12, base: {format: uniform, bits: 3, group_size: 8}}
- match: "*.1.*k_proj"
  format: {format: gain, base: {format: codebook, index_bits: 6, vector_dim: 4, group_size: 32, scales: float16}}
- {match: "*.1.*v_proj", format: {format: dense}}
- {match: "*.1.*o_proj", format: {format: dense, dtype: float16}}
- {match: "*.1.*gate_proj", format: {format: codebook, index_bits: 11, vector_dim: 8, group_size: 0}}
- match: "*.1.*up_proj"
  format:
    format: gain
    base:
      format: low_rank_plus
      rank: 2
      factors: int8
      base: {format: permuted, block_rows: 16, base: {format: normal_float, bits: 3, group_size: 16}}
- {match: "*.1.*down_proj", format: keep}
embedding: {format: uniform, bits: 8, group_size: 16, symmetric: true}
head: {format: normal_float, bits: 6, group_size: 16}
"""
IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


def make(folder: Path) -> None:
    """Compress a tiny random model into `folder` and put its logits beside it, as `<folder>_logits.safetensors`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    with tempfile.TemporaryDirectory() as place:
        LlamaForCausalLM(config).save_pretrained(f"{place}/tiny")
        Path(place, "recipe.yaml").write_text(RECIPE)
        reallm.compress(f"{place}/tiny", folder, recipe=f"{place}/recipe.yaml", seed=1)
    with torch.no_grad():
        logits = reallm.load(folder)(torch.tensor(IDS)).logits
    save_file({"ids": torch.tensor(IDS), "logits": logits}, folder.with_name(folder.name + "_logits.safetensors"))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
