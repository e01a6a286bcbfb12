"""Matrices of numbers beyond float16: formats with bfloat16 in its place hold them in as many bytes."""

import pytest
import torch

from reallm.fit import fit, relative_error
from reallm.formats import from_spec
from reallm.formats.range import is_beyond_float16, ordinary_magnitude, with_wide_range

SHAPE = (32, 64)
WITH_FLOAT16 = [
    {"format": "uniform", "bits": 4},
    {"format": "uniform", "bits": 4, "symmetric": True},
    {"format": "normal_float", "bits": 4, "scales": "float16"},
    {"format": "codebook", "index_bits": 4, "scales": "float16"},
    {"format": "additive", "books": 2, "index_bits": 4, "vector_dim": 4},
    {"format": "dense", "dtype": "float16"},
    {"format": "low_rank_plus", "rank": 2, "factors": "int8", "base": {"format": "uniform", "bits": 3}},
    {"format": "decoupled", "base": {"format": "uniform", "bits": 3}},
    {"format": "rotated", "base": {"format": "uniform", "bits": 3}},
]


def weight():
    return 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def error(fmt, matrix):
    parts = fit(fmt, matrix, seed=0)
    return relative_error(matrix, fmt.decode(fmt.unpack(fmt.pack(parts, SHAPE), SHAPE), SHAPE))


@pytest.mark.parametrize("spec", WITH_FLOAT16, ids=lambda spec: spec["format"])
def test_a_format_of_wide_range_holds_what_float16_loses_in_as_many_bytes(spec):
    fmt = from_spec(spec)
    wide = with_wide_range(fmt)
    assert wide != fmt and wide.nbytes(SHAPE) == fmt.nbytes(SHAPE)
    usual = error(fmt, weight())
    for size in (2.0**-23, 2.0**25):
        assert error(wide, size * weight()) < 1.2 * usual + 1e-4


def test_formats_without_float16_stay_as_they_are():
    for spec in ({"format": "codebook", "index_bits": 4}, {"format": "dense"}, {"format": "trellis", "bits": 2}):
        assert with_wide_range(from_spec(spec)) == from_spec(spec)


def test_what_is_beyond_float16():
    some_tiny_rows = weight()
    some_tiny_rows[:4] *= 1e-6
    for matrix in (1e-5 * weight(), 1e7 * weight(), 1e-28 * weight(), some_tiny_rows):
        assert is_beyond_float16(matrix)
    with_a_dead_row = torch.randn(256, 8)
    with_a_dead_row[0] *= 1e-9
    for matrix in (weight(), 0.01 * weight(), 1e4 * weight(), torch.zeros(SHAPE), with_a_dead_row):
        assert not is_beyond_float16(matrix)


def test_an_ordinary_magnitude_is_near_one_by_a_power_of_two():
    for size in (1e-28, 1e-7, 1.0, 1e12):
        scaled = ordinary_magnitude(size * weight())
        assert 0.7 < scaled.square().mean().sqrt() < 1.5
        assert ((scaled / (size * weight()))[0, 0].log2() % 1).item() in (0, pytest.approx(1, abs=1e-5))
