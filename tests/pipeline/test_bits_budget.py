"""Plans from one number: bits per block weight."""

import pytest

from reallm.allocate import MatrixInfo
from reallm.allocate.candidates import data_free_candidates
from reallm.allocate.options import matrix_options
from reallm.allocate.recipe import DEFAULT_EMBEDDING
from reallm.allocate.sensitivity import sensitivity
from reallm.errors import RecipeError
from reallm.fit import gaussian_error
from reallm.pipeline import byte_budget

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "up": (1536, 576), "down": (576, 1536)}
MODEL = [
    MatrixInfo("embed", (1000, 576), "embedding", "embedding"),
    *(MatrixInfo(f"{b}.{role}", shape, role, "block", b) for b in range(6) for role, shape in SHAPES.items()),
]


def error_of(fmt):
    """A stand-in for measuring: a quarter for every bit."""
    return 4.0 ** -fmt.bits_per_weight((256, 256))


def plan_for_bits(bits, matrices, measure, rank=None, embedding=DEFAULT_EMBEDDING):
    def loss(matrix, fmt):
        same_role = sum(other.weights for other in matrices if other.role == matrix.role)
        return matrix.weights / same_role * sensitivity(matrix, fmt, 6) * measure(fmt)

    ends = {"embedding": embedding}
    options = matrix_options(matrices, lambda _: data_free_candidates(), loss, lambda *_: 1.0, rank, ends)
    return byte_budget.plan_for_bits(matrices, options, bits, f"{bits:g} bits")


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("bits", [1.5, 2.0, 2.2, 3.0, 3.1415, 4.0, 7.9, 10.0, 13.0, 15.5, 16.0])
def test_bits_are_met_within_one_percent_and_never_exceeded(bits, rank):
    plan = plan_for_bits(bits, MODEL, error_of, rank)
    assert 0.99 * bits <= plan.block_bits <= bits


def test_a_model_of_few_matrices_is_met_too():
    for bits in (3.0, 5.0, 9.0, 11.0, 14.0, 15.5):
        assert 0.99 * bits <= plan_for_bits(bits, MODEL[1:7], error_of).block_bits <= bits


def test_sensitive_roles_get_more_bits():
    # Measured errors: the stand-in takes a codebook's own bytes for precision.
    plan = plan_for_bits(3.0, MODEL, gaussian_error)

    def mean(role):
        entries = [e for e in plan.entries if e.matrix.role == role]
        return sum(e.fmt.bits_per_weight(e.matrix.shape) for e in entries) / len(entries)

    assert mean("v") > mean("q") and mean("down") > mean("q")


def test_more_bits_never_cost_more_predicted_error():
    errors = []
    for bits in (2.0, 3.0, 4.0, 6.0):
        plan = plan_for_bits(bits, MODEL, error_of)
        errors.append(sum(error_of(e.fmt) * e.matrix.weights for e in plan.entries if e.matrix.kind == "block"))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [0.0, 0.5, 17.0, float("nan"), float("inf"), -3.0])
def test_impossible_bits_name_the_possible_range(bits):
    with pytest.raises(RecipeError, match=r"give a value between 1\.\d\d and 16\.00$"):
        plan_for_bits(bits, MODEL, error_of)


def test_no_block_matrices_are_refused():
    with pytest.raises(RecipeError, match="no block matrix is left"):
        plan_for_bits(3.0, MODEL[:1], error_of)


def test_a_rank_above_every_side_asks_for_a_lower_one():
    with pytest.raises(RecipeError, match="lower --rank"):
        plan_for_bits(3.0, MODEL, error_of, rank=1000)


def test_the_embedding_takes_nothing_from_the_budget():
    kept = plan_for_bits(3.0, MODEL, error_of, embedding="keep")
    assert kept.entries == plan_for_bits(3.0, MODEL, error_of).entries[1:]
