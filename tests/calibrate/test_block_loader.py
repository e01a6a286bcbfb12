"""A dense model, loaded block by block."""

import gc
import weakref

import pytest
import torch

from reallm.calibrate.block_loader import BlockLoader
from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.source import open_source

FAMILIES = ["llama", "tied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "opt", "neox"]
WINDOWS = torch.randint(2, 250, (5, 12), generator=torch.Generator().manual_seed(0))


def in_memory(module):
    return sum(parameter.nbytes for parameter in module.parameters() if not parameter.is_meta)


def states_at(stream, block_loader=None):
    """Return the hidden states before each block and after the last."""
    found = [torch.cat(stream.states)]
    for number in range(len(stream.blocks)):
        if block_loader:
            block_loader.load_block(number)
        stream.advance()
        if block_loader:
            block_loader.unload_block(number)
        found.append(torch.cat(stream.states))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_with_a_block_loader_equal_those_of_the_whole_model_bit_for_bit(original, family, dtype):
    source = open_source(original(family))
    block_loader = BlockLoader(source, dtype)
    whole = HiddenStateCache(source.load(dtype, "cpu").eval(), WINDOWS, "cpu")
    expected, found = (
        states_at(whole),
        states_at(HiddenStateCache(block_loader.model, WINDOWS, "cpu", block_loader=block_loader), block_loader),
    )
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_a_model_computes_equal_those_of_a_loaded_one(original, family):
    source = open_source(original(family))
    loaded = dict(source.load(torch.bfloat16, "cpu").named_buffers())
    ours = dict(BlockLoader(source, torch.bfloat16).model.named_buffers())
    assert list(ours) == list(loaded)
    persistent = set(source.names())
    for name in set(ours) - persistent:
        assert ours[name].dtype == loaded[name].dtype and torch.equal(ours[name], loaded[name]), name


def test_one_block_at_a_time_is_in_memory(original):
    source = open_source(original("llama"))
    block_loader = BlockLoader(source, torch.float32)
    outside_blocks = (
        block_loader.model.get_input_embeddings().weight.nbytes + block_loader.model.model.norm.weight.nbytes
    )
    assert in_memory(block_loader.model) == outside_blocks  # no lm_head: no block needs it
    blocks = block_loader.model.model.layers
    block_loader.load_block(1)
    assert in_memory(blocks[0]) == 0 and in_memory(blocks[1]) == sum(p.nbytes for p in blocks[1].parameters())
    weight = weakref.ref(blocks[1].mlp.up_proj.weight)
    block_loader.unload_block(1)
    gc.collect()
    assert in_memory(block_loader.model) == outside_blocks and weight() is None


def test_weights_have_the_dtypes_of_a_loaded_model(original):
    for family in ("llama", "mixtral"):
        source = open_source(original(family))
        block_loader, loaded = BlockLoader(source, torch.bfloat16), source.load(torch.bfloat16, "cpu")
        block_loader.load_block(0)
        for name, parameter in loaded.named_parameters():
            ours = block_loader.model.get_parameter(name)
            assert ours.dtype == parameter.dtype and (ours.is_meta or torch.equal(ours, parameter)), name


def test_tensors_shared_by_several_blocks_stay_in_memory_with_their_changes(original, monkeypatch):
    """A model whose second block uses a matrix of the first, as families with recurrent depth do."""
    from reallm.calibrate import block_loader as loader_module

    init_empty = loader_module.init_empty_model

    def sharing(config, dtype):
        model = init_empty(config, dtype)
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    monkeypatch.setattr(loader_module, "init_empty_model", sharing)
    source = open_source(original("llama"))
    block_loader = BlockLoader(source, torch.float32)
    shared = [layer.mlp.up_proj.weight for layer in block_loader.model.model.layers]
    assert shared[0] is shared[1] and not shared[0].is_meta
    with torch.no_grad():
        shared[0].mul_(2)
    for number in (0, 1):
        block_loader.load_block(number)
        block_loader.unload_block(number)
    again = block_loader.model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(again, 2 * source.read("model.layers.0.mlp.up_proj.weight"))
