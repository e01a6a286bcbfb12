"""Artifacts load, compute what the decoded matrices compute, save, and fail clearly."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import reallm
from reallm.errors import ArtifactError, FormatError, ReallmError, SourceError
from reallm.hf import (
    MODES,
    ReallmConfig,
    get_memory_footprint,
    load,
    load_tokenizer,
    predict_memory_footprint,
    register_with_transformers,
)
from reallm.hf.modules import _CompressedModule
from reallm.hf.replacement import compressed_modules

FAMILIES = ["llama", "tied", "qwen2", "gemma3", "gpt2", "opt", "phi3", "neox", "mixtral", "qwen3_moe", "gpt_oss"]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_decoded_matrices(artifact, ids, family, mode, build, decoded_model):
    expected = logits(decoded_model(build(family), artifact(family)), ids)
    model = load(artifact(family), mode)
    assert not model.training
    # Experts run one by one here and batched there; everything else is bit for bit.
    torch.testing.assert_close(
        logits(model, ids), expected, rtol=0, atol=1e-5 if "m" in family[:2] or "o" in family else 0
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "mixtral"])
def test_save_pretrained_writes_the_same_tensors_and_they_load_again(artifact, ids, tmp_path, family, mode):
    model = load(artifact(family), mode)
    model.save_pretrained(tmp_path)
    before, after = load_file(artifact(family) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())
    again = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert again == json.loads((artifact(family) / "config.json").read_text())["quantization_config"] | {"mode": mode}
    assert torch.equal(logits(load(tmp_path, mode), ids), logits(model, ids))


def test_from_pretrained_works_after_import_reallm(artifact, ids):
    model = AutoModelForCausalLM.from_pretrained(artifact("tied"))
    assert torch.equal(logits(model, ids), logits(load(artifact("tied")), ids))


def test_a_config_passed_to_from_pretrained_sets_the_mode_and_nothing_else(artifact):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = ReallmConfig(mode="decode_per_use", layouts=[{"format": "nonsense"}])
        model = AutoModelForCausalLM.from_pretrained(artifact("tied"), quantization_config=config)
    assert all(module.dense.numel() == 0 for module in compressed_modules(model).values())


def test_registering_again_is_harmless():
    register_with_transformers()
    register_with_transformers()


def test_the_base_model_loads_alone(artifact, ids):
    base = AutoModel.from_pretrained(artifact("tied"))
    with torch.no_grad():
        expected = load(artifact("tied")).model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("family", "opener"),
    [
        ("tied", AutoModelForSequenceClassification),
        ("llama", AutoModelForSequenceClassification),
        ("llama", AutoModelForTokenClassification),
        ("gpt2", AutoModelForQuestionAnswering),
    ],
)
def test_another_class_has_the_decoder_of_the_artifact_and_a_new_head(artifact, ids, tmp_path, family, opener):
    model, causal = opener.from_pretrained(artifact(family)), load(artifact(family))
    with torch.no_grad():
        assert torch.equal(model.base_model(ids)[0], causal.base_model(ids)[0])
    (head,) = [m for m in model.children() if m is not model.base_model and isinstance(m, torch.nn.Linear)]
    spread = head.weight.std() / causal.config.initializer_range
    assert head.weight.requires_grad and 0.8 < spread < 1.25
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids[:1])[0], opener.from_pretrained(tmp_path)(ids[:1])[0])


def test_a_class_whose_decoder_has_another_name_says_what_artifacts_load_as(artifact):
    with pytest.raises(ArtifactError, match=r"keeps its decoder under 'transformer\.'.*load as LlamaForCausalLM"):
        AutoModelForQuestionAnswering.from_pretrained(artifact("llama"))


def test_lm_head_and_decoder_are_never_new(artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path, "llama")
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ArtifactError, match="'lm_head.weight' is missing in what was saved of a LlamaForSequence"):
        load(tmp_path / "classifier")
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ArtifactError, match="'model.norm.weight' is missing"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "mixtral"])
def test_num_parameters_is_that_of_the_original_model(artifact, build, family, mode):
    original, model = build(family), load(artifact(family), mode)
    for embeddings in (False, True):
        expected = original.num_parameters(exclude_embeddings=embeddings)
        assert model.num_parameters(exclude_embeddings=embeddings) == expected
    assert model.base_model.num_parameters() == original.base_model.num_parameters()
    trainable = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters(only_trainable=True) == trainable < original.num_parameters()
    assert model.get_memory_footprint() == get_memory_footprint(model)
    assert copy.deepcopy(model).num_parameters() == original.num_parameters()
    assert model.dequantize().num_parameters() == original.num_parameters()


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_no_module_decodes_before_loading_has_ended(artifact, family, mode, monkeypatch):
    unpack = _CompressedModule.unpack

    def check_unpack(module):
        assert all(tensor.device.type != "meta" for tensor in module.packed_tensors().values())
        assert not module.loading
        return unpack(module)

    monkeypatch.setattr(_CompressedModule, "unpack", check_unpack)
    modules = compressed_modules(load(artifact(family), mode)).values()
    assert not any(module.loading for module in modules)


def test_an_entropy_coded_gpt2_loads_though_its_initialisation_asks_for_weights(build, save, tmp_path):
    residual = {"format": "low_rank_plus", "rank": 8, "base": {"format": "codebook", "index_bits": 6}}
    logits_of = []
    for coding in (False, True):
        recipe = {"name": "one", "coding": coding, "rules": [{"match": "*", "format": residual}]}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        folder = tmp_path / f"out-{coding}"
        reallm.compress(save(build("gpt2"), tmp_path / "gpt2"), folder, recipe=tmp_path / "recipe.yaml")
        logits_of.extend(logits(load(folder, mode), torch.arange(8)[None]) for mode in MODES)
    coded = ReallmConfig(**json.loads((folder / "config.json").read_text())["quantization_config"]).coded_tensors()
    assert any("base.scales" in names or "left" in names for names in coded.values())
    assert all(torch.equal(found, logits_of[0]) for found in logits_of)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_dtype_sets_what_is_computed_in_and_leaves_stored_tensors(artifact, ids, dtype, mode):
    model, stored = load(artifact("tied"), mode, dtype=dtype), load_file(artifact("tied") / "model.safetensors")
    assert logits(model, ids).dtype == dtype
    for path, module in compressed_modules(model).items():
        assert all(torch.equal(t, stored[f"{path}.{n}"]) for n, t in module.packed_tensors().items())
    error = (logits(model, ids).float() - logits(load(artifact("tied")), ids)).abs().mean()
    assert error < 0.1


def test_moving_and_casting_a_loaded_model_keeps_stored_tensors(artifact, ids):
    model, stored = load(artifact("tied")), load_file(artifact("tied") / "model.safetensors")
    model.to(torch.bfloat16)
    assert logits(model, ids).dtype == torch.bfloat16
    for path, module in compressed_modules(model).items():
        assert all(torch.equal(t, stored[f"{path}.{n}"]) for n, t in module.packed_tensors().items())


def test_a_device_map_works(artifact, ids):
    pytest.importorskip("accelerate")
    for place in ("cpu", "auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(artifact("tied"), device_map=place)
        assert torch.equal(logits(model, ids).cpu(), logits(load(artifact("tied")), ids)) or place == "auto"


@pytest.mark.parametrize("mode", MODES)
def test_tying_again_breaks_nothing(artifact, ids, mode):
    model = load(artifact("tied"), mode)
    before = logits(model, ids)
    model.tie_weights()
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["tied", "mixtral"])
def test_memory_footprint_is_predicted_exactly(artifact, family, mode):
    model = load(artifact(family), mode)
    formats = model.hf_quantizer.quantization_config.weight_formats()
    assert predict_memory_footprint(model.config, formats)[mode] == get_memory_footprint(model)


def test_decoding_per_use_holds_little_more_than_the_file(artifact):
    file = artifact("tied") / "model.safetensors"
    assert get_memory_footprint(load(artifact("tied"), "decode_per_use")) <= file.stat().st_size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["tied", "llama", "gemma3", "gpt2", "mixtral", "gpt_oss"])
def test_dequantize_gives_a_plain_model_that_saves_and_loads(artifact, ids, tmp_path, family, mode, build):
    model = load(artifact(family), mode)
    before = logits(model, ids)
    plain = model.dequantize()
    assert not compressed_modules(plain)
    torch.testing.assert_close(logits(plain, ids), before, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(build(family))
    torch.testing.assert_close(logits(again, ids), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_generates(artifact, mode):
    model = load(artifact("tied"), mode)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_gradients_reach_the_input_embeddings(artifact):
    model = load(artifact("llama"), "decode_per_use")
    embeddings = torch.randn(1, 4, 64, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_original_models_load_with_the_same_function(original, ids, build):
    assert torch.equal(logits(load(original("gpt2")), ids), logits(build("gpt2"), ids))


def test_tokenizers_load_from_originals_and_a_folder_without_one_says_so(tiny_llama, artifact):
    assert load_tokenizer(tiny_llama)("the river").input_ids
    with pytest.raises(SourceError, match="has no tokenizer files"):
        load_tokenizer(artifact("tied"))


def test_a_sharded_artifact_loads(artifact, ids, tmp_path):
    model = load(artifact("llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))


def copy_artifact(artifact, tmp_path, family="tied"):
    return shutil.copytree(artifact(family), tmp_path / "copy")


def edit(folder, change):
    """Change the quantization config of a folder in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


