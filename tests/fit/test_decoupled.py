import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, fit, relative_error
from reallm.fit.decoupled import optimal_compensation
from reallm.fit.objective import COMPENSATION_DAMPING
from reallm.formats import from_spec
from reallm.formats.decoupled import remaining_positions

SHAPE = (48, 96)
UNIFORM = {"format": "uniform", "bits": 2, "group_size": 32}
BASES = [
    UNIFORM,
    {"format": "codebook", "index_bits": 6, "vector_dim": 2, "group_size": 32},
    {"format": "rotated", "base": {"format": "e8", "bits": 2}},
]
KINDS = ["columns", "rows", "entries"]


def matrix(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def hessian(tokens=400, rank=24):
    """A few strong directions, and columns of different size."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, SHAPE[1], generator=generator)
    inputs = mixed + torch.randn(tokens, SHAPE[1], generator=generator)
    inputs = inputs * (0.2 + torch.rand(SHAPE[1], generator=generator))
    return inputs.T @ inputs / tokens


def decoupled(kind, base=UNIFORM, share=0.05, **fields):
    return from_spec({"format": "decoupled", "kind": kind, "share": share, "base": base, **fields})


def with_outliers(kind):
    """One column, one row, or 1 % of the entries are 30 times as large as the rest."""
    weight = matrix()
    if kind == "entries":
        weight.view(-1)[::97] *= 30
    else:
        weight[(slice(None), 7) if kind == "columns" else (7,)] *= 30
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_outliers_are_found_and_kept(kind, precision):
    weight, fmt = with_outliers(kind), decoupled(kind, share=0.02, precision=precision)
    large = weight.abs() > 10
    decoded = fmt.decode(fit(fmt, weight), SHAPE)
    assert relative_error(weight[large][None], decoded[large][None]) < 1e-3
    base = from_spec(UNIFORM)
    alone = base.decode(fit(base, weight), SHAPE)
    assert relative_error(weight[~large][None], decoded[~large][None]) < 0.8 * relative_error(
        weight[~large][None], alone[~large][None]
    )


# After a rotation of the outputs no row stands out.
@pytest.mark.parametrize(
    ("kind", "base"),
    [(kind, base) for kind in KINDS for base in BASES if (kind, base["format"]) != ("rows", "rotated")],
)
def test_what_is_kept_lowers_the_output_error(kind, base):
    objective = Objective.output_error(hessian())
    errors = []
    for fmt in (from_spec(base), decoupled(kind, base)):
        errors.append(objective.error(matrix(), fmt.decode(fit(fmt, matrix(), objective), SHAPE)))
    # Rows of one size: 5 % of them apart leave 95 % of the error.
    assert errors[1] < (0.97 if kind == "rows" else 0.85) * errors[0]


def test_the_objective_of_the_rest_is_what_is_left_after_the_best_answer():
    objective, error = Objective.output_error(hessian()), matrix()
    kept = torch.tensor([3, 40, 41, 90])
    rest = remaining_positions(kept, SHAPE[1])
    answered = torch.zeros(SHAPE)
    answered[:, rest] = error[:, rest]
    answered[:, kept] = -(error[:, rest].double() @ objective.compensation(kept, rest)).float()
    cost = objective.error(answered, torch.zeros(SHAPE))
    # The damping, 1 % of the mean, makes the answer a little smaller than the best.
    inside = objective.schur_complement(kept, rest).error(error[:, rest], torch.zeros(SHAPE[0], len(rest)))
    assert inside == pytest.approx(cost, rel=0.01)
    silent = answered.clone()
    silent[:, kept] = 0
    assert cost < 0.9 * objective.error(silent, torch.zeros(SHAPE))


def test_entries_answer_as_least_squares_do():
    second, error = hessian(), matrix()
    free = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.1
    free[0] = False
    error = error.masked_fill(free, 0)
    found = optimal_compensation(error, free, second)
    damped = second + COMPENSATION_DAMPING * second.diagonal().mean() * torch.eye(SHAPE[1])
    for row in range(0, SHAPE[0], 7):
        own = free[row]
        expected = torch.linalg.solve(damped[own][:, own].double(), (damped[own] @ error[row]).double())
        torch.testing.assert_close(found[row][own].double(), expected, rtol=1e-3, atol=1e-4)
        assert not found[row][~own].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_keeps_the_places(kind):
    fmt = decoupled(kind)
    first = fit(fmt, matrix())
    assert torch.equal(fit(fmt, matrix(5), start=first).positions, first.positions)
    assert not torch.equal(fit(fmt, matrix(5)).positions, first.positions)


def test_what_cannot_be_kept_is_named():
    with pytest.raises(FormatError, match="share=1.5"):
        decoupled("columns", share=1.5)
    with pytest.raises(FormatError, match="kind='cells'"):
        decoupled("cells")
    with pytest.raises(FormatError, match="precision='int4'"):
        decoupled("rows", precision="int4")
    with pytest.raises(FormatError, match=r"kind='rows' leaves nothing of a \(1, 8\) matrix"):
        decoupled("rows").check((1, 8))


def test_so_many_columns_are_kept_that_vectors_of_eight_fill_the_rest():
    counts = [decoupled("columns", share=share).num_outliers((576, 576)) for share in (0.001, 0.005, 0.01, 0.03)]
    assert counts == [1, 3, 8, 16]
    assert decoupled("entries", share=0.01).num_outliers((576, 576)) == 3318
    assert decoupled("columns", share=0.9).num_outliers((3, 4)) == 3
