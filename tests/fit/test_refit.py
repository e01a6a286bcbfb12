import dataclasses

import pytest
import torch

from reallm.fit import Objective, fit
from reallm.fit.refit import refit
from reallm.formats import from_spec

SHAPE = (24, 64)
CODEBOOK = {"format": "codebook", "index_bits": 4, "vector_dim": 2, "group_size": 0, "scales": "float16"}
TABLE = {"format": "trellis", "bits": 2, "state_bits": 8, "table_bits": 6}
ADDITIVE = {"format": "additive", "books": 3, "index_bits": 3}
CASES = [
    (CODEBOOK, ["codebook"]),
    (CODEBOOK, ["scales"]),
    ({**CODEBOOK, "vector_dim": 1}, ["codebook"]),
    (TABLE, ["table"]),
    (ADDITIVE, ["codebooks"]),
    (ADDITIVE, ["scales"]),
    ({"format": "rotated", "base": CODEBOOK}, ["base.codebook"]),
    ({"format": "low_rank_plus", "rank": 2, "base": CODEBOOK}, ["left", "base.codebook"]),
]


def weight(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def correlated(rank=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, rank, generator=generator) @ torch.randn(rank, SHAPE[1], generator=generator)
    inputs = inputs + torch.randn(300, SHAPE[1], generator=generator)
    return Objective.output_error(inputs.T @ inputs / 300)


def uneven():
    return Objective(0.1 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)))


def errors_of(spec, names, objective, target):
    """Before and after, from parts that were fitted to another weight by the plain error."""
    fmt = from_spec(spec)
    unpacked = fit(fmt, weight())
    after = refit(fmt, unpacked, target, objective, names)
    return [objective.error(target, fmt.decode(some, SHAPE)) for some in (unpacked, after)]


@pytest.mark.parametrize(("spec", "names"), CASES)
@pytest.mark.parametrize("objective", [correlated(), uneven()], ids=["hessian", "importance"])
def test_a_refit_lowers_the_error_of_what_it_was_not_fitted_to(spec, names, objective):
    before, after = errors_of(spec, names, objective, weight() * 1.2 + 0.3 * weight(7))
    assert after < 0.97 * before


@pytest.mark.parametrize(("spec", "names"), CASES)
def test_a_second_refit_never_raises_the_error_and_keeps_what_it_cannot_better(spec, names):
    fmt, objective, target = from_spec(spec), correlated(), weight(7)
    unpacked = [refit(fmt, fit(fmt, weight()), target, objective, names)]
    for _ in range(4):
        unpacked.append(refit(fmt, unpacked[-1], target, objective, names))
    errors = [objective.error(target, fmt.decode(some, SHAPE)) for some in unpacked]
    assert errors == sorted(errors, reverse=True)


def test_a_refit_is_the_least_squares_solution():
    """Against a dense solve of the normal equations, column by column of the decoder's matrix."""
    fmt, objective, target = from_spec({**ADDITIVE, "books": 1}), correlated(), weight(7)
    unpacked = fit(fmt, weight())
    size = unpacked.codebooks.numel()
    columns = [
        fmt.decode(dataclasses.replace(unpacked, codebooks=unit.view(unpacked.codebooks.shape)), SHAPE)
        for unit in torch.eye(size)
    ]
    decoder = torch.stack(columns).double().flatten(1)
    weighted = (decoder.view(size, *SHAPE) @ objective.hessian.double()).flatten(1)
    best = torch.linalg.lstsq(weighted @ decoder.T, weighted @ target.double().flatten()).solution
    least = objective.error(target, (best @ decoder).view(SHAPE).float())
    found = refit(fmt, unpacked, target, objective, ["codebooks"], steps=200)
    assert objective.error(target, fmt.decode(found, SHAPE)) < least * (1 + 1e-5)


@pytest.mark.parametrize(("spec", "names"), CASES)
def test_refitted_parts_are_those_of_the_file(spec, names):
    fmt = from_spec(spec)
    unpacked = refit(fmt, fit(fmt, weight()), weight(7), correlated(), names)
    again = fmt.unpack(fmt.pack(unpacked, SHAPE), SHAPE)
    assert torch.equal(fmt.decode(unpacked, SHAPE), fmt.decode(again, SHAPE))


def test_entries_that_no_code_uses_stay_where_they_are():
    fmt = from_spec({**CODEBOOK, "index_bits": 3})
    unpacked = fit(fmt, weight())
    unpacked = dataclasses.replace(unpacked, codes=unpacked.codes.clamp(max=4))
    after = refit(fmt, unpacked, weight(), correlated(), ["codebook"])
    assert torch.equal(after.codebook[5:], unpacked.codebook[5:])
    assert not torch.equal(after.codebook[:5], unpacked.codebook[:5])


def test_a_refit_keeps_the_parts_where_rounding_takes_the_gain():
    fmt = from_spec(CODEBOOK)
    unpacked = fit(fmt, weight())
    target = fmt.decode(unpacked, SHAPE)
    assert refit(fmt, unpacked, target, correlated(), ["codebook"]) is unpacked


@pytest.mark.parametrize("spec", [CODEBOOK, {**CODEBOOK, "vector_dim": 1}, TABLE, ADDITIVE])
def test_with_a_hessian_float_parts_and_codes_move_in_turn(spec, monkeypatch):
    """Against the same fit without its alternation: feedback alone."""
    fmt, objective = from_spec(spec), correlated()
    errors = [objective.error(weight(), fmt.decode(fit(fmt, weight(), objective), SHAPE))]
    for module in ("kmeans", "trellis", "additive"):
        monkeypatch.setattr(f"reallm.fit.{module}.alternate", lambda fmt, unpacked, *_: unpacked)
    errors.append(objective.error(weight(), fmt.decode(fit(fmt, weight(), objective), SHAPE)))
    assert errors[0] < 0.95 * errors[1]


def test_the_same_parts_come_out_of_every_run():
    fmt, objective = from_spec(ADDITIVE), correlated()
    first, second = (fmt.pack(fit(fmt, weight(), objective), SHAPE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
