import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, fit, relative_error
from reallm.fit.e8 import E8Coder, best_scale, finalists, nearest_codes
from reallm.formats.e8 import E8, decode_codes, e8p_patterns, e8p_words, short_words

CPU = torch.device("cpu")


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error_of(fmt, weight, objective=None):
    return relative_error(weight, fmt.decode(fit(fmt, weight, objective), tuple(weight.shape)))


# The best scalar levels (Lloyd-Max) reach 0.1175, 0.0345 and 0.0095.
@pytest.mark.parametrize(("bits", "bar"), [(2, 0.0920), (3, 0.0290), (4, 0.0079)])
def test_gaussian_weights_cost_less_than_with_the_best_scalar_levels(bits, bar):
    assert error_of(E8(bits), gaussian(128, 512)) < bar


def test_the_words_are_different_points_of_the_shifted_lattice():
    words = e8p_words(CPU)
    assert len(words.unique(dim=0)) == 65536
    points = words - 0.25
    whole, half = ((points - points.round()) == 0).all(1), ((points - 0.5 - (points - 0.5).round()) == 0).all(1)
    assert (whole | half).all() and (points.sum(1) % 2 == 0).all()


def test_patterns_are_the_shortest():
    norms = e8p_patterns(CPU).square().sum(1)
    assert len(e8p_patterns(CPU).unique(dim=0)) == 256
    assert [int((norms == norm).sum()) for norm in (2, 4, 6, 8, 10, 12)] == [1, 8, 28, 64, 126, 29]


def test_short_words_are_the_shortest_of_the_lattice():
    words = short_words(CPU)
    assert len(words.unique(dim=0)) == 256
    assert words.square().sum(1).tolist() == [0] + [2] * 240 + [4] * 15


def test_the_nearest_word_is_found_without_a_look_at_all():
    vectors = 1.5 * gaussian(400, 8)
    codes = nearest_codes(vectors, torch.ones_like(vectors), bits=2)
    found = (vectors - decode_codes(codes, 2)).square().sum(1)
    least = torch.cdist(vectors, e8p_words(CPU), compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
    # The 29 patterns that come without their permutations are the exception.
    assert torch.isclose(found, least, rtol=1e-4).float().mean() > 0.98
    assert found.sum() < 1.001 * least.sum()


def test_the_nearest_word_by_importance_is_nearly_found():
    vectors, importance = gaussian(400, 8), gaussian(400, 8, seed=1).exp()
    found = decode_codes(nearest_codes(vectors, importance, bits=2), 2)
    distances = [(h * (v - e8p_words(CPU)).square()).sum(1).min() for v, h in zip(vectors, importance, strict=True)]
    assert (importance * (vectors - found).square()).sum() < 1.01 * sum(distances)


def test_finalists_have_every_shift_and_parity():
    found = finalists(gaussian(50, 8), torch.ones(50, 8))
    assert torch.equal(found >> 15, torch.tensor([0, 0, 1, 1]).expand(50, 4))
    odd = e8p_patterns(CPU)[found & 0xFF].sum(2) % 2
    assert torch.equal(odd, torch.tensor([0.0, 1, 0, 1]).expand(50, 4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_coder_says_what_its_codes_decode_to(bits):
    weight = gaussian(6, 21)
    coder = E8Coder(bits, torch.tensor([0.9]))
    codes, decoded = coder.encode(weight, 0, torch.ones(1, 21))
    assert codes.shape == (6, 3)
    assert torch.equal(decoded, decode_codes(codes, bits).flatten(1)[:, :21] * 0.9)


def test_weights_of_any_size_take_the_same_codes():
    weight = gaussian(16, 64)
    for size in (2.0**-60, 2.0**60):
        assert torch.equal(fit(E8(2), weight * size).codes, fit(E8(2), weight).codes)


def test_the_scale_is_among_the_best():
    weight = gaussian(64, 256)
    scale = best_scale(weight, Objective.plain(weight), bits=2)
    chosen, smaller, larger = (
        relative_error(weight, E8Coder(2, scale * factor).encode(weight, 0, torch.ones(1, 256))[1])
        for factor in (1, 0.93, 1.07)
    )
    assert chosen < min(smaller, larger)


def test_error_feedback_lowers_the_error_of_the_outputs():
    inputs = gaussian(600, 64, seed=1) @ gaussian(64, 64, seed=2)
    objective = Objective.output_error(inputs.T @ inputs / 600)
    weight = gaussian(32, 64)
    rounded, fed = (E8(2).decode(fit(E8(2), weight, given), (32, 64)) for given in (None, objective))
    assert objective.error(weight, fed) < 0.75 * objective.error(weight, rounded)


def test_importance_moves_the_error_to_where_it_costs_less():
    weight, importance = gaussian(64, 64), torch.ones(1, 64)
    importance[:, ::4] = 30
    objective = Objective(importance)
    plain, weighted = (E8(2).decode(fit(E8(2), weight, given), (64, 64)) for given in (None, objective))
    assert objective.error(weight, weighted) < 0.8 * objective.error(weight, plain)


def test_what_fills_a_short_vector_costs_nothing_and_is_counted():
    assert E8(3).nbytes((10, 12)) == 10 * 2 * 3 + 4
    assert error_of(E8(2), gaussian(200, 5)) < error_of(E8(2), gaussian(200, 8))


def test_words_made_in_inference_mode_serve_training_later():
    e8p_words.cache_clear()
    with torch.inference_mode():
        e8p_words(CPU)
    assert not e8p_words(CPU).is_inference()


def test_other_bits_are_refused():
    with pytest.raises(FormatError, match="e8: bits=5"):
        E8(5)
