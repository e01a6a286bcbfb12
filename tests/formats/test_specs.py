import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import fit
from reallm.formats import from_spec
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.normal_float import NormalFloat, normal_levels
from reallm.formats.uniform import Uniform

BAD_SPECS = {
    "unknown format 'nf5'; known formats: additive, codebook, codeword": {"format": "nf5"},
    "unknown field 'bit'": {"format": "uniform", "bit": 3},
    "bits='3' is not of type int": {"format": "uniform", "bits": "3"},
    "bits=True is not of type int": {"format": "uniform", "bits": True},
    "bits=0 is not in 1": {"format": "uniform", "bits": 0},
    "bits=17 is not in 1": {"format": "normal_float", "bits": 17},
    "group_size=-1 is negative": {"format": "uniform", "bits": 3, "group_size": -1},
    "scales='fp8' is not one of": {"format": "normal_float", "bits": 3, "scales": "fp8"},
    "vector_dim=3 is not one of": {"format": "codebook", "index_bits": 4, "vector_dim": 3},
    "index_bits=17 is not in": {"format": "codebook", "index_bits": 17},
    "rank=0 is not positive": {"format": "low_rank_plus", "rank": 0, "base": {"format": "dense"}},
    "method='random' is not one of": {"format": "permuted", "method": "random", "base": {"format": "dense"}},
    "dtype='int4' is not one of": {"format": "dense", "dtype": "int4"},
    "missing": {"format": "uniform"},
    "mapping with the key 'format'": "uniform",
}


@pytest.mark.parametrize(("message", "spec"), BAD_SPECS.items(), ids=list(BAD_SPECS))
def test_a_bad_spec_is_named_with_its_value(message, spec):
    with pytest.raises(FormatError) as error:
        from_spec(spec)
    assert message in str(error.value)


def test_a_rank_above_the_matrix_is_refused_with_the_shape():
    fmt = LowRankPlus(base=Uniform(bits=3), rank=9)
    with pytest.raises(FormatError, match=r"rank=9 exceeds the smaller side of a \(8, 64\) matrix"):
        fmt.check((8, 64))


def test_four_bit_levels_are_those_of_qlora():
    # Appendix E of arXiv:2305.14314 lists the sixteen values; ours come from the rule behind them.
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    torch.testing.assert_close(torch.tensor(normal_levels(4)), torch.tensor(published), atol=2e-4, rtol=0)


def test_bits_per_weight_counts_two_level_scales():
    # 4 bits + 8/64 for the scale + 32/(64·256) for the float32 of 256 scales.
    assert NormalFloat(bits=4, group_size=64).bits_per_weight((576, 1536)) == pytest.approx(4.127, abs=1e-3)


def test_the_largest_weight_of_a_group_is_exact():
    weight = torch.full((1, 64), 0.01)
    weight[0, 5] = -7.0
    codebook = from_spec({"format": "codebook", "index_bits": 4})
    for fmt in (Uniform(bits=3, symmetric=True), Uniform(bits=3), NormalFloat(bits=3), codebook):
        decoded = fmt.decode(fit(fmt, weight), (1, 64))
        assert decoded[0, 5].item() == pytest.approx(-7.0, rel=2e-3)
        assert decoded[0, 6].abs().item() < 0.02


def test_dense_float16_refuses_what_it_cannot_hold():
    with pytest.raises(FormatError, match="float16 cannot hold a weight of 1e\\+06; use bfloat16"):
        fit(from_spec({"format": "dense", "dtype": "float16"}), torch.full((2, 2), 1e6))
