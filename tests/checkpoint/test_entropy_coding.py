"""Entropy-coded tensors: lossless, smaller where possible, and damage is detected."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint import decode_tensor, encode_tensor, encode_tensors, read_ledger, read_manifest
from reallm.cli import main
from reallm.errors import ArtifactError, FormatError
from reallm.hf import MODES
from reallm.kernels import pack_bits
from reallm.kernels.rans import decode_bytes, encode_bytes

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
RECIPE = """
rules:
- {role: q, format: {format: uniform, bits: 4, symmetric: true}}
- {role: k, format: {format: uniform, bits: 3, group_size: 16}}
- {role: v, format: {format: normal_float, bits: 3}}
- {role: o, format: {format: low_rank_plus, rank: 4, base: {format: codebook, index_bits: 3, vector_dim: 1}}}
- {role: gate, format: {format: permuted, block_rows: 16, base: {format: uniform, bits: 5}}}
- {role: up, format: {format: gain, base: {format: uniform, bits: 6, scales: two_level}}}
- {role: down, format: {format: dense}}
embedding: {format: uniform, bits: 4, symmetric: true, group_size: 0}
coding: true
"""


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096,), (37, 111), (3, 5, 700)], ids=str)
def test_coding_is_lossless_for_every_dtype(dtype, shape):
    tensor = (noise(*shape) * 5).to(torch.int32).to(dtype)
    coded = encode_tensor(tensor)
    assert coded.dtype == torch.uint8 and coded.nbytes < 0.99 * tensor.nbytes
    assert torch.equal(decode_tensor(coded, tensor), tensor)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 4097, 100_000])
def test_coding_is_lossless_for_packed_codes_of_every_width(bits, count):
    codes = (noise(count, seed=bits).abs() * 2**bits / 8).clamp(max=2**bits - 1).to(torch.int32)
    raw = pack_bits(codes, bits).numpy()
    assert np.array_equal(decode_bytes(encode_bytes(raw, 1e9), len(raw)), raw) if count > 64 else True


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_codes_take_about_their_entropy(bits):
    codes = (noise(300_000) * 2**bits / 7 + 2 ** (bits - 1)).round().clamp(0, 2**bits - 1).to(torch.int32)
    share = torch.bincount(codes) / len(codes)
    entropy = -(share * share.clamp(min=1e-9).log2()).sum().item() * len(codes) / 8
    assert entropy < len(encode_bytes(pack_bits(codes, bits).numpy(), 1e9)) < 1.02 * entropy


def test_noise_and_tiny_tensors_stay_uncoded():
    assert encode_tensor(torch.randint(0, 256, (100_000,), dtype=torch.uint8)) is None
    assert encode_tensor(torch.zeros(40, dtype=torch.uint8)) is None
    assert encode_tensors({"a": torch.zeros(40, dtype=torch.uint8)})[1] == ()


def test_constant_and_one_symbol_tensors_are_coded():
    for value in (0, 255):
        tensor = torch.full((50_000,), value, dtype=torch.uint8)
        assert torch.equal(decode_tensor(encode_tensor(tensor), tensor), tensor)


def test_damaged_bytes_are_refused_or_give_other_values_but_never_crash():
    tensor = (noise(20_000) * 3).to(torch.int8)
    coded = encode_tensor(tensor)
    refused = 0
    for place in range(0, len(coded), 97):
        broken = coded.clone()
        broken[place] ^= 0x55
        try:
            refused += not torch.equal(decode_tensor(broken, tensor), tensor)
        except FormatError:
            refused += 1
    assert refused == len(range(0, len(coded), 97))
    for cut in (coded[:0], coded[:3], coded[:-2], coded[: len(coded) // 2]):
        with pytest.raises(FormatError, match="damaged"):
            decode_tensor(cut.clone(), tensor)


@pytest.fixture(scope="module")
def pair(tiny_llama, tmp_path_factory):
    """The same plan stored coded and uncoded."""
    folder = tmp_path_factory.mktemp("coded")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, coding in (("coded", None), ("plain", False)):
        reallm.compress(tiny_llama, folder / name, recipe=str(folder / "recipe.yaml"), coding=coding)
    return folder / "coded", folder / "plain"


@pytest.mark.parametrize("mode", MODES)
def test_a_coded_artifact_computes_the_same_logits_as_the_plain_one_in_both_modes(pair, mode):
    with torch.no_grad():
        logits = [reallm.load(folder, mode)(IDS).logits for folder in pair]
    assert torch.equal(*logits)


def test_a_coded_artifact_is_of_version_2_and_a_plain_one_of_version_1(pair):
    versions = [json.loads((f / "config.json").read_text())["quantization_config"]["version"] for f in pair]
    assert versions == [2, 1]


def test_the_ledger_lists_coded_tensors_and_counts_the_bytes_of_the_file(pair, capsys):
    coded, plain = (read_ledger(folder) for folder in pair)
    assert coded.total_bytes == sum(file.stat().st_size for file in pair[0].iterdir()) < plain.total_bytes
    raw = {row.name: row.nbytes for row in plain.rows}
    rows = coded.entropy_coded_rows
    assert rows and all(raw[row.name] == row.raw_nbytes > row.nbytes for row in rows)
    assert not plain.entropy_coded_rows
    assert main(["info", str(pair[0]), "--matrices"]) == 0
    assert "decoded at load in about" in capsys.readouterr().out


def test_a_coded_model_is_saved_as_it_was_loaded(pair, tmp_path):
    for mode in MODES:
        reallm.load(pair[0], mode).save_pretrained(tmp_path / mode)
        before, after = (load_file(folder / "model.safetensors") for folder in (pair[0], tmp_path / mode))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_coded_tensor_is_named(pair, tmp_path):
    import shutil

    folder = shutil.copytree(pair[0], tmp_path / "damaged")
    stored = load_file(folder / "model.safetensors")
    name = next(row.name for row in read_ledger(folder).entropy_coded_rows)
    stored[name][-40:] = 0
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{name}.*checksum"):
        reallm.load(folder)
    with pytest.raises(ArtifactError, match=f"{name}.*damaged"):
        reallm.load(folder, verify=False)


def test_a_few_bytes_never_stand_for_many():
    # A single symbol takes no bits: without a bound, 270 bytes in one lane would decode to any number of symbols.
    table = np.zeros(256, np.uint8)
    table[7] = 255
    state = np.array([1 << 16], "<u4").view(np.uint8)
    bomb = np.concatenate([np.array([8, 1, 0, 0, 0], np.uint8), table, state])
    assert (decode_bytes(bomb, 2048) == 7).all()
    for nbytes in (2049, 10**12):
        with pytest.raises(FormatError, match="damaged"):
            decode_bytes(bomb, nbytes)
    with pytest.raises(FormatError, match="damaged"):
        decode_tensor(torch.zeros(9, dtype=torch.uint8), torch.empty(10**12, dtype=torch.uint8, device="meta"))


def test_names_of_coded_tensors_that_the_format_lacks_are_refused(pair, tmp_path):
    import shutil

    folder = shutil.copytree(pair[0], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layouts"][0]["coded"] = ["no_such"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="no_such"):
        read_manifest(folder)
