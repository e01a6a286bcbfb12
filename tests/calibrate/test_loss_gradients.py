import pytest
import torch

from reallm.calibrate import loss_gradients as gradients
from reallm.calibrate.block_loader import decoder_blocks
from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.calibrate.loss_gradients import block_gradients, curvatures, guidance
from reallm.errors import SourceError
from reallm.source import walk


def windows(count=3, context=12):
    return torch.randint(2, 250, (count, context), generator=torch.Generator().manual_seed(0))


def blocks_of(model):
    return [matrix for matrix in walk(model).matrices if matrix.kind == "block"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_token_weights_are_squared_gradients_of_the_loss(family, build):
    model = build(family)
    matrix = next(m for m in blocks_of(model) if m.expert is None)
    found = guidance(model, windows(), blocks_of(model), "cpu")
    outputs = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        outputs.append(output)

    hook = model.get_submodule(matrix.name).register_forward_hook(keep)
    model(windows(), labels=windows(), use_cache=False).loss.backward()
    hook.remove()
    expected = outputs[0].grad.square().mean(-1)
    torch.testing.assert_close(found[matrix.name].tokens, expected / expected.mean(), rtol=1e-3, atol=1e-5)


def test_the_last_token_of_a_window_predicts_nothing_and_has_weight_zero(build):
    model = build("llama")
    found = guidance(model, windows(), blocks_of(model), "cpu")
    assert len(found) == len(blocks_of(model))
    assert all((own.tokens[:, -1] == 0).all() for name, own in found.items() if "layers.1.mlp" in name)


def draws(numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def gradients_by_autograd(model, ids, loss_mask, generators):
    """Return (windows, blocks, context, hidden) gradients of the log-likelihood of sampled tokens, by mask."""
    outputs = []

    def keep(_module, _inputs, output):
        states = output if isinstance(output, torch.Tensor) else output[0]
        states.retain_grad()
        outputs.append(states)

    hooks = [block.register_forward_hook(keep) for block in decoder_blocks(model)]
    log_probs = model(ids, use_cache=False).logits.log_softmax(-1)
    for hook in hooks:
        hook.remove()
    loss = 0
    for own, there, generator in zip(log_probs, loss_mask, generators, strict=True):
        own = own[:-1][there[1:]]
        below = torch.rand(len(own), 1, generator=generator) < own.detach().exp().cumsum(-1)
        loss = loss - own.gather(1, below.int().argmax(1, keepdim=True)).sum()
    loss.backward()
    return torch.stack([states.grad for states in outputs], 1)


def gradients_of_blocks(model, ids, loss_mask, generators):
    found = []
    block_gradients(model, ids, loss_mask, "cpu", generators, lambda _, own: found.append(own))
    return torch.stack(found)


EVERY = torch.ones(3, 12, dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_block_gradients_are_those_of_the_likelihood_of_sampled_tokens(family, build):
    model = build(family)
    found = gradients_of_blocks(model, windows(), EVERY, draws(range(3)))
    expected = gradients_by_autograd(model, windows(), EVERY, draws(range(3)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_only_answers_are_predicted_where_the_loss_mask_selects_them(build):
    model, answers = build("llama"), EVERY.clone()
    answers[:, :8] = False
    found = gradients_of_blocks(model, windows(), answers, draws(range(3)))
    expected = gradients_by_autograd(model, windows(), answers, draws(range(3)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert (found[:, 0, 0] != 0).any() and (
        found[:, -1, :7] == 0
    ).all()  # at the first block also the tokens that answers attend to
    assert (gradients_of_blocks(model, windows(), EVERY & False, draws(range(3))) == 0).all()


def test_blocks_that_return_tuples_have_the_gradients_of_blocks_that_return_tensors(build):
    model = build("llama")
    plain = gradients_of_blocks(model, windows(), EVERY, draws(range(3)))
    for block in decoder_blocks(model)[:-1]:
        block.register_forward_hook(lambda _m, _i, output: (output, None))
    for block in decoder_blocks(model)[1:]:
        block.register_forward_pre_hook(lambda _m, inputs: (inputs[0][0], *inputs[1:]))
    assert torch.equal(plain, gradients_of_blocks(model, windows(), EVERY, draws(range(3))))


def test_nothing_of_the_model_is_changed(build):
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guidance(model, windows(), blocks_of(model), "cpu")
    gradients_of_blocks(model, windows(), EVERY, draws(range(3)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_weighted_second_moments_are_sums_over_weighted_tokens(build):
    model = build("llama")
    matrices = [m for m in blocks_of(model) if m.block == 0]
    weights = guidance(model, windows(), matrices, "cpu")
    tokens = {name: own.tokens for name, own in weights.items()}
    second_moments = HiddenStateCache(model, windows(), "cpu").second_moments(matrices, tokens)
    seen = []
    hook = model.get_submodule(matrices[0].name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(windows(), use_cache=False)
    hook.remove()
    rows = seen[0].reshape(-1, 64) * tokens[matrices[0].name].reshape(-1, 1).sqrt()
    torch.testing.assert_close(second_moments.get(matrices[0].name), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    assert second_moments.leaders[matrices[1].name] == matrices[1].name  # weights differ, so nothing is shared


def without_gradient(model, name, factor):
    """Detach the module's output (no factor), or multiply its gradient by the factor."""

    def detached(_module, _inputs, output):
        if factor is None:
            return output.detach()
        output = output.clone()
        output.register_hook(lambda gradient: gradient * factor)
        return output

    return model.get_submodule(name).register_forward_hook(detached)


@pytest.mark.parametrize("factor", [None, 0.0, float("nan"), float("inf")], ids=["none", "zero", "nan", "inf"])
def test_modules_without_a_usable_gradient_are_omitted(build, factor):
    model = build("llama")
    name = "model.layers.0.self_attn.v_proj"
    matrices = [m for m in blocks_of(model) if m.name in (name, "model.layers.1.mlp.up_proj")]
    without_gradient(model, name, factor)
    found = {}
    curvatures(model, windows(), matrices, "cpu", lambda path, curvature: found.update({path: curvature}))
    for names in (guidance(model, windows(), matrices, "cpu"), found):
        assert set(names) == {"model.layers.1.mlp.up_proj"}


def test_block_gradients_that_are_not_finite_become_zeros(build):
    model = build("llama")
    decoder_blocks(model)[0].register_forward_hook(lambda _m, _i, output: output * 1.0)
    without_gradient(model, "model.layers.1", float("nan"))
    found = gradients_of_blocks(model, windows(), EVERY, draws(range(3)))
    assert torch.isfinite(found).all() and (found[:, 0] == 0).all()


def test_logits_that_are_not_finite_raise_one_error(build):
    model = build("llama")
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: output * float("inf"))
    with pytest.raises(SourceError, match="logits are NaN or infinite .* compress without --calibration"):
        guidance(model, windows(), blocks_of(model), "cpu")


def test_targets_are_sampled_by_their_probabilities_in_any_vocabulary():
    for size in (5, 256, 700):
        probabilities = torch.rand(40, size, generator=torch.Generator().manual_seed(size)).softmax(1)
        uniform = torch.linspace(0.001, 0.999, 40)[:, None]
        expected = torch.searchsorted(probabilities.double().cumsum(1), uniform.double())[:, 0]
        assert (gradients._sample_targets(probabilities, uniform) - expected).abs().max() <= 1


def test_lower_triangles_give_the_whole_sums():
    rows = torch.randn(50, 500, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(500, 500)
    gradients._add_lower(total, rows)
    torch.testing.assert_close(gradients._symmetric(total), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_fast_products_restores_the_precision():
    before = torch.get_float32_matmul_precision()
    with gradients.fast_products("cpu"):
        pass
    assert torch.get_float32_matmul_precision() == before
