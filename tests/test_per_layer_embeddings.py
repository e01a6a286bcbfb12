"""Gemma 3n and 4: a second table of the whole vocabulary, half of the model, is compressed as the embedding is."""

import json

import pytest
import torch
import yaml

import reallm
from reallm.artifact import read_manifest
from reallm.cli import main
from reallm.model import open_source, walk
from reallm.pipeline import Settings, prepare
from reallm.report.predicted import plan_file

IDS = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def folder(request, tmp_path_factory):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "vocab_size": 64, "vocab_size_per_layer_input": 62, "hidden_size_per_layer_input": 16}
    sizes |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
    if request.param == "gemma3n":
        more = {"intermediate_size": [48, 48], "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
        config = t.Gemma3nTextConfig(**sizes, **more, altup_num_inputs=2)
    else:
        config = t.Gemma4TextConfig(**sizes, intermediate_size=48, global_head_dim=16)
    place = tmp_path_factory.mktemp("models") / request.param
    t.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def table_of(matrices):
    return next(matrix for matrix in matrices if matrix.name.endswith("embed_tokens_per_layer"))


def test_the_table_is_an_embedding_of_a_role_of_its_own(folder):
    found = walk(open_source(folder).skeleton)
    table = table_of(found.matrices)
    assert (table.shape, table.kind, table.role) == ((62, 32), "embedding", "per_layer_embedding")
    assert sum(matrix.kind == "embedding" for matrix in found.matrices) == 2


@pytest.mark.parametrize("mode", reallm.model.MODES)
def test_a_model_with_it_computes_what_its_decoded_matrices_say_in_both_modes(folder, mode, tmp_path):
    (tmp_path / "lossless.yaml").write_text(
        'rules: [{match: "*", format: {format: dense, dtype: float32}}]\n'
        "embedding: {format: dense, dtype: float32}\nhead: {format: dense, dtype: float32}\n"
    )
    reallm.compress(folder, tmp_path / "out", recipe=tmp_path / "lossless.yaml")
    with torch.no_grad():
        expected = reallm.load(folder)(IDS).logits
        torch.testing.assert_close(reallm.load(tmp_path / "out", mode)(IDS).logits, expected, rtol=0, atol=1e-5)


def test_bits_and_the_default_recipe_store_it_like_the_embedding(folder, tmp_path, capsys):
    assert main(["compress", str(folder), "-o", str(tmp_path / "out"), "--recipe", "rtn4", "--embedding", "4"]) == 0
    embedding = [matrix for matrix in read_manifest(tmp_path / "out").matrices if matrix.kind == "embedding"]
    assert [matrix.fmt.bits for matrix in embedding] == [4, 4]
    assert len(yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["rules"]) == 1
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["not_compressed"]
    assert kept and not any("embed_tokens_per_layer" in name for name in kept)
    assert main(["compress", str(folder), "-o", str(tmp_path / "no"), "--bits", "4", "--dry-run"]) == 0
    assert "per_layer_embedding  uniform 8" in capsys.readouterr().out


def test_a_size_chooses_its_format_and_the_plan_names_it(folder, tmp_path):
    source = open_source(folder)
    least = prepare(source, Settings(recipe="rtn4"))
    reallm.compress(folder, tmp_path / "out", size=f"{int(source.nbytes * 0.45) // 1000}KB")
    table = table_of(read_manifest(tmp_path / "out").matrices)
    assert table.nbytes < 4 * table.weights and table_of([entry.matrix for entry in least.plan.entries])
    again = prepare(folder, Settings(recipe=str(tmp_path / "out" / "plan.yaml")))
    formats = {entry.matrix.name: entry.fmt for entry in again.plan.entries}
    assert formats == {matrix.name: matrix.fmt for matrix in read_manifest(tmp_path / "out").matrices}
    (tmp_path / "edited.yaml").write_text(plan_file(again))
    assert prepare(folder, Settings(recipe=str(tmp_path / "edited.yaml"))).plan.entries == again.plan.entries


def test_a_rule_may_name_it_and_keep_it(folder, tmp_path):
    name = table_of(walk(open_source(folder).skeleton).matrices).name
    recipe = f'rules: [{{match: "{name}", format: keep}}, {{match: "*", format: {{format: uniform, bits: 4}}}}]'
    (tmp_path / "recipe.yaml").write_text(recipe)
    plan = prepare(folder, Settings(recipe=str(tmp_path / "recipe.yaml"))).plan
    planned = {entry.matrix.name for entry in plan.entries}
    assert name not in planned and len(planned) > 10
