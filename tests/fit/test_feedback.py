import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, fit
from reallm.fit.feedback import coordinate_descent_pass, damped_cholesky, feedback, inverse_cholesky
from reallm.formats import from_spec

SHAPE = (48, 96)
CODEBOOK = {"format": "codebook", "index_bits": 6, "vector_dim": 2, "group_size": 32}
FORMATS = [
    {"format": "uniform", "bits": 3, "group_size": 32},
    {"format": "uniform", "bits": 3, "group_size": 32, "symmetric": True},
    {"format": "normal_float", "bits": 3, "group_size": 0},
    CODEBOOK,
    {**CODEBOOK, "vector_dim": 8, "index_bits": 6},
    {"format": "low_rank_plus", "rank": 4, "base": CODEBOOK},
    {"format": "permuted", "base": CODEBOOK},
    {"format": "gain", "base": CODEBOOK},
    {"format": "rotated", "base": CODEBOOK},
    {"format": "additive", "books": 3, "index_bits": 4},
    {"format": "additive", "books": 2, "index_bits": 3, "vector_dim": 4, "group_size": 10},
]


def weight(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def hessian_of(columns=SHAPE[1], tokens=400, rank=24):
    """Inputs as layers have them: a few strong directions, and columns of different size."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    inputs = (mixed + torch.randn(tokens, columns, generator=generator)) * (
        0.2 + torch.rand(columns, generator=generator)
    )
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("spec", FORMATS)
def test_feedback_lowers_the_error_of_the_outputs(spec):
    fmt, objective = from_spec(spec), Objective.output_error(hessian_of())
    errors = [
        objective.error(weight(), fmt.decode(fit(fmt, weight(), given), SHAPE))
        for given in (objective, Objective(objective.importance))
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("spec", FORMATS[:3])
def test_levels_span_less_than_their_group_only_where_a_hessian_asks_for_it(spec):
    fmt, objective = from_spec(spec), Objective.output_error(hessian_of())
    narrow, whole = (fit(fmt, weight(), given).scales.abs() for given in (objective, Objective(objective.importance)))
    assert torch.equal(whole, fit(fmt, weight()).scales.abs())
    assert narrow.mean() < 0.97 * whole.mean()


@pytest.mark.parametrize("columns", [1, 7, 96, 130, 257])
@pytest.mark.parametrize("dim", [1, 4])
def test_any_number_of_columns_has_feedback(columns, dim):
    fmt = from_spec({**CODEBOOK, "vector_dim": dim, "index_bits": 5})
    objective = Objective.output_error(hessian_of(columns))
    unpacked = fit(fmt, weight((8, columns)), objective)
    assert unpacked.codes.shape == (8, -(-columns // dim))
    assert objective.error(weight((8, columns)), fmt.decode(unpacked, (8, columns))) < objective.error(
        weight((8, columns)), torch.zeros(8, columns)
    )


def test_feedback_is_the_textbook_loop():
    """GPTQ as it is written down: the inverse hessian, updated by elimination after every column."""
    values, hessian = weight((8, 20)), hessian_of(20).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    moving, inverse = values.double().clone(), torch.linalg.inv(hessian)
    expected = torch.zeros(8, 20)
    for j in range(20):
        expected[:, j] = moving[:, j].round()
        error = (moving[:, j] - moving[:, j].round()) / inverse[j, j]
        moving -= error[:, None] * inverse[j]
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]
    found = feedback(values, Rounding(), hessian_of(20), act_order=False)
    assert torch.equal(found.float(), expected)


class Rounding:
    width = 1

    def encode(self, columns, start, importance):
        return columns.round().int(), columns.round()


def test_blocks_go_by_falling_importance_and_leave_their_codes_in_place():
    """The order is that of the hessian's diagonal: rounding reordered columns from left to right is the same."""
    values, hessian = weight((8, 20)), hessian_of(20)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    found = feedback(values, Rounding(), hessian)
    expected = feedback(values[:, order], Rounding(), hessian[order][:, order], act_order=False)
    assert torch.equal(found[:, order], expected)


def test_without_correlation_feedback_is_rounding():
    assert torch.equal(feedback(weight(), Rounding(), torch.eye(96)), weight().round().int())


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(96, 96),
        torch.ones(96, 96),  # rank 1
        hessian_of() * 1e-25,
        hessian_of() * 1e25,
        torch.diag(torch.tensor([1e8, *[1.0] * 95])),  # one channel with huge activations
        torch.diag(torch.tensor([0.0] * 40 + [1.0] * 56)),  # dead inputs
        hessian_of(tokens=3),  # far fewer tokens than columns
    ],
)
def test_no_hessian_breaks_a_fit(hessian):
    for spec in FORMATS:
        fmt = from_spec(spec)
        decoded = fmt.decode(fit(fmt, weight(), Objective.output_error(hessian)), SHAPE)
        assert torch.isfinite(decoded).all()
        assert (weight() - decoded).square().mean() < 4


