"""Untrusted artifacts and configs: no code runs, memory is bounded, and every failure is one error."""

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint.checksums import compute_checksums
from reallm.errors import ArtifactError, ReallmError, SourceError
from reallm.formats import from_spec
from reallm.hf import MODES, artifact_memory_footprint, load, load_tokenizer, verify_artifact
from reallm.source import open_source

RECIPE = """
rules:
- match: "*.0.*"
  format: {format: permuted, base: {format: uniform, bits: 3, group_size: 16, scales: two_level}}
- {match: "*.1.*gate_proj", format: {format: entropy_coded, bits: 4, largest: 7}}
- {match: "*", format: {format: codebook, index_bits: 4, vector_dim: 2}}
"""


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    (place / "recipe.yaml").write_text(RECIPE)
    reallm.compress(tiny_llama, place / "out", recipe=str(place / "recipe.yaml"))
    return place / "out"


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def seal(folder):
    """Write checksums as a hostile author would: for the changed tensors."""
    sums = compute_checksums(folder.glob("*.safetensors"))
    edit(folder, lambda config: config["quantization_config"].update(checksums=sums))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seal(folder)


def noise(size):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.layers.0.mlp.up_proj.base.scales_max", lambda t: t.fill_(float("nan")), "NaN, infinite or huge"),
        ("model.layers.0.mlp.up_proj.base.scales_max", lambda t: t[0:1].fill_(float("inf")), "NaN, infinite or huge"),
        ("model.layers.0.mlp.up_proj.base.scales_max", lambda t: t.fill_(1e38), "NaN, infinite or huge"),
        ("model.layers.0.mlp.up_proj.order", lambda t: t.zero_(), "no permutation"),
        ("model.layers.0.mlp.up_proj.order", lambda t: t.fill_(255), "no permutation"),
        ("model.layers.1.mlp.up_proj.codebook", lambda t: t[0, 0].fill_(float("nan")), "NaN, infinite or huge"),
        ("model.layers.1.mlp.gate_proj.codes", lambda t: t.copy_(noise(len(t))), "damaged"),
        ("model.layers.1.mlp.gate_proj.frequencies", lambda t: t.zero_(), "damaged"),
        ("model.norm.weight", lambda t: t[3].fill_(float("-inf")), "NaN or infinity"),
    ],
)
def test_numbers_that_no_compressor_writes_are_refused_with_right_checksums_too(folder, mode, name, change, says):
    edit_tensors(folder, lambda tensors: change(tensors[name]))
    with pytest.raises(ArtifactError, match=f"{name.rpartition('.')[0].removesuffix('.base')}.*{says}"):
        load(folder, mode)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "far more than"),
        ({"num_hidden_layers": 3000}, "far more than"),
        ({"num_hidden_layers": -1}, ""),
        ({"hidden_size": 10**15}, ""),
        ({"hidden_size": "wide"}, ""),
        ({"vocab_size": 10**12}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "os.system"}, ""),
        ({"layer_types": [[]] * 60_000}, "values, more than"),
        ({"rope_scaling": {"a": {"b": [1] * 60_000}}}, "values, more than"),
        ({"transformers_weights": "../../model.safetensors"}, "transformers_weights"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ({"attn_implementation": "someone/kernel"}, "wants code from the hub"),
        ({"model_type": ["llama"]}, "is not known"),
    ],
)
def test_a_config_that_asks_for_anything_is_one_error_in_little_time(folder, change, says):
    edit(folder, lambda config: config.update(change))
    for opener in (load, artifact_memory_footprint):
        if opener is artifact_memory_footprint and not says:
            continue  # it builds no tensor, and may report what such a model would take
        start = time.perf_counter()
        with pytest.raises(ReallmError, match=says or None) as caught:
            opener(folder)
        assert time.perf_counter() - start < 20 and len(str(caught.value)) <= 1500


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q["layouts"][0].update(shape=[10**12, 10**12]), "is not a stored matrix"),
        (lambda q: q["layouts"][0].update(shape=[2**30, 2**30]), "is not a stored matrix"),
        (lambda q: q["layouts"][0].update(shape=[True, 64]), "is not a stored matrix"),
        (lambda q: q["layouts"][1].update(shape=[q["layouts"][1]["shape"][0] + 1, 64]), "config.json"),
        (lambda q: q["matrices"].update({"a\x1b[2Jb": 0}), "is not a name"),
        (lambda q: q.update(provenance=3), "damaged"),
    ],
)
def test_a_manifest_that_lies_about_shapes_and_names_is_refused(folder, change, says):
    edit(folder, lambda config: change(config["quantization_config"]))
    with pytest.raises(ArtifactError, match=says):
        load(folder)


