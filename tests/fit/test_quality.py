import json
import math
from importlib import resources

import pytest
import torch

import reallm.fit.quality as quality_module
from reallm.allocate.candidates import calibrated_candidates, data_free_candidates, neural_candidates
from reallm.cli.tables.names import short_name
from reallm.errors import FormatError
from reallm.fit import Quality, gaussian_error, gaussian_quality, relative_error
from reallm.fit.quality import gaussian, measured_gaussian_error
from reallm.formats import example_formats, from_spec, known_formats, to_spec
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.scaled import Scaled
from reallm.formats.shared_decoders import rename_shared_decoders

SHAPE = (64, 512)
# ½ log2 of how far the mean square of so many normal weights may be from 1, at four standard deviations.
NOISE_BITS = 0.5 * math.log2(1 + 4 * math.sqrt(2 / (SHAPE[0] * SHAPE[1])))
EXAMPLES = [fmt for cls in known_formats().values() for fmt in example_formats(cls)]


@pytest.mark.parametrize("fmt", EXAMPLES, ids=short_name)
def test_no_format_beats_the_shannon_bound(fmt):
    quality = gaussian_quality(fmt, SHAPE)
    assert quality.bits_per_weight == fmt.bits_per_weight(SHAPE)
    assert 0 < quality.relative_error < 1
    assert quality.gap_bits > -NOISE_BITS


def test_a_code_on_the_bound_has_no_gap():
    quality = Quality(3.0, 2.0**-6, 1.0, 1.0)
    assert quality.shannon_error == 2.0**-6 and quality.gap_bits == 0


def test_a_sign_has_the_error_that_theory_gives():
    # One bit per weight with the best level, E|x| = sqrt(2/π): the error is 1 - 2/π.
    fmt = from_spec({"format": "codebook", "index_bits": 1, "vector_dim": 1, "group_size": 0})
    weight = gaussian((64, 1024))
    best = weight.sign() * math.sqrt(2 / math.pi)
    assert relative_error(weight, best) == pytest.approx(1 - 2 / math.pi, rel=0.02)
    assert gaussian_quality(fmt, (64, 1024)).relative_error == pytest.approx(1 - 2 / math.pi, rel=0.05)


def test_the_same_seed_draws_the_same_error_and_another_another():
    fmt = from_spec({"format": "uniform", "bits": 3})
    first, again, other = (gaussian_quality(fmt, SHAPE, seed=seed).relative_error for seed in (0, 0, 1))
    assert first == again != other


def test_what_is_measured_is_what_was_stored():
    fmt = from_spec({"format": "normal_float", "bits": 8})
    assert gaussian_quality(fmt, SHAPE).relative_error < 1e-3
    assert torch.equal(gaussian(SHAPE), gaussian(SHAPE, seed=0))


def test_a_shape_that_does_not_fit_says_so():
    fmt = from_spec({"format": "low_rank_plus", "rank": 16, "base": {"format": "dense"}})
    with pytest.raises(FormatError, match="rank=16 exceeds"):
        gaussian_quality(fmt, (8, 64))


def test_the_table_of_candidates_is_what_would_be_measured_now():
    for fmt in data_free_candidates()[::9]:
        assert gaussian_error(fmt) == pytest.approx(measured_gaussian_error(fmt), rel=0.02)


def test_every_candidate_of_a_budget_is_in_the_table():
    calibrated = [f for kind in ("block", "head") for bits in (10, 12, 16) for f in calibrated_candidates(kind, bits)]
    # Scales around a format and a residual beside it change nothing on Gaussian weights: the table does not repeat it.
    plain = [fmt for fmt in calibrated if not isinstance(fmt, Scaled | LowRankPlus)]
    plain += [rename_shared_decoders(fmt, "x") for fmt in neural_candidates("block") if not isinstance(fmt, Scaled)]
    table = json.loads(resources.files("reallm.fit").joinpath("gaussian_errors.json").read_text(encoding="utf-8"))
    known = {json.dumps(row["format"]) for row in table}
    assert {json.dumps(to_spec(fmt)) for fmt in [*data_free_candidates(), *plain]} == known


def test_a_codebook_as_large_as_the_sample_would_be_is_not_taken_for_a_perfect_code():
    fmt = from_spec({"format": "codebook", "index_bits": 10, "vector_dim": 8, "group_size": 0})
    assert measured_gaussian_error(fmt) > 2.0 ** (-2 * 10 / 8)


def test_a_shared_decoder_is_measured_on_what_it_was_not_trained_on_whatever_its_name(monkeypatch):
    specs = [{"format": "codeword", "index_bits": 8, "shared": name} for name in ("", "one", "other")]
    own, one, other = (from_spec({"format": "rotated", "base": spec}) for spec in specs)
    assert gaussian_error(one) == gaussian_error(other) == pytest.approx(measured_gaussian_error(other), rel=0.02)
    monkeypatch.setattr(quality_module, "_SEEN", (64, 512))
    # On few vectors a decoder of its own learns them by overfitting; one of others cannot.
    assert measured_gaussian_error(one) > measured_gaussian_error(own)
