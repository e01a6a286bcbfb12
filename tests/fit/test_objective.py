import pytest
import torch

from reallm.fit import Objective, fit
from reallm.formats import from_spec

SHAPE = (48, 64)
CODEBOOK = {"format": "codebook", "index_bits": 6, "vector_dim": 2, "group_size": 16}
FORMATS = [
    CODEBOOK,
    {**CODEBOOK, "vector_dim": 1, "index_bits": 3},
    {"format": "low_rank_plus", "rank": 4, "base": CODEBOOK},
    {"format": "gain", "base": CODEBOOK},
]


def weight_with_small_columns():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[:, ::8] *= 0.1
    return weight


@pytest.mark.parametrize("spec", FORMATS)
def test_a_fit_lowers_the_objective_it_is_given(spec):
    weight, fmt = weight_with_small_columns(), from_spec(spec)
    objective = Objective.relative_columns(weight)
    errors = [objective.error(weight, fmt.decode(fit(fmt, weight, o), SHAPE)) for o in (objective, None)]
    assert errors[0] < 0.7 * errors[1]


def test_plain_is_the_squared_error():
    weight = weight_with_small_columns()
    assert Objective.plain(weight).error(weight, weight * 0) == pytest.approx(weight.square().sum().item(), rel=1e-5)


def test_relative_columns_weigh_every_column_alike():
    weight = weight_with_small_columns()
    energy = Objective.relative_columns(weight).importance * weight.square().mean(0)
    assert (energy / energy.mean() - 1).abs().max() < 0.2  # the floor takes a little from the small ones


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.eye(8)[:4] * 1e-20, torch.eye(8)[:4] * 1e4])
def test_importance_is_finite_and_positive_for_any_weight(weight):
    importance = Objective.relative_columns(weight).importance
    assert torch.isfinite(importance).all() and (importance > 0).all()


def test_a_residual_approximates_important_columns_better():
    weight = weight_with_small_columns()
    fmt = from_spec({"format": "low_rank_plus", "rank": 8, "base": {"format": "uniform", "bits": 1, "group_size": 0}})
    objective = Objective.relative_columns(weight)
    errors = [objective.error(weight, fmt.decode(fit(fmt, weight, o), SHAPE)) for o in (objective, None)]
    assert errors[0] < errors[1]


def test_a_gathered_objective_follows_its_columns():
    """Fitting the reordered weight with the reordered objective is fitting the permuted format."""
    weight = weight_with_small_columns()
    order = weight.square().sum(0).argsort(descending=True, stable=True)
    fmt, base = from_spec({"format": "permuted", "base": CODEBOOK}), from_spec(CODEBOOK)
    objective = Objective.relative_columns(weight)
    unpacked = fit(fmt, weight, objective)
    alone = fit(base, weight[:, order], Objective(objective.importance[:, order]))
    assert torch.equal(unpacked.base.codes, alone.codes)
