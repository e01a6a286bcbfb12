"""Cost of block errors, and memory and disk use of block-wise tuning."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import reallm
from reallm.calibrate.block_loader import BlockLoader, decoder_blocks
from reallm.checkpoint import work_folder
from reallm.errors import ArtifactError, RecipeError, SourceError
from reallm.hf import load, load_tokenizer
from reallm.source.model_source import FolderSource
from reallm.tuning import blockwise
from reallm.tuning.blockwise import cost
from reallm.tuning.data import load_windows
from reallm.tuning.gradient_files import Gradients, check_disk_space
from reallm.tuning.tune_settings import Settings

QUICK = {"context": 32, "batch": 4, "validation_windows": 8, "block_learning_rate": 5e-3, "method": "blockwise"}
SHORT = {**QUICK, "block_windows": 16, "block_epochs": 2}
RECIPE = 'rules:\n- {match: "*", format: {format: uniform, bits: 4, group_size: 16}}\n'


@pytest.fixture(scope="module")
def nearby(tiny_llama, tmp_path_factory):
    """The original model at 4 bits: errors small enough for their second-order cost to be accurate."""
    folder = tmp_path_factory.mktemp("nearby")
    (folder / "mine.yaml").write_text(RECIPE)
    reallm.compress(tiny_llama, folder / "out", recipe=str(folder / "mine.yaml"))
    return folder / "out"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_come_back_from_disk_to_three_per_cent_whatever_their_size(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    gradients = drawn(3, 2, 5, 64) * torch.logspace(-12, 12, 5)[:, None]
    gradients[1, 0, 2] = 0  # the last token has gradient 0
    kept = Gradients(files)
    for number in (2, 0, 1):
        kept.write(number, gradients[number])
    assert kept.missing_windows() == [] and Gradients([*files, tmp_path / "other"]).missing_windows() == [3]
    for block in range(2):
        found = kept.read(block, slice(1, 3), "cpu")
        assert (found - gradients[1:, block]).norm(dim=-1).le(0.04 * gradients[1:, block].norm(dim=-1)).all()
    assert sum(file.stat().st_size for file in files) < 1.2 * Gradients.nbytes(3, 2, 5, 64) + 3 * 400
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_the_end_loss_does_not_see_costs_nothing():
    gradients, errors = drawn(2, 3, 8), drawn(2, 3, 8, seed=1)
    unseen = errors - gradients * (errors * gradients).sum(-1, keepdim=True) / gradients.square().sum(-1, keepdim=True)
    assert cost(unseen, gradients) < 1e-10
    expected = sum((g @ d) ** 2 for g, d in zip(gradients.reshape(-1, 8), errors.reshape(-1, 8), strict=True)) / 6 / 2
    torch.testing.assert_close(cost(errors, gradients), expected)


def test_the_cost_of_small_errors_is_the_kl_divergence_in_nats(tiny_llama):
    """Independent random errors per token in the last block's output, where the second order is exact."""
    model, ids = load(tiny_llama), torch.randint(2, 250, (64, 32), generator=torch.Generator().manual_seed(0))
    found = []
    reach = torch.ones_like(ids, dtype=torch.bool)
    draws = (torch.Generator().manual_seed(number) for number in range(64))
    blockwise.block_gradients(model, ids, reach, "cpu", draws, lambda _, g: found.append(g[-1]))
    errors = 0.02 * drawn(64, 32, 64)
    with torch.no_grad():
        plain = model(ids).logits[:, :-1].log_softmax(-1)
        decoder_blocks(model)[-1].register_forward_hook(lambda _m, _i, output: output + errors)
        moved = model(ids).logits[:, :-1].log_softmax(-1)
    divergence = (plain.exp() * (plain - moved)).sum(-1).mean()
    torch.testing.assert_close(cost(errors[:, :-1], torch.stack(found)[:, :-1]), divergence, rtol=0.15, atol=0)


