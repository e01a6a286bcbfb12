"""Decoders that many matrices share: trained once, stored once, charged once, and the same in the running model."""

import filecmp
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reallm
from reallm.checkpoint import read_ledger, read_manifest, work_folder
from reallm.cli.tables.ledger_table import ledger_dict, ledger_text
from reallm.errors import ArtifactError, FormatError
from reallm.formats import collect_shared_decoders, from_spec, shared_decoder_tensors, use_shared_decoders
from reallm.formats.base import strip_prefix
from reallm.hf import DECODE_AT_LOAD, DECODE_PER_USE, load
from reallm.hf.replacement import compressed_modules
from reallm.pipeline import Settings, estimate, prepare, run
from reallm.pipeline.artifact_size import ArtifactSize

CODEWORD = "{format: codeword, index_bits: 5, vector_dim: 4, hidden: 4, shared: %s}"
RECIPE = f"""
rules:
- {{role: [q, k, v, o], format: {CODEWORD % "attention"}}}
- {{role: down, format: {{format: low_rank_plus, rank: 2, base: {{format: permuted, base: {CODEWORD % "mlp"}}}}}}}
- role: gate
  format:
    format: conv_latents
    channels: 3
    width: 2
    steps: 4
    shared: net
    base: {{format: normal_float, bits: 4}}
- role: up
  format:
    format: linear_latents
    transform: learned
    kept: 7
    shared: basis
    base: {{format: normal_float, bits: 4}}
"""
TABLES = ("attention", "basis", "mlp", "net")
NAMES = {f"reallm_shared.{name}.decoder.{leaf}" for name in TABLES for leaf in ("codes", "scales", "scales_max")}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "shared.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def job(tiny_llama, recipe):
    return prepare(tiny_llama, Settings(recipe=recipe))


@pytest.fixture(scope="module")
def artifact(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "out"
    run(job, folder)
    return folder


def decoded_from_file(folder):
    """Every compressed matrix, decoded from what is in the file."""
    tensors = load_file(folder / "model.safetensors")
    shared_decoders = {name: strip_prefix(f"reallm_shared.{name}", tensors) for name in TABLES}
    with use_shared_decoders(shared_decoders):
        return {
            matrix.name: matrix.fmt.decode(
                matrix.fmt.unpack(strip_prefix(matrix.name, tensors), matrix.shape), matrix.shape
            )
            for matrix in read_manifest(folder).matrices
        }


def test_a_shared_decoder_is_stored_once_with_its_own_row_of_the_ledger(artifact):
    ledger = read_ledger(artifact)
    rows = {row.name: row for row in ledger.rows if row.role == "decoders"}
    assert set(rows) == NAMES
    assert {row.kind for row in rows.values()} == {"block"} and {row.matrix for row in rows.values()} == {None}
    assert ledger.total_bytes == sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())


def test_bits_per_weight_are_those_of_the_plan_decoders_included(job, artifact):
    assert read_ledger(artifact).bits_per_weight == pytest.approx(job.plan.block_bits, abs=1e-12)
    entries = sum(entry.nbytes for entry in job.plan.entries)
    assert job.plan.nbytes == entries + sum(row.nbytes for row in read_ledger(artifact).rows if row.role == "decoders")


def test_the_size_of_the_whole_file_is_foretold(job, artifact):
    assert ArtifactSize(job).nbytes(job.plan) == read_ledger(artifact).total_bytes


def test_the_running_model_holds_what_the_file_decodes_to_bit_for_bit(artifact):
    wanted = decoded_from_file(artifact)
    for mode in (DECODE_AT_LOAD, DECODE_PER_USE):
        modules = compressed_modules(load(artifact, mode=mode))
        assert set(modules) == set(wanted)
        assert all(torch.equal(module.weight, wanted[name]) for name, module in modules.items())


def test_matrices_of_one_decoder_have_one_table_of_codewords(artifact):
    modules = compressed_modules(load(artifact, mode=DECODE_PER_USE))
    shared_decoders = {
        name: module.fmt.codebook(module.unpack().decoder) for name, module in modules.items() if "self_attn" in name
    }
    assert len(shared_decoders) == 8 and all(
        torch.equal(codebook, shared_decoders[Q]) for codebook in shared_decoders.values()
    )


def test_the_same_job_gives_the_same_bytes(job, artifact, tmp_path):
    run(job, tmp_path / "out")
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", artifact / "model.safetensors", shallow=False)


def test_a_run_killed_after_training_goes_on_with_the_decoder_it_has(job, artifact, tmp_path, killed):
    with killed(at=1) as kill:
        run(job, tmp_path / "out", progress=kill)
    decoder = work_folder(tmp_path / "out") / "reallm_shared.mlp.safetensors"
    made = decoder.stat().st_mtime_ns
    with killed(at=1) as kill:
        run(job, tmp_path / "out", resume=True, progress=kill)
    assert decoder.stat().st_mtime_ns == made
    run(job, tmp_path / "out", resume=True)
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", artifact / "model.safetensors", shallow=False)