def nested(depth):
    spec = {"format": "uniform", "bits": 3}
    for _ in range(depth):
        spec = {"format": "gain", "base": spec}
    return spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (nested(9), "nested more than 8 deep"),
        (nested(900), "nested more than 8 deep"),
        ({"format": "low_rank_plus", "rank": -3, "base": {"format": "dense"}}, "rank=-3"),
        ({"format": "entropy_coded", "bits": 1e-9}, "bits=1e-09"),
        ({"format": "entropy_coded", "bits": float("nan")}, "bits=nan"),
        ({"format": "uniform", "bits": "3" * 9999}, "is not of type int"),
        ({"format": "x" * 9999}, "unknown format"),
    ],
)
def test_a_format_that_could_take_any_memory_is_refused(spec, says):
    with pytest.raises(ReallmError, match=says) as caught:
        from_spec(spec)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "spec",
    [
        {"format": "uniform", "bits": 3, "group_size": 10**30},
        {"format": "codebook", "index_bits": 4, "group_size": 10**12},
        {"format": "permuted", "block_rows": 10**30, "base": {"format": "dense"}},
    ],
)
def test_groups_and_blocks_larger_than_the_matrix_take_no_memory(spec):
    from reallm.fit import fit

    fmt, weight = from_spec(spec), torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    tensors = fmt.pack(fit(fmt, weight), weight.shape)
    assert fmt.decode(fmt.unpack(tensors, (24, 64)), (24, 64)).shape == (24, 64)


def test_a_transform_that_would_take_a_huge_square_matrix_is_refused():
    fmt = from_spec({"format": "rotated", "base": {"format": "dense"}})
    with pytest.raises(ReallmError, match="99999 exceeds 4096"):
        fmt.check((2, 99_999))


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_no_pickle_in_an_artifact_or_a_source_is_ever_loaded(folder, tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    for place, opener, kind in ((folder, load, ArtifactError), (source, open_source, SourceError)):
        (place / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"):
            (place / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(kind):
            opener(place)
        with pytest.raises(ReallmError):
            load(place)
    assert not (tmp_path / "exploded").exists()


CODE = "import os; os.mkdir({!r})\nclass Mine: pass\n"
AUTO = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}


def test_no_code_from_a_model_folder_is_run(folder, tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    for place in (folder, source):
        (place / "mine.py").write_text(CODE.format(str(tmp_path / "ran")))
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(CODE.format(str(tmp_path / "ran")))
        edit(place, lambda config: config.update(auto_map=AUTO))
        tokenizer = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": AUTO}))
        load(place)  # a known family: its own code, not the folder's
        load_tokenizer(place)
        edit(place, lambda config: config.update(model_type="mine"))
        with pytest.raises(ReallmError, match="needs model code from its own folder, which reallm never runs"):
            load(place)
    assert not (tmp_path / "ran").exists()


def test_an_artifact_with_an_index_that_leads_away_is_refused(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    weights = dict.fromkeys(load_file(folder / "model.safetensors"), "../other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(ArtifactError, match="'../other.safetensors' is not a safetensors file of this folder"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for reader in (load, verify_artifact):
        with pytest.raises(ArtifactError, match="names no weight file"):
            reader(folder)


def test_names_in_errors_never_move_the_cursor(folder, capsys):
    from reallm.cli import main

    edit(folder, lambda config: config.update(model_type="\x1b[2Jllama"))
    assert main(["generate", str(folder), "hello"]) == 2
    assert "\x1b" not in capsys.readouterr().err