def test_blocks_that_learn_by_the_end_loss_bring_the_model_nearer(nearby, tiny_llama, tuning_text, tmp_path):
    options = {**QUICK, "text": (tuning_text,), "reference": str(tiny_llama)}
    events = reallm.tune(nearby, tmp_path / "out", **options).events
    windows = load_windows([tuning_text], load_tokenizer(tiny_llama), 32).ids
    with torch.no_grad():
        logits = [load(folder)(windows).logits.log_softmax(-1) for folder in (tiny_llama, nearby, tmp_path / "out")]
    before, after = ((logits[0].exp() * (logits[0] - other)).sum(-1).mean() for other in logits[1:])
    assert after < 0.95 * before
    errors = [event for event in events if event["phase"] == "block"]
    assert {event["unit"] for event in errors} == {"nats"} and all(
        "tokens_per_second" in e for e in errors if e["epoch"]
    )


def test_what_errors_cost_is_named_in_the_provenance_unless_it_is_the_default(
    nearby, tiny_llama, tuning_text, tmp_path
):
    options = {**SHORT, "text": (tuning_text,), "reference": str(tiny_llama)}
    tuned = {}
    for kind in ("loss", "outputs"):
        reallm.tune(nearby, tmp_path / kind, block_error=kind, **options)
        provenance = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]["provenance"]
        named = provenance["tuned"][0].get("block_error", Settings.block_error)  # the note omits defaults
        assert named == kind and "target" not in provenance["tuned"][0]
        tuned[kind] = load_file(tmp_path / kind / "model.safetensors")
    assert any(not torch.equal(tuned["loss"][name], tuned["outputs"][name]) for name in tuned["loss"])


def test_one_block_of_the_original_is_in_memory(nearby, tiny_llama, tuning_text, tmp_path, monkeypatch):
    made, counts, whole = [], [], []

    class Watched(BlockLoader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.model)

    monkeypatch.setattr(blockwise, "BlockLoader", Watched)
    forward_block = blockwise.HiddenStateCache.forward_block

    def counting(stream, *arguments):
        full = [any(not p.is_meta for p in own.parameters()) for model in made for own in decoder_blocks(model)]
        counts.append(sum(full))
        return forward_block(stream, *arguments)

    monkeypatch.setattr(blockwise.HiddenStateCache, "forward_block", counting)
    monkeypatch.setattr(FolderSource, "load", lambda *a, **k: whole.append(a))
    options = {**SHORT, "text": (tuning_text,), "reference": str(tiny_llama)}
    reallm.tune(nearby, tmp_path / "out", block_error="outputs", **options)
    assert max(counts) == 1 and len(made) == 1 and whole == []


def test_the_whole_original_is_gone_once_it_has_given_its_gradients(
    nearby, tiny_llama, tuning_text, tmp_path, originals_alive
):
    reallm.tune(nearby, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), block_error="loss", **SHORT)
    originals, alive = originals_alive
    assert originals and alive and max(alive) == 0


def test_gradients_are_kept_for_a_killed_run_and_gone_in_the_end(nearby, tiny_llama, tuning_text, tmp_path, killed):
    options = {**SHORT, "text": (tuning_text,), "reference": str(tiny_llama)}
    work = work_folder(tmp_path / "out")
    reallm.tune(nearby, tmp_path / "whole", **options)

    with killed(when=lambda event: event["phase"] == "block" and event["block"] == 1) as kill:
        reallm.tune(nearby, tmp_path / "out", listener=kill, **options)
    files = sorted(work.glob("gradients-*"))
    assert len(files) == 16 + 8
    files[3].unlink()
    shutil.copytree(work, tmp_path / "damaged.work")
    again = reallm.tune(nearby, tmp_path / "out", resume=True, **options).events
    assert [event["windows"] for event in again if event["phase"] == "gradients"][0] == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not work.exists()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "damaged.work").rename(work)
    (work / files[5].name).write_bytes(b"short")
    with pytest.raises(ArtifactError, match=files[5].name):
        reallm.tune(nearby, tmp_path / "out", resume=True, **options)


