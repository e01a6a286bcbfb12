import pytest
import torch

from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.source import open_source, walk

FAMILIES = ["llama", "tied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "opt", "neox"]


def windows(count=5, context=12):
    return torch.randint(2, 250, (count, context), generator=torch.Generator().manual_seed(0))


def block_matrices(model, number):
    return [m for m in walk(model).matrices if m.kind == "block" and m.block == number]


@pytest.fixture(params=FAMILIES)
def dense(request, build):
    return build(request.param)


def inputs_seen(model, name, ids):
    """Return the inputs of a module in a plain forward pass of the whole model."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])


@pytest.mark.parametrize("per_pass", [1 << 20, 24])
def test_second_moments_are_those_of_a_plain_forward_pass_in_every_family(dense, per_pass, monkeypatch):
    monkeypatch.setattr("reallm.calibrate.hidden_states.TOKENS_PER_PASS", per_pass)
    stream = HiddenStateCache(dense, windows(), "cpu")
    assert len(stream.blocks) == 2
    for number in range(2):
        matrices = block_matrices(dense, number)
        second_moments = stream.second_moments(matrices)
        for matrix in matrices:
            if matrix.expert is None:
                inputs = inputs_seen(dense, matrix.name, windows())
                torch.testing.assert_close(
                    second_moments.get(matrix.name), inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4
                )
            else:
                assert second_moments.get(matrix.name) is None
        stream.advance()


def test_matrices_with_the_same_inputs_share_one_sum(build):
    dense = build("llama")
    second_moments = HiddenStateCache(dense, windows(), "cpu").second_moments(block_matrices(dense, 0))
    assert sorted(name.rpartition(".")[2] for name in second_moments.sums) == [
        "down_proj",
        "gate_proj",
        "o_proj",
        "q_proj",
    ]
    assert len(second_moments.leaders) == 7


def test_pop_returns_the_same_sums_as_get_and_removes_them(build):
    dense = build("llama")
    second_moments = HiddenStateCache(dense, windows(), "cpu").second_moments(block_matrices(dense, 0))
    names = list(second_moments.leaders)
    expected = {name: second_moments.get(name) for name in names}
    assert all(torch.equal(second_moments.pop(name), expected[name]) for name in names)
    assert not second_moments.sums and second_moments.pop(names[0]) is None


def test_a_replaced_block_computes_the_inputs_of_the_next(build):
    dense = build("llama")
    stream = HiddenStateCache(dense, windows(), "cpu")
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    stream.advance()
    matrix = block_matrices(dense, 1)[0]
    inputs = inputs_seen(dense, matrix.name, windows())
    torch.testing.assert_close(
        stream.second_moments([matrix]).get(matrix.name), inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4
    )


def test_a_module_that_was_not_asked_for_has_no_second_moments(build):
    dense = build("llama")
    assert HiddenStateCache(dense, windows(), "cpu").second_moments([]).get("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("weighted", [False, True])
def test_second_moments_of_a_16_bit_model_are_summed_in_32_bits(build, weighted):
    # 2,048 tokens: added to a sum of 256 squares, the next one is lost in bfloat16, which has 8 bits.
    dense, ids = build("llama", torch.bfloat16), windows(64, 32)
    matrix = next(m for m in block_matrices(dense, 0) if m.role == "down")
    weights = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(64, 32)
    second_moments = HiddenStateCache(dense, ids, "cpu", 4).second_moments(
        [matrix], {matrix.name: weights} if weighted else None
    )
    rows = inputs_seen(dense, matrix.name, ids).double() * weights.reshape(-1, 1).double().sqrt()
    assert second_moments.get(matrix.name).dtype == torch.float32
    torch.testing.assert_close(
        second_moments.get(matrix.name).double(), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5
    )


def test_autocast_around_a_hidden_state_cache_changes_nothing(build):
    def calibrated():
        dense = build("llama")
        stream = HiddenStateCache(dense, windows(), "cpu")
        first = stream.second_moments(matrices := block_matrices(dense, 0))
        stream.advance()
        return [*(first.get(matrix.name) for matrix in matrices), *stream.states]

    expected = calibrated()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrated()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_without_blocks_is_refused(tiny_llama):
    from reallm.errors import SourceError

    model = open_source(tiny_llama).load(torch.float32, "cpu")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(SourceError, match="no list of decoder blocks"):
        HiddenStateCache(model, windows(), "cpu")
