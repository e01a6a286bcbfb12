"""Codewords made by a net: better than a table of the same bytes, trained by what errors cost, shared or not."""

import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, capture_fit_input, fit, relative_error, train_shared_decoder
from reallm.fit.neural_codebook import refine_decoder
from reallm.formats import from_spec, parameters, use_shared_decoders

SHAPE = (96, 256)


def gaussian(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(spec, weight, objective=None):
    fmt = from_spec(spec)
    shape = tuple(weight.shape)
    return relative_error(weight, fmt.decode(fit(fmt, weight, objective), shape)), fmt.nbytes(shape)


def test_a_net_beats_every_stored_table_of_no_more_bytes():
    weight = gaussian()
    error, nbytes = error_of({"format": "codeword", "index_bits": 10}, weight)
    for bits in (4, 5, 6, 7):
        table = {"format": "additive", "books": 1, "index_bits": bits, "vector_dim": 8}
        other, table_bytes = error_of(table, weight)
        assert table_bytes > nbytes or other > 1.1 * error
    assert error_of({**table, "index_bits": 6}, weight)[1] < nbytes  # some of them were compared


def test_a_net_of_one_wide_digit_is_a_plain_codebook():
    weight = gaussian()
    spec = {"format": "codeword", "index_bits": 6, "digit_bits": 6, "hidden": 0, "decoder_bits": 16}
    error, _ = error_of(spec, weight)
    table, _ = error_of({"format": "additive", "books": 1, "index_bits": 6, "vector_dim": 8}, weight)
    assert error < 1.02 * table


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_every_parameter_is_stored_in_its_bits(bits):
    fmt = from_spec({"format": "codeword", "index_bits": 8, "decoder_bits": bits})
    count, layout = fmt.net.parameters, fmt.layout(SHAPE)
    assert layout["decoder.codes"].nbytes == -(-count * bits // 8)
    assert layout["decoder.scales"].nbytes == -(-count // parameters.GROUP)
    digits, width = 2 * 15, 8 + 32
    assert count == digits * width + width + 32 * 8  # biases are among them


def test_training_knows_that_parameters_will_be_rounded():
    weight, spec = gaussian(), {"format": "codeword", "index_bits": 8, "decoder_bits": 3}
    fine = from_spec({**spec, "decoder_bits": 16})
    unpacked = fit(fine, weight)
    values = parameters.values(16, unpacked.decoder, fine.net.parameters)
    coarse = from_spec(spec)
    rounded = fit(parameters.storage(3), values[None])
    vectors = (weight / unpacked.scales).view(-1, 8)
    after = torch.cdist(vectors, coarse.codebook(rounded)).amin(1).square().sum()
    aware = torch.cdist(vectors, coarse.codebook(fit(coarse, weight).decoder)).amin(1).square().sum()
    assert aware < 0.98 * after


def test_columns_that_cost_more_are_met_better():
    weight = gaussian()
    importance = torch.ones(1, SHAPE[1])
    importance[:, ::2] = 30.0
    fmt = from_spec({"format": "codeword", "index_bits": 8})
    errors = [
        (weight - fmt.decode(fit(fmt, weight, objective), SHAPE)).square()[:, ::2].mean()
        for objective in (None, Objective(importance))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_error_feedback_lowers_the_error_of_outputs():
    weight = gaussian()
    inputs = gaussian(1, (600, SHAPE[1])) @ gaussian(2, (SHAPE[1], SHAPE[1])) / 16
    objective = Objective.output_error(inputs.T @ inputs / 600)
    fmt = from_spec({"format": "codeword", "index_bits": 8})
    plain, fed_back = (fmt.decode(fit(fmt, weight, o), SHAPE) for o in (Objective(objective.importance), objective))
    assert objective.error(weight, fed_back) < 0.8 * objective.error(weight, plain)


def test_a_shared_decoder_serves_matrices_of_all_sizes_of_weights_and_is_nobodys_bytes():
    spec = {"format": "permuted", "base": {"format": "codeword", "index_bits": 8, "shared": "all"}}
    fmt, own = from_spec(spec), from_spec({**spec, "base": {**spec["base"], "shared": ""}})
    weights = [gaussian(seed) * size for seed, size in enumerate((1e-3, 1.0, 50.0))]
    fit_inputs = [capture_fit_input(fmt, weight, Objective.plain(weight), 0) for weight in weights]
    inside = fit_inputs[0].fmt
    with use_shared_decoders({"all": inside.pack_decoder(train_shared_decoder(inside, fit_inputs, "cpu"))}):
        errors = [relative_error(weight, fmt.decode(fit(fmt, weight), SHAPE)) for weight in weights]
    alone = relative_error(weights[1], own.decode(fit(own, weights[1]), SHAPE))
    assert all(error < 1.2 * alone for error in errors)
    assert own.nbytes(SHAPE) - fmt.nbytes(SHAPE) == sum(
        t.nbytes for t in inside.shared_decoders()["all"].layout.values()
    )


def test_a_shared_decoder_that_nobody_trained_is_named():
    with pytest.raises(FormatError, match="'nothing' is not loaded"):
        fit(from_spec({"format": "codeword", "index_bits": 5, "shared": "nothing"}), gaussian())


@pytest.mark.parametrize(
    "field", [{"index_bits": 17}, {"vector_dim": 3}, {"digit_bits": 0}, {"hidden": 500}, {"decoder_bits": 5}]
)
def test_a_field_out_of_range_is_named_with_its_value(field):
    ((name, value),) = field.items()
    with pytest.raises(FormatError, match=f"{name}={value}"):
        from_spec({"format": "codeword", **field})


def test_the_net_itself_answers_for_errors_of_outputs():
    weight = gaussian()
    inputs = gaussian(1, (600, SHAPE[1])) @ gaussian(2, (SHAPE[1], SHAPE[1])) / 16
    objective = Objective.output_error(inputs.T @ inputs / 600)
    fmt = from_spec({"format": "codeword", "index_bits": 6})
    unpacked = fit(fmt, weight, Objective(objective.importance))
    moved = refine_decoder(fmt, unpacked, weight, objective)
    before, after = (objective.error(weight, fmt.decode(p, SHAPE)) for p in (unpacked, moved))
    assert torch.equal(moved.codes, unpacked.codes) and after < 0.99 * before
