"""Shapes are types, and the tests check them: at the first calls of every test, then now and then (conftest.py)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from reallm.fit import relative_error

MATRIX, VECTOR = torch.ones(3, 2), torch.ones(3)


def refused() -> bool:
    try:
        relative_error(VECTOR, VECTOR)
    except TypeCheckError:
        return True
    return False


@pytest.mark.parametrize("again", [False, True])
def test_the_first_calls_in_a_test_are_checked_whatever_other_tests_called(again):
    assert all(refused() for _ in range(20))
    for _ in range(100):
        relative_error(MATRIX, MATRIX)


def test_of_many_calls_in_one_test_some_are_checked():
    for _ in range(100):
        relative_error(MATRIX, MATRIX)
    assert 0 < sum(refused() for _ in range(100)) < 100