CODES = "model.layers.1.mlp.up_proj.base.codes"


@pytest.mark.parametrize("opener", [load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda q: q.update(version=99), ArtifactError, "written by a newer reallm"),
        (lambda q: q.update(version="x"), ArtifactError, "version 'x' is not a version"),
        (
            lambda q: q["layouts"][0]["format"].update(format="magic"),
            FormatError,
            "unknown format 'magic'; known formats: .*uni",
        ),
        (
            lambda q: q["matrices"].update({"model.norm": 0}),
            ArtifactError,
            "model.norm: is a LlamaRMSNorm, not a matrix",
        ),
        (lambda q: q["matrices"].update({"model.nowhere": 0}), ArtifactError, "model.nowhere: this model has no such"),
        (lambda q: q["matrices"].update({"model.embed_tokens": 7}), ArtifactError, "has layout 7 of"),
    ],
)
def test_a_damaged_or_foreign_config_is_one_line(artifact, tmp_path, opener, change, kind, words):
    folder = copy_artifact(artifact, tmp_path)
    edit(folder, change)
    with pytest.raises(kind, match=words):
        opener(folder)


@pytest.mark.parametrize("opener", [load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(CODES), f"'{CODES}' is missing"),
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update({CODES: t[CODES].to(torch.int32)}), r"is int32 .*, config.json says uint8"),
        (lambda t: t.update({CODES: t[CODES][:-1].clone()}), f"'{CODES}' is uint8 .*, config.json says uint8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"'model.norm.weight' is float32 \(3,\)"),
    ],
)
def test_a_missing_or_wrong_tensor_is_named(artifact, tmp_path, opener, change, words):
    folder = copy_artifact(artifact, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(ArtifactError, match=words):
        opener(folder)


def test_a_missing_weight_file_is_named(artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model.safetensors: weight file is missing"):
        load(folder)


def test_an_unknown_mode_lists_the_modes(artifact):
    with pytest.raises(ReallmError, match="'fast' is not one of decode_at_load, decode_per_use"):
        load(artifact("tied"), mode="fast")


def test_a_missing_device_is_named(artifact):
    for path in (artifact("tied"), "nonsense"):
        if path == "nonsense" or not torch.cuda.is_available():
            with pytest.raises(ReallmError):
                load(path, device="cuda")


def test_keys_of_a_later_minor_version_survive_saving(artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path)
    edit(folder, lambda q: q.update(flavour="new"))
    load(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["flavour"] == "new"


def run(code):
    # The command line, when tested in this process before, has silenced transformers.
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_without_import_reallm_loading_fails_and_names_the_remedy(artifact):
    folder = str(artifact("tied"))
    lines = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({folder!r})"
    done = run(lines)
    assert done.returncode != 0
    assert "IMPORT_REALLM" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_clean_process_computes_the_same_logits_without_the_original(tmp_path, ids, build, save, write_artifact):
    folder = write_artifact(save(build("tied"), tmp_path / "original"), tmp_path / "out")
    expected = logits(load(folder), ids)
    shutil.rmtree(tmp_path / "original")
    torch.save(ids, tmp_path / "ids")
    done = run(
        "import torch, reallm; from transformers import AutoModelForCausalLM as A;"
        f"ids = torch.load({str(tmp_path / 'ids')!r});"
        f"torch.save(A.from_pretrained({str(folder)!r})(ids).logits.detach(), {str(tmp_path / 'logits')!r})"
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=0, atol=1e-6)


def test_reallm_offers_load():
    assert reallm.load is load and reallm.load_tokenizer is load_tokenizer
