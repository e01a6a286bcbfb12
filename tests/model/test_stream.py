import pytest
import torch

from reallm.model import open_source, walk
from reallm.model.stream import Stream

FAMILIES = ["llama", "tied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "opt", "neox"]


def windows(count=5, context=12):
    return torch.randint(2, 250, (count, context), generator=torch.Generator().manual_seed(0))


def block_matrices(model, number):
    return [m for m in walk(model).matrices if m.kind == "block" and m.block == number]


@pytest.fixture(params=FAMILIES)
def dense(request, build):
    return build(request.param)


def inputs_seen(model, name, ids):
    """What a module is fed in a plain forward pass of the whole model."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])


@pytest.mark.parametrize("per_pass", [1 << 20, 24])
def test_moments_are_those_of_a_plain_forward_pass_in_every_family(dense, per_pass, monkeypatch):
    monkeypatch.setattr("reallm.model.stream.TOKENS_PER_PASS", per_pass)
    stream = Stream(dense, windows(), "cpu")
    assert len(stream.blocks) == 2
    for number in range(2):
        matrices = block_matrices(dense, number)
        moments = stream.moments(matrices)
        for matrix in matrices:
            if matrix.expert is None:
                inputs = inputs_seen(dense, matrix.name, windows())
                torch.testing.assert_close(
                    moments.of(matrix.name), inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4
                )
            else:
                assert moments.of(matrix.name) is None
        stream.advance()


def test_matrices_that_are_fed_the_same_share_one_sum(build):
    dense = build("llama")
    moments = Stream(dense, windows(), "cpu").moments(block_matrices(dense, 0))
    assert sorted(name.rpartition(".")[2] for name in moments.sums) == ["down_proj", "gate_proj", "o_proj", "q_proj"]
    assert len(moments.leader_of) == 7


def test_sums_that_are_taken_are_those_that_are_there_and_are_kept_no_longer(build):
    dense = build("llama")
    moments = Stream(dense, windows(), "cpu").moments(block_matrices(dense, 0))
    names = list(moments.leader_of)
    expected = {name: moments.of(name) for name in names}
    assert all(torch.equal(moments.take(name), expected[name]) for name in names)
    assert not moments.sums and moments.take(names[0]) is None


def test_a_replaced_block_carries_the_inputs_of_the_next(build):
    dense = build("llama")
    stream = Stream(dense, windows(), "cpu")
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    stream.advance()
    matrix = block_matrices(dense, 1)[0]
    inputs = inputs_seen(dense, matrix.name, windows())
    torch.testing.assert_close(
        stream.moments([matrix]).of(matrix.name), inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4
    )


def test_a_module_that_was_not_asked_for_has_no_moments(build):
    dense = build("llama")
    assert Stream(dense, windows(), "cpu").moments([]).of("model.layers.0.mlp.up_proj") is None


def test_a_model_without_blocks_is_refused(tiny_llama):
    from reallm.errors import SourceError

    model = open_source(tiny_llama).load(torch.float32, "cpu")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(SourceError, match="no list of decoder blocks"):
        Stream(model, windows(), "cpu")
