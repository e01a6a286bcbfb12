"""Matrices of very small and very large numbers are compressed as others are, or refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint import read_manifest
from reallm.errors import SourceError

UP = "model.layers.0.mlp.up_proj"


def scaled(source, folder, name, size):
    """A copy of a model with one matrix times `size`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"] *= size
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, tensors[f"{name}.weight"]


@pytest.mark.parametrize("size", [1e-7, 1e6])
@pytest.mark.parametrize("name", ["model.embed_tokens", UP])
def test_numbers_beyond_float16_are_held_and_ordinary_matrices_keep_their_bytes(tiny_llama, tmp_path, name, size):
    folder, weight = scaled(tiny_llama, tmp_path / "model", name, size)
    reallm.compress(folder, tmp_path / "out", recipe="rtn4")
    found = reallm.load(tmp_path / "out").get_submodule(name).weight
    assert (found - weight).norm() < 0.15 * weight.norm()
    formats = {m.name: m.fmt for m in read_manifest(tmp_path / "out").matrices}
    assert [matrix for matrix, fmt in formats.items() if fmt.scales == "bfloat16"] == [name]


def test_a_size_is_met_with_numbers_beyond_float16(tiny_llama, tmp_path):
    folder, weight = scaled(tiny_llama, tmp_path / "model", UP, 1e-7)
    reallm.compress(folder, tmp_path / "out", size="130KB")
    total = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert 0.98 * 130_000 < total <= 130_000
    found = reallm.load(tmp_path / "out").get_submodule(UP).weight
    assert (found - weight).norm() < 0.7 * weight.norm()


def test_a_format_that_cannot_hold_a_matrix_is_refused_by_name_with_the_remedy(tiny_llama, tmp_path):
    folder, _ = scaled(tiny_llama, tmp_path / "model", UP, 1e7)
    latents = {"format": "conv_latents", "steps": 2, "base": {"format": "codebook", "index_bits": 4}}
    rules = [{"match": UP, "format": latents}, {"match": "*", "format": {"format": "dense"}}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "one", "rules": rules}))
    with pytest.raises(SourceError, match=f"{UP}.weight: conv_latents cannot represent.*--exclude {UP}"):
        reallm.compress(folder, tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    assert torch.isfinite(load_file(folder / "model.safetensors")[f"{UP}.weight"]).all()