def test_a_huge_channel_does_not_spoil_the_others():
    """Damping is a share of the mean diagonal: one channel must not switch feedback off for the rest."""
    hessian = hessian_of()
    hessian[0, 0] = 1e6
    fmt, others = from_spec(FORMATS[0]), Objective.output_error(hessian[1:, 1:].clone())
    found = fmt.decode(fit(fmt, weight(), Objective.output_error(hessian)), SHAPE)
    rounded = fmt.decode(fit(fmt, weight()), SHAPE)
    assert others.error(weight()[:, 1:], found[:, 1:]) < 0.75 * others.error(weight()[:, 1:], rounded[:, 1:])


def test_inputs_that_overflowed_are_named():
    with pytest.raises(FormatError, match="calibration inputs"):
        Objective.output_error(torch.full((4, 4), float("inf")))


def test_factors_are_those_of_the_damped_hessian():
    hessian = hessian_of(rank=4).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    upper, lower = inverse_cholesky(hessian_of(rank=4)).double(), damped_cholesky(hessian_of(rank=4)).double()
    torch.testing.assert_close(lower @ lower.T, damped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(96).double(), rtol=1e-4, atol=1e-4)


def test_the_residual_in_closed_form_is_the_best_one():
    """Its error by the hessian is that of the truncated SVD of W·root, which no other factors beat."""
    objective = Objective.output_error(hessian_of())
    zeros = {"format": "low_rank_plus", "rank": 4, "base": {"format": "uniform", "bits": 1, "group_size": 0}}
    fmt = from_spec(zeros)
    unpacked = fit(fmt, weight(), objective)
    remainder = weight() - fmt.base.decode(unpacked.base, SHAPE)
    root = damped_cholesky(objective.hessian)
    best = torch.linalg.svdvals(remainder @ root)[4:].square().sum()
    found = ((remainder - unpacked.left @ unpacked.right.T) @ root).square().sum()
    assert found < 1.01 * best


def test_sweeps_lower_the_error_of_feedback_until_no_block_can_do_better():
    values, objective = weight((8, 130)), Objective.output_error(hessian_of(130))
    codes = feedback(values, Rounding(), objective.hessian)
    errors = [objective.error(values, codes.float())]
    for _ in range(20):
        codes, decoded = coordinate_descent_pass(values, Rounding(), objective.hessian, codes, codes.float())
        assert torch.equal(codes.float(), decoded)
        errors.append(objective.error(values, decoded))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.99 * errors[0] and errors[-1] == errors[-2]


def test_a_sweep_ends_where_no_single_code_can_be_changed_for_the_better():
    values, objective = weight((3, 12)), Objective.output_error(hessian_of(12))
    codes = feedback(values, Rounding(), objective.hessian)
    for _ in range(20):
        codes, _ = coordinate_descent_pass(values, Rounding(), objective.hessian, codes, codes.float())
    least = objective.error(values, codes.float())
    for row, column, change in ((r, c, d) for r in range(3) for c in range(12) for d in (-1, 1)):
        other = codes.clone()
        other[row, column] += change
        assert objective.error(values, other.float()) >= least * (1 - 1e-6)


@pytest.mark.parametrize("columns", [1, 7, 37])
def test_a_narrow_last_block_and_tiles_of_rows_are_swept_too(columns):
    """Rows of tiles keep or change their codes together."""
    fmt = from_spec({"format": "trellis", "bits": 2, "state_bits": 6, "table_bits": 4, "tile_columns": 8})
    values, objective = weight((40, columns)), Objective.output_error(hessian_of(columns))
    unpacked = fit(fmt, values, objective)
    assert unpacked.codes.shape == (2, -(-columns // 8) * 256)
    rounded = fit(fmt, values, Objective(objective.importance))
    errors = [objective.error(values, fmt.decode(some, (40, columns))) for some in (unpacked, rounded)]
    assert errors[0] < errors[1]
