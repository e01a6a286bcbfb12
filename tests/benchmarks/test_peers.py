"""What `benchmarks/peers.py` says of other packages: bytes off their files, weights off their layers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    """The module; benchmarks import each other by their file names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


def packed_layer(bits: int = 3, out: int = 64, columns: int = 128, group: int = 64) -> dict[str, torch.Tensor]:
    """Tensors as GPTQ's checkpoints have them."""
    return {
        "qweight": torch.zeros(columns * bits // 32, out, dtype=torch.int32),
        "qzeros": torch.zeros(columns // group, out * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(columns // group, out, dtype=torch.float16),
        "g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def test_every_stored_tensor_of_a_compressed_module_counts_and_no_other(peers, tmp_path):
    one, two = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj_b"
    first = {f"{one}.{kind}": tensor for kind, tensor in packed_layer().items()}
    second = {f"{two}.{kind}": tensor for kind, tensor in packed_layer(bits=4).items()}
    save_file(first | {"model.embed_tokens.weight": torch.zeros(100, 8)}, tmp_path / "model-1.safetensors")
    save_file(second | {"model.norm.weight": torch.zeros(8)}, tmp_path / "model-2.safetensors")

    stored = peers.stored_bytes(tmp_path, [one])
    assert stored == {"qweight": 64 * 128 * 3 // 8, "qzeros": 2 * 64 * 3 // 8, "scales": 2 * 64 * 2, "g_idx": 128 * 4}
    assert sum(peers.stored_bytes(tmp_path, [one, two]).values()) == sum(t.nbytes for t in (first | second).values())


def test_the_effect_of_a_layer_on_unit_vectors_is_its_matrix(peers):
    layer = nn.Linear(24, 16, bias=False, dtype=torch.float16)
    layer.infeatures = 24
    assert torch.equal(peers.effect(layer), layer.weight)


def test_weights_of_another_shape_are_refused(peers, tiny_llama, text_file, tmp_path):
    lab = peers.Lab(str(tiny_llama), text_file, "cpu", windows=1)
    save_file({info.name: torch.zeros(info.shape[::-1]) for info in lab.blocks}, tmp_path / "decoded.safetensors")
    with pytest.raises(ValueError, match=r"decoded to \(64, 32\), the model has \(32, 64\)"):
        peers.score(lab, "transposed", tmp_path / "decoded.safetensors", {}, 0.0, 0)


def test_the_original_weights_score_as_the_original_does(peers, tiny_llama, text_file, tmp_path):
    lab = peers.Lab(str(tiny_llama), text_file, "cpu", windows=1)
    original = lab.evaluate(kl=False)
    weights = {info.name: lab.original[f"{info.name}.weight"] for info in lab.blocks}
    save_file(weights, tmp_path / "decoded.safetensors")
    stored = {"weight": sum(weight.nbytes for weight in weights.values())}
    arm = peers.score(lab, "as it was", tmp_path / "decoded.safetensors", stored, 0.0, 0)
    assert (arm.bits, arm.perplexity, arm.relative_error) == (32.0, original.perplexity, 0.0)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_stand_in_for_datasets_can_be_imported_and_does_nothing(peers, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # so that it goes again
    peers.without_datasets()
    from datasets import Dataset, load_dataset

    for use in (Dataset, load_dataset):
        with pytest.raises(ImportError, match="not installed"):
            use("name")
