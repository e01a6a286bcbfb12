import pytest
import torch

import reallm.fit.low_rank as module
from reallm.fit import Objective, fit, squared_error
from reallm.fit.low_rank import low_rank
from reallm.formats.codebook import Codebook
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.normal_float import NormalFloat
from reallm.formats.uniform import Uniform


def matrix(rows, columns, seed=0, decay=0.97):
    """A matrix with falling singular values, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return left * decay ** torch.arange(size) @ right.T


def best_error(weight, rank):
    return torch.linalg.svdvals(weight.double())[rank:].square().sum().item()


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (30, 300), (64, 64)])
@pytest.mark.parametrize("rank", [1, 8, 30])
def test_it_is_as_good_as_the_exact_decomposition(shape, rank):
    weight = matrix(*shape)
    left, right = low_rank(weight, rank)
    assert left.shape == (shape[0], rank) and right.shape == (shape[1], rank)
    assert squared_error(weight, left @ right.T) <= best_error(weight, rank) * 1.01 + 1e-9


def test_a_flat_spectrum_costs_a_few_percent_at_most():
    weight = torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(weight, 16)
    assert squared_error(weight, left @ right.T) <= best_error(weight, 16) * 1.03


def test_a_rank_above_the_matrix_rank_leaves_no_error():
    weight = matrix(200, 150)[:, :3] @ torch.randn(3, 150, generator=torch.Generator().manual_seed(1))
    left, right = low_rank(weight, 10)
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    assert squared_error(weight, left @ right.T) < 1e-6 * weight.square().sum()


def test_zero_stays_zero():
    left, right = low_rank(torch.zeros(100, 90), 4)
    assert torch.equal(left @ right.T, torch.zeros(100, 90))


def test_a_warm_start_is_no_worse():
    weight = matrix(200, 160)
    _, right = low_rank(weight, 8)
    left, again = low_rank(weight, 8, start=right)
    assert squared_error(weight, left @ again.T) <= best_error(weight, 8) * 1.01


@pytest.mark.parametrize(
    "base", [Uniform(bits=2, group_size=32), NormalFloat(bits=3, group_size=32), Codebook(index_bits=4, vector_dim=2)]
)
@pytest.mark.parametrize("factors", ["bfloat16", "int8"])
def test_a_residual_never_makes_a_format_worse(base, factors):
    for seed, decay in ((0, 0.9), (1, 0.99), (2, 1.0)):
        weight = matrix(96, 64, seed, decay)
        fmt = LowRankPlus(base=base, rank=4, factors=factors)
        alone = squared_error(weight, base.decode(fit(base, weight), (96, 64)))
        assert squared_error(weight, fmt.decode(fit(fmt, weight), (96, 64))) <= alone


def test_the_best_iterate_is_kept(monkeypatch):
    """Each error of the loop is recorded: what comes out has the least of them."""
    errors, original = [], Objective.error

    def recorded(objective, weight, approximation):
        errors.append(original(objective, weight, approximation))
        return errors[-1]

    monkeypatch.setattr(Objective, "error", recorded)
    for seed in range(4):
        errors.clear()
        weight, fmt = matrix(64, 96, seed, 0.99), LowRankPlus(base=NormalFloat(bits=2, group_size=32), rank=6)
        unpacked = fit(fmt, weight, seed=seed)
        error = squared_error(weight, fmt.decode(unpacked, (64, 96)))
        assert len(errors) >= 2
        assert error <= min(errors) * (1 + module._LEAST_GAIN) / (1 - module._LEAST_GAIN)


def test_alternating_is_better_than_one_round():
    weight, base = matrix(96, 96, decay=0.95), NormalFloat(bits=2, group_size=32)
    fmt = LowRankPlus(base=base, rank=8)
    once = base.decode(fit(base, weight), (96, 96))
    left, right = low_rank(weight - once, 8)
    assert squared_error(weight, fmt.decode(fit(fmt, weight), (96, 96))) < squared_error(weight, once + left @ right.T)
