"""Checksums: written by the compressor, verified by every reader, skipped on demand."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint import read_manifest
from reallm.checkpoint.checksums import DIGITS, compute_checksums, verify
from reallm.cli import main
from reallm.errors import ArtifactError
from reallm.hf import ReallmConfig

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "out"
    reallm.compress(tiny_llama, folder, recipe="rtn4")
    return folder


@pytest.fixture
def flipped(written, tmp_path):
    """A copy with one bit of one code flipped, which only a checksum can detect."""
    folder = shutil.copytree(written, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.codes"][7] ^= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_compressor_writes_a_checksum_for_every_tensor(written):
    checksums = read_manifest(written).checksums
    assert checksums == compute_checksums([written / "model.safetensors"])
    assert len(checksums["model.safetensors"]) == DIGITS * len(load_file(written / "model.safetensors"))


def test_a_flipped_bit_is_found_by_loading_and_names_the_tensor(flipped):
    from transformers import AutoModelForCausalLM

    for opener in (reallm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ArtifactError, match="up_proj.codes' is not as it was written.*eval, generate and info take --no-verify"
        ):
            opener(flipped)


def test_verification_can_be_skipped(flipped, recwarn):
    from transformers import AutoModelForCausalLM

    assert reallm.load(flipped, verify=False)(IDS).logits.isfinite().all()
    AutoModelForCausalLM.from_pretrained(flipped, quantization_config=ReallmConfig(verify=False))


@pytest.mark.parametrize("command", ["info", "eval", "generate"])
def test_every_command_verifies_unless_told_not_to(flipped, command, text_file, capsys):
    rest = {
        "info": [],
        "eval": ["--text", str(text_file), "--context", "64", "--windows", "1"],
        "generate": ["hello", "--max-new-tokens", "1"],
    }
    arguments = [command, str(flipped), *rest[command]]
    assert main(arguments) == 2 and "--no-verify" in capsys.readouterr().err
    assert main([*arguments, "--no-verify"]) == 0


def test_info_reports_whether_it_verified(written, capsys):
    for options, verified in (([], True), (["--no-verify"], False)):
        assert main(["info", str(written), "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["verified"] is verified


def test_tensors_that_changed_places_dtype_or_file_are_found(tmp_path):
    first, second = {"a": torch.zeros(4), "b": torch.ones(4)}, {"a": torch.ones(4), "b": torch.zeros(4)}
    file = tmp_path / "x.safetensors"
    save_file(first, file)
    checksums = compute_checksums([file])
    verify([file], checksums)
    for other in (
        second,
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(4)},
        {"a": torch.zeros(2, 2), "b": torch.ones(4)},
    ):
        save_file(other, file)
        with pytest.raises(ArtifactError, match="is not as it was written"):
            verify([file], checksums)
    save_file({"a": torch.zeros(4)}, file)
    with pytest.raises(ArtifactError, match="holds 1 tensors"):
        verify([file], checksums)
    with pytest.raises(ArtifactError, match="'y.safetensors' is a weight file of another artifact, or missing"):
        verify([file], {"y.safetensors": ""} | checksums)


def test_a_model_that_is_saved_again_carries_no_stale_checksums(written, tmp_path):
    model = reallm.load(written)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert read_manifest(tmp_path).checksums == {}
    assert torch.equal(reallm.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("value", [3, {"model.safetensors": 3}, {"model.safetensors": "x"}, ["a"]])
def test_damaged_checksums_are_an_artifact_error(written, tmp_path, value):
    folder = shutil.copytree(written, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checksums"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        reallm.load(folder)
