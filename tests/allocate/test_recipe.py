"""Recipes: which rule applies, errors, and the round trip from a plan."""

import pytest

from reallm.allocate import MatrixInfo, load_recipe, plan_from_recipe, recipe_of_plan, shipped_recipes
from reallm.allocate.recipe import dump_recipe, parse_recipe
from reallm.errors import FormatError, RecipeError
from reallm.formats import from_spec
from reallm.formats.low_rank_plus import LowRankPlus

MODEL = [
    MatrixInfo("embed", (100, 64), "embedding", "embedding"),
    *(
        MatrixInfo(f"layers.{block}.{name}", shape, role, "block", block)
        for block in range(3)
        for name, shape, role in (
            ("q_proj", (64, 64), "q"),
            ("v_proj", (32, 64), "v"),
            ("down_proj", (64, 96), "down"),
        )
    ),
    MatrixInfo("head", (100, 64), "head", "head"),
]


def plan(text, matrices=MODEL, **options):
    found = plan_from_recipe(parse_recipe(text, "test"), matrices, **options)
    return {entry.matrix.name: entry.fmt for entry in found.entries}


def bits(text, matrices=MODEL):
    return {name: fmt.bits for name, fmt in plan(text, matrices).items() if "layers" in name}


def uniform(number):
    return f"{{format: uniform, bits: {number}}}"


def test_the_first_matching_rule_applies():
    text = f"rules: [{{match: '*q_proj', format: {uniform(4)}}}, {{match: '*', format: {uniform(2)}}}]"
    found = bits(text)
    assert {found[f"layers.{b}.q_proj"] for b in range(3)} == {4} and found["layers.0.v_proj"] == 2


def test_every_condition_of_a_rule_must_hold():
    rule = f"{{match: ['*.0.*', '*.2.*'], role: [q, down], format: {uniform(5)}}}"
    found = bits(f"rules: [{rule}, {{format: {uniform(2)}}}]")
    assert sorted(n for n, b in found.items() if b == 5) == sorted(
        f"layers.{b}.{name}" for b in (0, 2) for name in ("q_proj", "down_proj")
    )


def test_blocks_are_counted_from_both_ends():
    found = bits(f"rules: [{{block: [0, -1], format: {uniform(5)}}}, {{format: {uniform(2)}}}]")
    assert {name.split(".")[1] for name, b in found.items() if b == 5} == {"0", "2"}
    assert set(bits(f"rules: [{{block: 1, format: {uniform(5)}}}, {{format: {uniform(2)}}}]").values()) == {5, 2}


def test_keep_leaves_a_matrix_unquantized():
    found = plan(f"rules: [{{role: v, format: keep}}, {{format: {uniform(2)}}}]\nhead: keep")
    assert len(found) == 1 + 6 and "head" not in found and found["embed"].bits == 8


def test_a_role_that_the_model_lacks_is_accepted_but_an_unknown_role_is_refused():
    assert len(plan(f"rules: [{{role: qkv, format: keep}}, {{format: {uniform(2)}}}]")) == 11
    with pytest.raises(RecipeError, match="unknown role 'query'; known roles: q, k, v"):
        plan(f"rules: [{{role: query, format: keep}}, {{format: {uniform(2)}}}]")


def test_a_matrix_without_rule_is_named_with_the_remedy():
    with pytest.raises(RecipeError, match=r"no rule for layers.0.v_proj \(role v\); end with a rule"):
        plan(f"rules: [{{role: q, format: {uniform(2)}}}]")


def test_a_pattern_that_matches_nothing_names_a_matrix_as_example():
    with pytest.raises(RecipeError, match=r"'\*x_proj' fits no matrix \(one is layers.0.q_proj\)"):
        plan(f"rules: [{{match: '*x_proj', format: keep}}, {{format: {uniform(2)}}}]")


def test_patterns_refer_to_the_whole_model_when_only_some_matrices_are_planned():
    text = f"rules: [{{match: '*v_proj', format: keep}}, {{block: -1, format: {uniform(7)}}}, {{format: {uniform(2)}}}]"
    assert {name: fmt.bits for name, fmt in plan(text, MODEL[1:2], model=MODEL).items()} == {"layers.0.q_proj": 2}


def test_a_shape_that_a_format_cannot_store_names_the_matrix():
    with pytest.raises(FormatError, match="layers.0.v_proj: low_rank_plus: rank=40"):
        plan(f"rules: [{{format: {{format: low_rank_plus, rank: 40, base: {uniform(2)}}}}}]")


def test_rank_applies_to_block_matrices_only_and_replaces_the_recipes():
    text = f"rules: [{{format: {{format: low_rank_plus, rank: 4, factors: bfloat16, base: {uniform(2)}}}}}]"
    found = plan(text, rank=2)
    assert (found["layers.0.q_proj"].rank, found["layers.0.q_proj"].factors) == (2, "bfloat16")
    assert found["embed"].name == "uniform" and plan(text, rank=0)["layers.0.q_proj"].name == "uniform"


def test_a_rank_of_none_changes_nothing():
    fmt = from_spec({"format": "uniform", "bits": 3})
    assert (
        LowRankPlus.replace_residual(fmt, None) is fmt
        and LowRankPlus.replace_residual(fmt, 0) is fmt
        and LowRankPlus.replace_residual(fmt, 5).rank == 5
    )


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_plan_written_as_a_recipe_gives_the_plan_again(name):
    wide = [MatrixInfo(m.name, (m.shape[0] * 4, m.shape[1] * 4), m.role, m.kind, m.block) for m in MODEL]
    first = plan_from_recipe(load_recipe(name), wide)
    text = dump_recipe(recipe_of_plan(first, wide))
    assert plan_from_recipe(parse_recipe(text, "again"), wide) == first


def test_a_plan_that_leaves_matrices_unquantized_round_trips():
    first = plan_from_recipe(load_recipe("rtn3"), MODEL[1:5])
    again = plan_from_recipe(parse_recipe(dump_recipe(recipe_of_plan(first, MODEL)), "again"), MODEL)
    assert again == first


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_named_like_their_files_and_described_in_a_line(name):
    from importlib import resources

    assert (resources.files("reallm.allocate") / "shipped" / f"{name}.yaml").is_file()
    assert 20 < len(shipped_recipes()[name].description) < 160


def test_a_shipped_recipe_that_is_printed_and_read_again_is_the_same():
    for recipe in shipped_recipes().values():
        assert parse_recipe(dump_recipe(recipe), "printed") == recipe
