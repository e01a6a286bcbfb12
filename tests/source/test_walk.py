"""The walk classifies the whole state dict of every family."""

import pytest
import torch

from reallm.allocate.format_plan import ROLES
from reallm.source import meta_model, walk
from reallm.source.families import matrix_role
from reallm.source.walk import experts_transposed

FAMILIES = ["llama", "tied", "qwen2", "gemma3", "phi3", "gpt2", "opt", "neox", "mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_kept_and_tied_names_are_the_whole_state_dict(family, build):
    model = build(family)
    found = walk(meta_model(model.config))
    listed = {m.parameter for m in found.matrices} | {k.name for k in found.unquantized} | set(found.tied)
    assert listed == set(model.state_dict())
    assert all(unquantized.reason for unquantized in found.unquantized)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_large_tensor_is_a_matrix_except_positions_and_routers(family, build):
    unquantized = walk(meta_model(build(family).config)).unquantized
    assert {k.reason for k in unquantized if len(k.shape) > 1} <= {"position embedding", "router", "bias"}


@pytest.mark.parametrize("family", FAMILIES)
def test_block_matrices_have_a_block_and_a_role(family, build):
    blocks = [m for m in walk(meta_model(build(family).config)).matrices if m.kind == "block"]
    assert {m.block for m in blocks} == {0, 1}
    assert "other" not in {m.role for m in blocks}
    assert {m.role for m in blocks} <= set(ROLES)


def test_tied_embedding_and_head_are_one_matrix(build):
    found = walk(meta_model(build("tied").config))
    assert [m.name for m in found.matrices if m.kind != "block"] == ["model.embed_tokens"]
    assert found.tied_heads == ["lm_head"]
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_an_untied_head_is_its_own_matrix_and_comes_last(build):
    found = walk(meta_model(build("llama").config))
    assert [m.kind for m in found.matrices if m.kind != "block"] == ["embedding", "head"]
    assert found.matrices[-1].name == "lm_head" and found.tied_heads == []


def test_conv1d_is_transposed_to_out_in(build):
    by_name = {m.name: m for m in walk(meta_model(build("gpt2").config)).matrices}
    assert by_name["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert by_name["transformer.h.0.attn.c_attn"].transposed
    assert [by_name[f"transformer.h.0.{n}"].role for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")] == [
        "qkv",
        "o",
        "fc1",
        "fc2",
    ]


def test_every_expert_is_a_matrix_and_the_router_stays_unquantized(build):
    found = walk(meta_model(build("mixtral").config))
    names = [m.name for m in found.matrices if m.expert is not None and m.block == 0]
    assert names == [f"model.layers.0.mlp.experts.{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(4)]
    assert [k.reason for k in found.unquantized if k.name == "model.layers.0.mlp.gate.weight"] == ["router"]


def test_experts_stored_as_in_out_are_transposed(build):
    expert = next(m for m in walk(meta_model(build("gpt_oss").config)).matrices if m.expert is not None)
    assert expert.transposed and expert.shape == (192, 64)


def test_a_linear_with_its_own_forward_stays_unquantized_with_the_reason(build):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("llama")
    model.model.layers[1].mlp.up_proj = Doubled(64, 96)
    reasons = {k.name: k.reason for k in walk(model).unquantized}
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "2-D parameter of Doubled"


def test_an_unknown_linear_has_the_role_other():
    assert matrix_role("model.layers.3.mixer.strange") == "other"
    assert matrix_role("model.layers.3.experts.gate_up_proj.12") == "gate_up"


def experts_of(kind, **shapes):
    module = type(kind, (torch.nn.Module,), {})()
    for name, shape in shapes.items():
        module.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    return module


@pytest.mark.parametrize(
    ("shapes", "transposed"),
    [
        ({"gate_up_proj": (4, 32, 20), "down_proj": (4, 10, 32)}, True),
        ({"gate_up_proj": (4, 20, 32), "down_proj": (4, 32, 10)}, False),
        ({"gate_up_proj": (4, 32, 32), "down_proj": (4, 16, 32)}, True),  # the first alone is ambiguous
        ({"up_proj": (4, 32, 32), "down_proj": (4, 32, 32)}, None),
        ({"up_proj": (4, 32, 8), "down_proj": (4, 32, 8)}, None),  # they contradict each other
    ],
)
def test_the_orientation_of_unknown_experts_follows_from_the_hidden_size(shapes, transposed):
    assert experts_transposed(experts_of("SomeExperts", **shapes), 32) is transposed
    assert experts_transposed(experts_of("SomeFilters", **shapes), 32) is None
