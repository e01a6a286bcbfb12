"""A mean of all rows of an embedding: budgets take it out where there is one, and only there."""

import pytest
import torch

import reallm
import reallm.pipeline.budget as budgeting
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.hf import load_tokenizer
from reallm.pipeline import Settings, prepare
from reallm.pipeline.artifact_size import nbytes_by_file
from reallm.source import open_source

SIZES = [80_000, 100_000]
CALIBRATION = {"calibration_windows": 6, "calibration_context": 64}


@pytest.fixture(scope="module")
def with_mean(tiny_llama, tmp_path_factory):
    """The tiny Llama with a vector added to every row of its embedding, of 9 times the energy of the rest."""
    folder = tmp_path_factory.mktemp("models") / "with-mean"
    model = open_source(tiny_llama).load(torch.float32, "cpu")
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += 3 * weight.std() * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).sign()
    model.save_pretrained(folder)
    load_tokenizer(tiny_llama).save_pretrained(folder)
    return folder


def end_of(plan):
    return next(entry.fmt for entry in plan.entries if entry.matrix.kind == "embedding")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_rank_one_is_chosen_where_rows_have_a_mean_and_nowhere_else(tiny_llama, with_mean, text_file, size, calibrated):
    data = {"calibration": (str(text_file),), **CALIBRATION} if calibrated else {}
    assert isinstance(end_of(prepare(with_mean, Settings(size=size, **data)).plan), LowRankPlus)
    assert not isinstance(end_of(prepare(tiny_llama, Settings(size=size, **data)).plan), LowRankPlus)


def divergence(original, found):
    """KL of next tokens, nats per token."""
    windows = torch.randint(2, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (model(windows).logits.log_softmax(-1) for model in (original, found))
    return (before.exp() * (before - after)).sum(-1).mean().item()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_file_of_the_same_size_is_nearer_to_the_original(with_mean, text_file, tmp_path, monkeypatch, calibrated):
    data = {"calibration": (str(text_file),), **CALIBRATION} if calibrated else {}
    original, every = open_source(with_mean).load(torch.float32, "cpu").eval(), budgeting.calibrated_candidates
    found = {}
    for name in ("with", "without"):
        reallm.compress(with_mean, tmp_path / name, size=SIZES[0], **data)
        assert sum(nbytes_by_file(tmp_path / name).values()) <= SIZES[0]
        found[name] = divergence(original, reallm.load(tmp_path / name, dtype=torch.float32).eval())
        monkeypatch.setattr(
            budgeting,
            "calibrated_candidates",
            lambda *args: [fmt for fmt in every(*args) if not isinstance(fmt, LowRankPlus)],
        )
    assert found["with"] < (0.9 if calibrated else 0.97) * found["without"]
