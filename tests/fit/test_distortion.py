"""Errors on independent normal weights that a code of its kind has to reach: what a change may not lose unseen."""

from reallm.fit import gaussian_quality
from reallm.formats import from_spec

LLOYD_MAX = 0.1175  # of the best four levels for single normal numbers, 2 bits (Max, 1960)


def error(shape, **spec):
    return gaussian_quality(from_spec(spec), shape).relative_error


def test_a_small_trellis_has_the_error_of_its_best_order_of_states():
    # 0.0798 here, 0.0794 to 0.0806 with other seeds. Other orders of the states have 0.0816 to 0.1024
    # (docs/experiments/values-of-trellis-states.md).
    assert error((64, 512), format="trellis", bits=2, state_bits=8) < 0.081


def test_a_trellis_with_more_states_has_less_error():
    errors = [error((16, 512), format="trellis", bits=2, state_bits=bits) for bits in (4, 6, 8)]
    assert LLOYD_MAX > errors[0] > 1.05 * errors[1] > 1.05**2 * errors[2]


def test_two_small_codebooks_have_less_error_than_the_best_four_levels():
    # 0.1031 here, to 0.1033 with other seeds, without refits 0.1072. So few weights are learned by overfitting in part.
    assert error((64, 512), format="additive", books=2, index_bits=4, vector_dim=4) < 0.105 < LLOYD_MAX


def test_codebooks_too_large_to_be_searched_as_one_have_the_error_of_a_wide_beam():
    # 0.0508 here, to 0.0522 with other seeds; a greedy search has 0.0590 to 0.0604.
    assert error((32, 512), format="additive", books=2, index_bits=5, vector_dim=4) < 0.055
