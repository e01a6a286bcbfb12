import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, fit, relative_error
from reallm.fit.scaled import balancing_scales, moving_gain
from reallm.formats import from_spec

SHAPE = (48, 96)
ROTATED = {"format": "rotated", "base": {"format": "e8", "bits": 2}}


def weight_of_unequal_columns():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator) * torch.exp(torch.randn(SHAPE[1], generator=generator) / 1.5)


def inputs_that_meet_small_weights(weight):
    """A hessian as trained layers have it: inputs are large where weights are small."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, SHAPE[1], generator=generator) / weight.square().mean(0).sqrt()
    return inputs.T @ inputs / 400


def test_balanced_rows_and_columns_have_one_size():
    generator = torch.Generator().manual_seed(0)
    weight = weight_of_unequal_columns() * torch.exp(torch.randn(SHAPE[0], 1, generator=generator) / 2)
    rows, columns = balancing_scales(weight)
    energy = (weight / rows / columns).square()
    for dim in (0, 1):
        assert (energy.mean(dim) / energy.mean() - 1).abs().max() < 0.1


def test_rows_are_left_alone_when_only_inputs_are_scaled():
    rows, columns = balancing_scales(weight_of_unequal_columns(), both=False)
    assert torch.equal(rows, torch.ones(SHAPE[0], 1))
    assert columns.square().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sides", ["both", "inputs"])
def test_scales_lower_the_output_error_behind_a_rotation(sides):
    weight = weight_of_unequal_columns()
    objective = Objective.output_error(inputs_that_meet_small_weights(weight))
    errors = []
    for spec in (ROTATED, {"format": "scaled", "sides": sides, "base": ROTATED}):
        fmt = from_spec(spec)
        errors.append(objective.error(weight, fmt.decode(fit(fmt, weight, objective), SHAPE)))
    assert errors[1] < 0.7 * errors[0]


def test_the_objective_of_scaled_columns_costs_the_same_error_alike():
    weight, sizes = weight_of_unequal_columns(), torch.linspace(0.5, 2, SHAPE[1])
    off = weight + torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for objective in (
        Objective.output_error(inputs_that_meet_small_weights(weight)),
        Objective.relative_columns(weight),
    ):
        scaled = objective.divide_columns(sizes)
        assert scaled.error(weight / sizes, off / sizes) == pytest.approx(objective.error(weight, off), rel=1e-4)


def test_a_column_a_million_times_smaller_is_not_lost():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 1e-6
    fine = {"format": "uniform", "bits": 8, "group_size": 1, "scales": "float16"}
    fmt = from_spec({"format": "scaled", "base": fine})
    decoded = fmt.decode(fit(fmt, weight), SHAPE)
    assert relative_error(weight[:, 3:4], decoded[:, 3:4]) < 0.01


@pytest.mark.parametrize("sides", ["outputs", "both"])
def test_errors_move_to_the_rows_that_cost_little(sides):
    weight = weight_of_unequal_columns()
    cost = torch.exp(2 * torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(3)))
    hessian, losses = inputs_that_meet_small_weights(weight), []
    fmt = from_spec({"format": "scaled", "sides": sides, "base": ROTATED})
    for rows in (None, cost):
        objective = Objective.output_error(hessian, rows)
        decoded = fmt.decode(fit(fmt, weight, objective), SHAPE)
        losses.append((cost * objective.row_errors(weight, decoded)).sum().item())
    assert losses[1] < 0.6 * losses[0]


def test_the_gain_of_moved_errors_is_foretold():
    weight = torch.randn(192, 96, generator=torch.Generator().manual_seed(0))
    cost = torch.exp(torch.randn(len(weight), generator=torch.Generator().manual_seed(3)))
    hessian, losses = inputs_that_meet_small_weights(weight), []
    for spec in (ROTATED, {"format": "scaled", "sides": "outputs", "base": ROTATED}):
        objective, fmt = Objective.output_error(hessian, cost), from_spec(spec)
        decoded = fmt.decode(fit(fmt, weight, objective), weight.shape)
        losses.append((cost * objective.row_errors(weight, decoded)).sum().item())
    assert losses[1] / losses[0] == pytest.approx(moving_gain(weight, cost, cost), rel=0.15)


def test_a_side_that_is_none_is_refused():
    with pytest.raises(FormatError, match="sides='rows' is not one of both, inputs, outputs"):
        from_spec({"format": "scaled", "sides": "rows", "base": ROTATED})
