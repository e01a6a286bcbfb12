"""Trainable tensors: from every format, and back into it."""

import copy

import pytest
import torch

import reallm
from reallm.errors import RecipeError
from reallm.formats import example_formats, fake_quantize, from_spec, known_formats, named_tensors, replace_tensors
from reallm.hf import DECODE_PER_USE, load
from reallm.source import walk
from reallm.source.walk import meta_model
from reallm.tuning.trainables import TrainableWeight, choose, power_of_two_unit, trainable_roles

TRELLIS = {"format": "trellis", "bits": 2, "state_bits": 8}
SHAPE = (40, 64)
COMPOSED = [
    {"format": "gain", "base": {"format": "rotated", "base": TRELLIS}},
    {"format": "low_rank_plus", "rank": 2, "base": {"format": "rotated", "base": {"format": "e8", "bits": 2}}},
    {"format": "low_rank_plus", "rank": 2, "base": {"format": "entropy_coded", "bits": 5, "largest": 15}},
    {"format": "scaled", "base": {"format": "decoupled", "share": 0.1, "base": {"format": "rotated", "base": TRELLIS}}},
    {"format": "decoupled", "kind": "rows", "precision": "bfloat16", "share": 0.1, "base": TRELLIS},
    {"format": "rotated", "base": {"format": "codeword", "index_bits": 6, "hidden": 2, "decoder_bits": 3}},
    {"format": "permuted", "base": {"format": "codeword", "index_bits": 6, "hidden": 2, "decoder_bits": 16}},
]
FORMATS = [fmt for cls in known_formats().values() for fmt in example_formats(cls)] + [from_spec(s) for s in COMPOSED]


def fits(fmt):
    try:
        fmt.check(SHAPE)
    except ValueError:
        return False
    return True


CASES = [pytest.param(fmt, id=f"{number}-{fmt.name}") for number, fmt in enumerate(FORMATS) if fits(fmt)]
# With module scope all tests of one format run in sequence in one process and share its fit.
each_format = pytest.mark.parametrize("fmt", CASES, scope="module")


