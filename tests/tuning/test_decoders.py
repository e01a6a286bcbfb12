"""`--train decoders`: nets and bases train on their low-bit grid; shared decoders train jointly."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import reallm
from reallm.checkpoint import read_ledger
from reallm.errors import RecipeError
from reallm.formats import named_tensors, replace_tensors, use_shared_decoders
from reallm.formats.base import strip_prefix
from reallm.hf import DECODE_PER_USE, load
from reallm.hf.replacement import compressed_modules
from reallm.source import walk
from reallm.source.walk import meta_model
from reallm.tuning.trainables import choose

CODEWORD = "{format: codeword, index_bits: 5, vector_dim: 4, hidden: 4%s}"
LATENTS = "base: {format: normal_float, bits: 4}"
OWN = f"""
rules:
- {{role: [q, k], format: {CODEWORD % ""}}}
- {{role: down, format: {{format: linear_latents, transform: learned, kept: 7, {LATENTS}}}}}
- {{role: up, format: {{format: conv_latents, channels: 3, width: 2, steps: 4, {LATENTS}}}}}
- {{match: "*", format: {{format: normal_float, bits: 4}}}}
"""
SHARED = f"""
rules:
- {{role: [q, k, v], format: {{format: rotated, base: {CODEWORD % ", shared: words"}}}}}
- {{role: down, format: {{format: linear_latents, transform: learned, kept: 7, shared: basis, {LATENTS}}}}}
- {{role: up, format: {{format: conv_latents, channels: 3, width: 2, steps: 4, shared: net, {LATENTS}}}}}
- {{role: o, format: {CODEWORD % ""}}}
- {{match: "*", format: {{format: normal_float, bits: 4}}}}
"""
TABLES = ("basis", "net", "words")
QUICK = {"context": 32, "batch": 4, "validation_windows": 8, "validate_every": 5, "tokens": 20 * 4 * 32}
QUICK |= {"learning_rate": 2e-2, "block_windows": 16, "block_epochs": 2, "train": ("decoders",)}


def made(tiny_llama, folder, recipe):
    (folder / "mine.yaml").write_text(recipe)
    reallm.compress(tiny_llama, folder / "out", recipe=str(folder / "mine.yaml"))
    return folder / "out"


@pytest.fixture(scope="module")
def own(tiny_llama, tmp_path_factory):
    return made(tiny_llama, tmp_path_factory.mktemp("own"), OWN)


@pytest.fixture(scope="module")
def shared(tiny_llama, tmp_path_factory):
    return made(tiny_llama, tmp_path_factory.mktemp("shared"), SHARED)


def chosen(artifact, train=("decoders",), **how):
    model = load(artifact, DECODE_PER_USE, dtype=torch.float32)
    walked = walk(meta_model(copy.deepcopy(model.config)))
    dtypes = {unquantized.name: torch.float32 for unquantized in walked.unquantized}
    return choose(model, walked, dtypes, train, **{"constant_dtype": torch.float32, **how})


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


def changed(before, after):
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_a_shared_decoder_is_one_set_of_parameters_for_all_its_matrices(shared):
    live = chosen(shared)
    names = {f"reallm_shared.{table}.decoder.{leaf}" for table in TABLES for leaf in ("codes", "scales")}
    own = {f"model.layers.{n}.self_attn.o_proj.decoder.{leaf}" for n in (0, 1) for leaf in ("codes", "scales")}
    assert set(live.parameters) == names | own
    assert {id(p) for p in live.model.parameters() if p.requires_grad} == {id(p) for p in live.parameters.values()}
    torch.testing.assert_close(logits_of(live.model), logits_of(load(shared)), rtol=1e-4, atol=1e-4)
    live.model(torch.arange(24)[None]).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in live.parameters.values())


@pytest.mark.parametrize("constant_dtype", [torch.float32, None])
def test_what_is_trained_on_is_what_the_file_will_hold(shared, constant_dtype):
    live = chosen(shared, constant_dtype=constant_dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in live.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    stored, tensors = live.export_tensors(), load_file(shared / "model.safetensors")
    tensors |= {name: tensor for name, tensor in stored.items() if name.startswith("reallm_shared")}
    modules = compressed_modules(load(shared, DECODE_PER_USE))
    with use_shared_decoders({name: strip_prefix(f"reallm_shared.{name}", tensors) for name in TABLES}):
        for path, matrix in live.matrices.items():
            unpacked = matrix.fmt.unpack(modules[path].packed_tensors(), matrix.shape)
            mine = strip_prefix(path, stored)
            assert set(mine) <= set(named_tensors(unpacked))
            written = matrix.fmt.decode(replace_tensors(unpacked, mine), matrix.shape)
            torch.testing.assert_close(matrix(), written, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["own", "shared"])
def test_tuned_decoders_bring_the_model_nearer_at_the_same_bytes(which, request, tiny_llama, tuning_text, tmp_path):
    artifact, out = request.getfixturevalue(which), tmp_path / "out"
    options = {**QUICK, "text": (tuning_text,), "reference": str(tiny_llama)}
    tuned = reallm.tune(artifact, out, method="end-to-end", **options)
    assert tuned.end_to_end["after"]["kl"] < 0.95 * tuned.end_to_end["before"]["kl"]
    names = changed(artifact, out)
    assert names and all(".decoder." in name for name in names)
    assert any(name.endswith("decoder.codes") for name in names)
    if which == "shared":
        assert {f"reallm_shared.{table}.decoder.codes" for table in TABLES} <= names
    rows = [[(r.name, r.nbytes) for r in read_ledger(f).rows if r.file != "config.json"] for f in (artifact, out)]
    assert rows[0] == rows[1]
    torch.testing.assert_close(logits_of(load(out)), logits_of(load(out, DECODE_PER_USE)), rtol=1e-4, atol=1e-4)


def test_block_by_block_a_decoder_of_its_own_trains(own, tiny_llama, tuning_text, tmp_path):
    options = {**QUICK, "text": (tuning_text,), "reference": str(tiny_llama), "block_learning_rate": 5e-3}
    reallm.tune(own, tmp_path / "out", method="blockwise", **options)
    assert any(name.endswith("decoder.codes") for name in changed(own, tmp_path / "out"))


def test_block_by_block_a_shared_decoder_is_refused_and_stays_in_both(shared, tiny_llama, tuning_text, tmp_path):
    options = {**QUICK, "text": (tuning_text,), "reference": str(tiny_llama)}
    with pytest.raises(
        RecipeError, match="shared decoders .basis, net, words. belong to many blocks and train end to end"
    ):
        reallm.tune(shared, tmp_path / "out", method="blockwise", **options)
    live = chosen(shared, ("decoders", "scales"))
    with live.freeze_shared_decoders():
        block = live.model.model.layers[0]
        assert live.module_parameters(block) and all("layers.0" in name for name in live.module_parameters(block))
        live.model(torch.arange(24)[None]).logits.sum().backward()
    table = [p for name, p in live.parameters.items() if name.startswith("reallm_shared")]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in table)
    reallm.tune(shared, tmp_path / "both", method="both", **options)
    assert any(name.startswith("reallm_shared") for name in changed(shared, tmp_path / "both"))