def test_a_saved_model_has_the_decoders_again(artifact, tmp_path):
    reallm.load(str(artifact)).save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (artifact, tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in NAMES)
    assert tuple(read_manifest(tmp_path / "again").shared_decoders) == TABLES


def test_half_precision_leaves_stored_numbers_alone(artifact):
    model = load(artifact, mode=DECODE_PER_USE, dtype=torch.float16)
    assert model.reallm_shared.packed_tensors()["mlp"]["decoder.scales_max"].dtype == torch.float32
    assert compressed_modules(model)[Q].weight.dtype == torch.float16


def test_a_decompressed_model_has_no_trace_of_decoders(artifact):
    model = load(artifact)
    model.dequantize()
    assert not any("reallm_shared" in name for name in model.state_dict())


def test_calibration_trains_decoders_before_the_stream(tiny_llama, recipe, text_file, tmp_path):
    settings = Settings(recipe=recipe, calibration=(str(text_file),), calibration_windows=4, calibration_context=32)
    job = prepare(tiny_llama, settings)
    run(job, tmp_path / "out")
    wanted = decoded_from_file(tmp_path / "out")
    modules = compressed_modules(load(tmp_path / "out"))
    assert all(torch.equal(module.weight, wanted[name]) for name, module in modules.items())


def test_tuning_leaves_shared_decoders_as_they_are(artifact, text_file, tmp_path):
    quick = {"context": 32, "batch": 2, "validation_windows": 2, "tokens": 4 * 2 * 32, "validate_every": 2}
    reallm.tune(artifact, tmp_path / "tuned", text=(str(text_file),), method="end-to-end", loss="ce", **quick)
    before, after = (load_file(folder / "model.safetensors") for folder in (artifact, tmp_path / "tuned"))
    assert all(torch.equal(before[name], after[name]) for name in NAMES)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith(".scales"))


def test_the_estimate_counts_shared_decoders_and_trains_none_of_the_model(job):
    assert estimate(job).compressed_bytes == job.plan.nbytes


def test_info_tells_what_decoder_nets_cost(artifact):
    costs = {cost["format"]["format"]: cost for cost in ledger_dict(artifact)["decoders"]}
    assert set(costs) == {"codeword", "low_rank_plus", "conv_latents", "linear_latents"}
    assert costs["linear_latents"]["multiply_adds_per_weight"] == 7
    # 3 + 3 · 2 / 4 for the two ways from latents, 36 · 2² / 4 for the stage, 9 · 2 for the head
    assert costs["conv_latents"]["multiply_adds_per_weight"] == 3 + 1.5 + 36 + 18
    assert costs["conv_latents"]["matrices"] == 2 and costs["conv_latents"]["weights"] == 2 * 176 * 64
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > 4 * 176 * 64 for cost in (costs["conv_latents"],))
    assert "multiply-adds/weight" in ledger_text(artifact)


def test_one_name_for_two_decoders_is_refused():
    one, other = (from_spec({"format": "codeword", "index_bits": bits, "shared": "x"}) for bits in (5, 6))
    with pytest.raises(FormatError, match="give one another name"):
        collect_shared_decoders([one, other])


@pytest.mark.parametrize("name", ["../up", "A", "a.b", "x" * 41])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(FormatError, match="is not a name"):
        from_spec({"format": "codeword", "shared": name})


def test_a_decoder_that_is_not_at_hand_is_named():
    with pytest.raises(FormatError, match="'elsewhere' is not loaded"):
        shared_decoder_tensors("elsewhere")


def changed(artifact, folder, change):
    """A copy of the artifact with other tensors."""
    shutil.copytree(artifact, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_missing_decoder_is_named(artifact, tmp_path):
    name = "reallm_shared.mlp.decoder.codes"
    folder = changed(artifact, tmp_path / "out", lambda tensors: {n: t for n, t in tensors.items() if n != name})
    for read in (load, read_ledger):
        with pytest.raises(ArtifactError, match="reallm_shared.mlp.decoder.codes"):
            read(folder)


def test_a_decoder_with_numbers_that_are_none_is_refused(artifact, tmp_path):
    name = "reallm_shared.mlp.decoder.scales_max"
    folder = changed(artifact, tmp_path / "out", lambda tensors: tensors | {name: tensors[name] * float("nan")})
    with pytest.raises(ArtifactError, match="NaN"):
        load(folder)


def test_a_config_with_two_decoders_of_one_name_is_refused(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    formats = [layout["format"] for layout in config["quantization_config"]["layouts"]]
    next(fmt for fmt in formats if fmt["format"] == "codeword")["hidden"] = 5
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="give one another name"):
        load(tmp_path / "out")


def test_the_file_names_no_decoder_twice(artifact):
    with safe_open(artifact / "model.safetensors", framework="pt") as file:
        assert {name for name in file.keys() if "decoder" in name} == NAMES  # noqa: SIM118 - no dict
