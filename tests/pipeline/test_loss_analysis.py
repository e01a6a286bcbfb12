"""Numbers that predict losses, against losses that are measured."""

import pytest
import torch

from reallm.allocate.loss_prediction import Analysis, kind_of_error
from reallm.calibrate.loss_gradients import curvatures
from reallm.calibrate.windows import windows_from_files
from reallm.fit import Objective, fit
from reallm.fit.feedback import costs_in_feedback, feedback, importance_in_feedback
from reallm.formats import from_spec
from reallm.hf import load_tokenizer
from reallm.pipeline.loss_analysis import compute_analysis, entropy_factor, measure_format
from reallm.source import open_source, walk


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return open_source(tiny_llama).load(torch.float32, "cpu").eval()


@pytest.fixture(scope="module")
def windows(tiny_llama, text_file):
    return windows_from_files([text_file], load_tokenizer(tiny_llama), 16, 64)


def divergence(model, windows, name, noise_of):
    """KL to the original with a disturbed matrix, nats per token."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        kept = weight.clone()
        weight += noise_of
        after = model(windows).logits.log_softmax(-1)
        weight.copy_(kept)
    return (before.exp() * (before - after)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["layers.0.self_attn.v_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj"])
def test_curvature_foretells_the_divergence_of_a_small_error(model, tiny_llama, windows, name):
    name = f"model.{name}"
    found = {}
    matrices = [m for m in walk(open_source(tiny_llama).skeleton).matrices if m.name == name]
    curvatures(model, windows, matrices, "cpu", lambda n, c: found.update({n: c}))
    weight = model.get_submodule(name).weight
    ratios = []
    for seed in range(6):
        error = 0.01 * weight.std().item() * noise(*weight.shape, seed=seed)
        outputs = ((error @ found[name].hessian) * error).sum(1)
        ratios.append((found[name].outputs @ outputs).item() / 2 / divergence(model, windows, name, error))
    assert 0.5 < sum(ratios) / 6 < 2


def test_numbers_of_the_tied_embedding_foretell_its_divergence(model, tiny_llama, windows):
    source = open_source(tiny_llama)
    walked = walk(source.skeleton)
    walked.matrices = [m for m in walked.matrices if m.kind == "embedding"]
    numbers = compute_analysis(source, walked, model, windows, "cpu", 0).numbers["model.embed_tokens"]
    weight = model.get_input_embeddings().weight
    error = 0.02 * weight.std().item() * noise(*weight.shape)
    predicted = numbers["rotated_1"] * (error.square().sum() / weight.square().sum()).item()
    assert 0.5 < predicted / divergence(model, windows, "model.embed_tokens", error) < 2


def test_costs_in_feedback_are_those_of_independent_rounding_errors():
    x = noise(500, 48, seed=1) @ noise(48, 48, seed=2)
    hessian = x.T @ x / 500
    own = costs_in_feedback(hessian, hessian, (1, 8, 16))
    damped = importance_in_feedback(hessian, 1)
    # With one order for all widths blocks of one column are answered as GPTQ does; damping is a percent of the mean.
    assert torch.allclose(own[1].sum(), damped.sum(), rtol=0.2)
    assert own[1].sum() <= own[8].sum() * 1.01 and own[8].sum() <= own[16].sum() * 1.01

    class Steps:
        width = 1

        def encode(self, columns, start, importance):
            codes = (columns / 0.05).round()
            return codes.to(torch.int32), codes * 0.05

    weight = noise(400, 48, seed=3)
    decoded = feedback(weight, Steps(), hessian) * 0.05
    error = (weight - decoded).double()
    measured = ((error @ hessian.double()) * error).sum().item()
    predicted = 400 * 0.05**2 / 12 * costs_in_feedback(hessian, hessian, (1,))[1].sum().item()
    assert 0.9 < predicted / measured < 1.1


def test_feedback_costs_more_on_other_text():
    x, y = noise(60, 48, seed=1), noise(60, 48, seed=2)
    seen, other = x.T @ x / 60, y.T @ y / 60
    assert costs_in_feedback(seen, other, (1,))[1].sum() > costs_in_feedback(seen, seen, (1,))[1].sum() * 1.5


def test_heavy_tails_take_fewer_bits_at_one_step():
    gaussian = noise(500, 500)
    assert 0.97 < entropy_factor(gaussian) < 1.03
    assert entropy_factor(gaussian**3) < 0.3
    assert entropy_factor(torch.zeros(4, 4)) == 1.0


def test_a_trial_on_some_rows_is_near_the_whole():
    weight, fmt = noise(4000, 64) * torch.linspace(0.5, 2, 4000)[:, None], from_spec({"format": "uniform", "bits": 4})
    found = measure_format(fmt, weight, 0)
    parts = fit(fmt, weight, Objective.relative_columns(weight))
    error = (weight - fmt.decode(parts, (4000, 64))).square().sum() / weight.square().sum()
    assert abs(found.error / error.item() - 1) < 0.1 and 0.8 < found.share < 1


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"format": "uniform", "bits": 3}, "grouped"),
        ({"format": "entropy_coded", "bits": 3}, "stepped"),
        ({"format": "rotated", "base": {"format": "entropy_coded", "bits": 3}}, "rotated_1"),
        ({"format": "rotated", "base": {"format": "e8"}}, "rotated_8"),
        ({"format": "rotated", "base": {"format": "trellis", "bits": 2}}, "rotated_16"),
        ({"format": "rotated", "base": {"format": "codebook", "index_bits": 6, "vector_dim": 2}}, "rotated_8"),
        (
            {"format": "scaled", "sides": "outputs", "base": {"format": "rotated", "base": {"format": "e8"}}},
            "outputs_rotated_8",
        ),
        ({"format": "scaled", "base": {"format": "uniform", "bits": 3}}, "grouped"),
        ({"format": "low_rank_plus", "rank": 2, "base": {"format": "uniform", "bits": 3}}, "grouped"),
    ],
)
def test_errors_of_formats_are_of_the_kind_that_they_spread_in(spec, kind):
    assert kind_of_error(from_spec(spec)) == kind


def test_an_analysis_survives_its_file(model, tiny_llama, windows, tmp_path):
    source = open_source(tiny_llama)
    fmt = from_spec({"format": "uniform", "bits": 4})
    found = compute_analysis(source, walk(source.skeleton), model, windows[:2], "cpu", 0, [fmt], {"source": "x"})
    assert len(found.numbers) == 15 and all(n > 0 for of in found.numbers.values() for n in of.values())
    found.save(tmp_path / "deep" / "a.json")
    assert Analysis.load(tmp_path / "deep" / "a.json") == found
    assert found.loss("model.embed_tokens", fmt, lambda _: 1 / 0) > 0, "measured, so that nothing else is asked"