@pytest.fixture(scope="module")
def stored_of(fitted):
    """stored_of(fmt): the packed tensors of a random matrix; each call returns a copy."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.1
    return lambda fmt: fmt.pack(fitted(fmt, weight), SHAPE)


def trainable_of(fmt, stored, chosen=None, constant_dtype=torch.float32):
    names = list(trainable_roles(fmt, stored, SHAPE)) if chosen is None else chosen
    return TrainableWeight(fmt, SHAPE, stored, names, constant_dtype)


def perturb(trainable_weight, size=0.05):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_weight.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return trainable_weight


def packed(fmt, stored, trainable_weight):
    return fmt.pack(replace_tensors(fmt.unpack(stored, SHAPE), trainable_weight.export_tensors()), SHAPE)


def test_every_format_is_tried():
    assert {case.values[0].name for case in CASES} == set(known_formats())


@each_format
def test_every_float_part_has_the_name_and_the_role_it_is_stored_under(stored_of, fmt):
    assert set(trainable_roles(fmt, stored := stored_of(fmt), SHAPE)) <= set(stored)


@each_format
@pytest.mark.parametrize("constant_dtype", [torch.float32, None])
def test_before_training_it_decodes_to_the_same_matrix_and_packs_to_the_same_bytes(stored_of, fmt, constant_dtype):
    stored = stored_of(fmt)
    trainable_weight = trainable_of(fmt, stored, constant_dtype=constant_dtype)
    torch.testing.assert_close(trainable_weight(), fmt.decode(fmt.unpack(stored, SHAPE), SHAPE), rtol=1e-5, atol=1e-7)
    again = packed(fmt, stored, trainable_weight)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


@each_format
def test_every_chosen_part_has_a_gradient(stored_of, fmt):
    trainable_weight = trainable_of(fmt, stored_of(fmt))
    trainable_weight().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable_weight.parameters())


@each_format
def test_what_is_trained_on_is_what_the_file_decodes_to_and_it_is_no_larger(stored_of, fmt):
    stored = stored_of(fmt)
    trainable_weight = perturb(trainable_of(fmt, stored))
    written = packed(fmt, stored, trainable_weight)
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
    torch.testing.assert_close(trainable_weight(), fmt.decode(fmt.unpack(written, SHAPE), SHAPE), rtol=1e-5, atol=1e-6)


@each_format
def test_rounding_alone_does_what_packing_does(stored_of, fmt):
    stored = stored_of(fmt)
    trainable_weight = perturb(trainable_of(fmt, stored), size=1.0)  # large enough that unsigned scales fall below 0
    back = named_tensors(fmt.unpack(packed(fmt, stored, trainable_weight), SHAPE))
    for name in trainable_weight.units:
        assert torch.equal(fake_quantize(fmt, name, trainable_weight.trained_tensor(name), SHAPE), back[name].float())


@each_format
def test_parts_that_grew_beyond_what_is_stored_come_back_as_finite_numbers(stored_of, fmt):
    stored = stored_of(fmt)
    trainable_weight = perturb(trainable_of(fmt, stored), size=1e30)
    unpacked = named_tensors(fmt.unpack(packed(fmt, stored, trainable_weight), SHAPE))
    assert all(torch.isfinite(part).all() for part in unpacked.values())


@each_format
def test_one_part_alone_trains_and_the_rest_stays(stored_of, fmt):
    stored = stored_of(fmt)
    first, *others = trainable_roles(fmt, stored, SHAPE)
    # Large enough that a 3-bit value changes its level.
    trainable_weight = perturb(trainable_of(fmt, stored, chosen=[first]), size=0.5)
    written = fmt.unpack(packed(fmt, stored, trainable_weight), SHAPE)
    before, after = named_tensors(fmt.unpack(stored, SHAPE)), named_tensors(written)
    assert not torch.equal(before[first], after[first])
    assert all(torch.equal(before[name], after[name]) for name in others)
    torch.testing.assert_close(trainable_weight(), fmt.decode(written, SHAPE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", COMPOSED[:3])
def test_what_no_trained_part_changes_is_decoded_once(stored_of, spec, monkeypatch):
    fmt = from_spec(spec)
    trainable_weight = trainable_of(fmt, stored_of(fmt))
    base = fmt.base.base if fmt.base.name == "rotated" else fmt.base
    monkeypatch.setattr(type(base), "decode", lambda *_: pytest.fail("decoded again"))
    trainable_weight().sum().backward()


def test_units_are_powers_of_two_near_the_size():
    assert power_of_two_unit(torch.full((3,), 0.3)) == 0.25 and power_of_two_unit(torch.tensor([-7.0])) == 8.0
    assert power_of_two_unit(torch.zeros(4)) > 0


def parts_of(compressed, train):
    model = load(compressed, DECODE_PER_USE, dtype=torch.float32)
    walked = walk(meta_model(copy.deepcopy(model.config)))
    dtypes = {unquantized.name: torch.float32 for unquantized in walked.unquantized}
    return choose(model, walked, dtypes, train, constant_dtype=torch.float32)


@pytest.mark.parametrize(
    ("train", "endings"),
    [
        (("residual",), {"left", "right"}),
        (("gains",), {"gain"}),
        (("codebooks",), {"codebook"}),
        (("norms",), {"weight"}),
        (("scales",), {"scales"}),
    ],
)
def test_words_name_what_trains_and_nothing_else_has_a_gradient(compressed, train, endings):
    chosen = parts_of(compressed, train)
    assert {name.rpartition(".")[2] for name in chosen.parameters} == endings
    assert sum(chosen.counts.values()) == sum(p.numel() for p in chosen.parameters.values())
    trained = {id(p) for p in chosen.parameters.values()}
    assert {id(p) for p in chosen.model.parameters() if p.requires_grad} == trained


def test_the_embedding_trains_only_if_named(compressed):
    assert not any("embed" in name for name in parts_of(compressed, ("scales",)).parameters)
    assert any("embed" in name for name in parts_of(compressed, ("scales", "embedding")).parameters)


def test_a_residual_of_the_embedding_trains_only_with_the_embedding(tiny_llama, tmp_path):
    residual = {"format": "low_rank_plus", "rank": 1, "factors": "int8", "base": {"format": "uniform", "bits": 4}}
    reallm.compress(tiny_llama, tmp_path / "out", recipe="rtn3", embedding=residual)
    assert set(parts_of(tmp_path / "out", ("residual", "embedding")).parameters) == {
        f"model.embed_tokens.{side}" for side in ("left", "right")
    }
    assert set(parts_of(tmp_path / "out", ("residual", "norms")).counts) == {"norms"}
    with pytest.raises(RecipeError, match="this model has none of them; it has norms"):
        parts_of(tmp_path / "out", ("residual",))


def test_a_model_without_the_parts_named_says_what_it_has(compressed):
    with pytest.raises(RecipeError, match="this model has none of them; it has codebooks, gains, norms"):
        parts_of(compressed, ("outliers",))
