import pytest
import torch

from reallm.fit import Objective, fit, relative_error
from reallm.formats.codebook import Codebook
from reallm.formats.gain import Gain
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.normal_float import NormalFloat

SHAPE = (40, 64)
BASES = [
    NormalFloat(bits=2, group_size=0, scales="float16"),
    NormalFloat(bits=3, group_size=32),
    Codebook(index_bits=5, vector_dim=2, group_size=64),
    LowRankPlus(base=NormalFloat(bits=2, group_size=32), rank=3),
]


def weight(spread):
    """Rows whose sizes spread over a factor of about exp(2 · spread)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator) * torch.exp(spread * torch.randn(SHAPE[0], 1, generator=generator))


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("base", BASES, ids=lambda fmt: fmt.name)
def test_a_gain_never_makes_a_format_worse(base, spread):
    plain = relative_error(weight(spread), base.decode(fit(base, weight(spread)), SHAPE))
    fmt = Gain(base=base)
    # The gain itself is rounded to bfloat16: 2^-9 of a row, squared.
    assert relative_error(weight(spread), fmt.decode(fit(fmt, weight(spread)), SHAPE)) <= plain * 1.001 + 2**-18


def test_a_gain_is_positive_where_the_base_has_the_sign_right():
    unpacked = fit(Gain(base=BASES[1]), weight(1.0))
    assert (unpacked.gain > 0).all()


def test_zero_rows_stay_zero():
    rows = weight(1.0)
    rows[::3] = 0
    fmt = Gain(base=BASES[1])
    assert not fmt.decode(fit(fmt, rows), SHAPE)[::3].any()


def test_a_gain_keeps_what_error_feedback_gained():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 8, generator=generator) @ torch.randn(8, SHAPE[1], generator=generator)
    inputs = inputs + 0.3 * torch.randn(400, SHAPE[1], generator=generator)
    objective, rows = Objective.output_error(inputs.T @ inputs / 400), weight(0.5)
    errors = [
        objective.error(rows, fmt.decode(fit(fmt, rows, objective), SHAPE)) for fmt in (BASES[1], Gain(base=BASES[1]))
    ]
    assert errors[1] < 1.001 * errors[0]