def test_a_disk_without_room_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_500_000_000))
    check_disk_space(tmp_path, 1_400_000_000)
    with pytest.raises(RecipeError, match=r"2.5 GB for gradients in .*, where 1.5 GB are free; use fewer --block-win"):
        check_disk_space(tmp_path, 2_500_000_000)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("loss", "the original model's logits are NaN or infinite"),
        ("outputs", "its error is not finite before the first step"),
    ],
)
def test_an_original_that_is_not_finite_is_refused_block_by_block_too(
    compressed, tiny_llama, tuning_text, tmp_path, kind, says
):
    shutil.copytree(tiny_llama, tmp_path / "damaged")
    weights = load_file(tiny_llama / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    options = {**SHORT, "method": "blockwise", "block_error": kind}
    with pytest.raises(SourceError, match=says):
        reallm.tune(compressed, tmp_path / "out", text=tuning_text, reference=str(tmp_path / "damaged"), **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_block_that_keeps_no_tensor_and_trains_nothing_hands_the_states_on(tiny_llama, tuning_text, tmp_path):
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM  # its norms have no weights

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    OlmoForCausalLM(OlmoConfig(**sizes, vocab_size=512)).save_pretrained(tmp_path / "olmo")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "olmo")
    (tmp_path / "mine.yaml").write_text(
        "rules:\n"
        "- {block: [0], match: '*', format: {format: low_rank_plus, rank: 2, base: {format: uniform, bits: 2}}}\n"
        "- {match: '*', format: {format: uniform, bits: 2}}\n"
    )
    reallm.compress(tmp_path / "olmo", tmp_path / "in", recipe=str(tmp_path / "mine.yaml"))
    options = {"text": tuning_text, "reference": str(tmp_path / "olmo"), "train": "residual", "method": "blockwise"}
    sizes = {"context": 32, "batch": 4, "block_windows": 8, "block_epochs": 1, "validation_windows": 4}
    tuned = reallm.tune(tmp_path / "in", tmp_path / "out", **options, **sizes)
    assert {event["block"] for event in tuned.events if event["phase"] == "block"} == {0}


@pytest.fixture(scope="module")
def gemma3n(tiny_llama, tmp_path_factory):
    """(original model, 4-bit artifact) as folders: states with a leading axis, per-layer inputs, shared KV."""
    from transformers import AutoTokenizer, Gemma3nForCausalLM, Gemma3nTextConfig

    folder = tmp_path_factory.mktemp("gemma3n")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    tables = {"vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **sizes, **tables, **kinds, num_key_value_heads=1, head_dim=16, num_kv_shared_layers=2, laurel_rank=8
    )
    Gemma3nForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "model")
    (folder / "mine.yaml").write_text(RECIPE.replace("bits: 4", "bits: 2").replace("group_size: 16", "group_size: 8"))
    reallm.compress(folder / "model", folder / "out", recipe=str(folder / "mine.yaml"))
    return folder / "model", folder / "out"


def test_blocks_that_are_given_more_than_states_learn_with_what_belongs_to_their_batch(gemma3n, tuning_text, tmp_path):
    original, compressed = gemma3n
    options = {**SHORT, "block_epochs": 1, "text": tuning_text, "reference": str(original), "block_error": "outputs"}
    events = reallm.tune(compressed, tmp_path / "out", **options).events
    errors = [event for event in events if event["phase"] == "block"]
    first, last = ([e["validation"] for e in errors if e["epoch"] == epoch] for epoch in (0, 1))
    assert len(first) == 4 and all(after < before for before, after in zip(first, last, strict=True))


def test_states_of_several_rows_per_token_are_refused_before_gradients_are_taken(
    gemma3n, tuning_text, tmp_path, monkeypatch
):
    original, compressed = gemma3n
    monkeypatch.setattr(blockwise, "block_gradients", None)
    with pytest.raises(SourceError, match="Gemma3nForCausalLM: hidden states .* add --block-error outputs"):
        reallm.tune(compressed, tmp_path / "out", text=tuning_text, reference=str(original), **SHORT)
    assert not work_folder(tmp_path / "out").exists()
