"""Planted structure is found, and noise looks like noise."""

import math

import pytest
import torch

from reallm.analyze import (
    analyze_matrix,
    autocorrelation,
    codec_errors,
    describe_view,
    kurtosis,
    marchenko_pastur,
    noise_like,
    predictable_bits,
    remove_scales,
    scale_bits,
    shifts,
    shuffle,
    spectrum,
    top_share,
    views,
)
from reallm.analyze.orders import basis_nbytes, rotate_to_singular_basis
from reallm.analyze.spectrum import best_rank, energies
from reallm.fit import permutation
from reallm.formats import from_spec, rotated
from reallm.formats.permuted import METHODS, Permuted
from reallm.formats.uniform import Uniform

UNIFORM = Uniform(bits=3, group_size=16)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank_and_noise(rank, rows=96, columns=160):
    signal = drawn(rows, rank, seed=1) @ drawn(rank, columns, seed=2)
    return 3 * signal / rank**0.5 + drawn(rows, columns)


def shuffled_curves(rows=120, columns=80):
    """Rows that are smooth curves and alike for neighbouring columns, everything in a random order."""
    knots = torch.linspace(-0.2, 1.2, 40)[:, None]
    places = torch.arange(columns) / columns
    return shuffle(drawn(rows, 40, seed=3) @ torch.exp(-0.5 * ((places - knots) / 0.05) ** 2), seed=4)


def test_noise_has_the_spectrum_of_marchenko_and_pastur():
    for shape in [(200, 600), (600, 200), (300, 300)]:
        found = spectrum(drawn(*shape), drawn(*shape, seed=1))
        assert found.top_share == pytest.approx(found.marchenko_pastur_top_share, rel=0.02)
        assert found.top_share == pytest.approx(found.noise_top_share, rel=0.02)
        assert found.above_noise <= 1 and (found.best_rank, found.rank_bits) == (0, 0.0)


def test_the_law_of_marchenko_and_pastur_has_its_edges_and_its_mean():
    values = marchenko_pastur((400, 1600)) * 400
    assert values.mean() == pytest.approx(1) and len(values) == 400
    assert values[0] == pytest.approx((1 + 0.5) ** 2, rel=0.02) and values[-1] == pytest.approx(
        (1 - 0.5) ** 2, rel=0.05
    )
    assert torch.equal(values, values.sort(descending=True).values)


def test_a_planted_low_rank_is_found_and_worth_its_bytes():
    found = spectrum(low_rank_and_noise(3), drawn(96, 160, seed=5))
    assert found.above_noise == 3 and found.best_rank == 3
    assert found.share_above_noise == pytest.approx(0.9, abs=0.05)
    # Nine tenths of the energy are ½ log2 10 = 1.66 bits; three int8 terms are 3 · 8 · 260 / 15,360 = 0.41.
    assert found.rank_bits == pytest.approx(1.66 - 0.41, abs=0.15)
    assert found.curve[0] > 5 * found.noise_curve[0]


def test_the_best_rank_is_paid_with_the_bytes_of_the_format():
    falling = energies(low_rank_and_noise(3))
    shape = (96, 160)
    rank, bits = best_rank(falling, shape)
    specs = [
        {"format": "dense"},
        {"format": "low_rank_plus", "rank": rank, "factors": "int8", "base": {"format": "dense"}},
    ]
    plain, residual = (from_spec(spec).bits_per_weight(shape) for spec in specs)
    assert bits == pytest.approx(-0.5 * math.log2(1 - falling[:rank].sum().item()) - (residual - plain), abs=2e-3)


def test_even_a_matrix_of_rank_one_saves_no_more_than_int8_keeps():
    weight = drawn(400, 1) @ drawn(1, 400, seed=1)
    assert best_rank(energies(weight), (400, 400))[0] == 1
    assert 6 < best_rank(energies(weight), (400, 400))[1] < 6.5


def test_the_top_share_is_of_a_sixteenth_and_of_one_value_at_least():
    assert top_share(torch.ones(32)) == pytest.approx(2 / 32)
    assert top_share(torch.tensor([3.0, 1.0])) == 0.75


def test_scales_of_noise_are_worth_nothing_and_planted_ones_what_they_are():
    noise = scale_bits(drawn(200, 300))
    assert max(noise.rows, noise.columns) < 0.006 and noise.both < 0.01
    factor = torch.tensor([1.0, 8.0]).repeat(150)
    found = scale_bits(drawn(200, 300) * factor)
    # Variances 1 and 64 by halves: ½ log2(32.5 / 8).
    assert found.columns == pytest.approx(0.5 * math.log2(32.5 / 8), abs=0.01)
    assert found.rows < 0.01 and found.both == found.rows + found.columns
    assert scale_bits((drawn(200, 300) * factor).T.contiguous()).rows == pytest.approx(found.columns, abs=1e-4)


def test_shifts_of_noise_take_their_chance_and_cost_more_than_that():
    found = shifts(drawn(300, 400))
    assert found.matrix.share < 10 / (300 * 400)
    assert found.rows.share == pytest.approx(1 / 400, rel=0.3) and found.columns.share == pytest.approx(
        1 / 300, rel=0.3
    )
    assert found.rows.bits == pytest.approx(-16 / 400, abs=0.003)
    assert found.matrix.bits == pytest.approx(0, abs=2e-4)


def test_a_planted_shift_is_found_where_it_was_planted_and_worth_its_energy():
    rows = drawn(300, 1, seed=3)
    found = shifts((drawn(300, 400) + rows) * 1e-22)
    share = (rows.square().mean() / (1 + rows.square().mean())).item()
    assert found.rows.share == pytest.approx(share, rel=0.02)
    assert found.rows.bits == pytest.approx(-0.5 * math.log2(1 - share) - 16 / 400, abs=0.02)
    assert found.columns.share < 0.03
    turned = shifts((drawn(300, 400) + rows).T.contiguous())
    assert turned.columns.share == pytest.approx(found.rows.share, rel=1e-4)
    assert shifts(drawn(300, 400) + 1).matrix.share == pytest.approx(0.5, abs=0.01)


def test_a_matrix_that_is_all_shift_saves_no_more_than_float16_keeps():
    assert shifts(torch.full((200, 200), 0.3)).matrix.bits == pytest.approx(11, abs=0.01)


def test_a_single_scaled_column_is_seen_in_scales_kurtosis_and_spectrum_and_not_once_it_is_divided_out():
    weight = drawn(128, 128)
    weight[:, 7] *= 20
    found = analyze_matrix(weight)
    assert found.scales.columns > 0.5 > 0.1 > found.scales.rows
    assert found.kurtosis > 20 and found.unscaled_kurtosis == pytest.approx(3, abs=0.15)
    assert kurtosis(remove_scales(weight)) == found.unscaled_kurtosis
    # The noise has the column too, so that it does not count as structure of rank one.
    assert found.spectrum.noise_top_share == pytest.approx(found.spectrum.top_share, rel=0.05)
    assert found.noise_scales.columns == pytest.approx(found.scales.columns, rel=0.1)


def test_noise_has_the_scales_of_the_matrix_and_none_of_its_weights():
    weight = drawn(64, 48) * (0.2 + torch.rand(48, generator=torch.Generator().manual_seed(1))) * 1e-20
    noise = noise_like(weight, seed=9)
    ratios = noise.square().mean(0).sqrt() / weight.square().mean(0).sqrt()
    assert ratios.min() > 0.6 and ratios.max() < 1.5
    assert abs(torch.corrcoef(torch.stack([weight.reshape(-1), noise.reshape(-1)]))[0, 1]) < 0.12
    assert torch.equal(noise, noise_like(weight, seed=9)) and not torch.equal(noise, noise_like(weight, seed=8))


def test_kurtosis_of_normal_numbers_is_three_and_of_signs_one():
    assert kurtosis(drawn(300, 300)) == pytest.approx(3, abs=4 * math.sqrt(24 / 90_000))
    assert kurtosis(drawn(30, 30).sign() * 1e-30) == pytest.approx(1)


def test_autocorrelation_is_that_of_its_definition():
    weight = drawn(9, 14) + 0.3
    moved = (weight - weight.mean()).double()
    found = autocorrelation(weight)
    assert found.value == pytest.approx(sum(
        (moved[i, j] * moved[i, j + 1]).item() for i in range(9) for j in range(13)
    ) / moved.square().sum().item())  # fmt: skip
    assert autocorrelation(weight * 1e-25).value == pytest.approx(found.value, rel=1e-4)


def test_the_error_of_an_autocorrelation_is_its_spread_for_unequal_heavy_tailed_numbers():
    scale = torch.linspace(0.1, 3, 30) * torch.linspace(0.1, 3, 20)[:, None]
    found = [autocorrelation(drawn(20, 30, seed=seed).pow(3) * scale) for seed in range(300)]
    spread = torch.tensor([each.value for each in found]).std().item()
    assert spread > 1.3 / math.sqrt(600), "one over the root of the count would be too small"
    assert torch.tensor([each.error for each in found]).mean().item() == pytest.approx(spread, rel=0.2)


def test_prediction_saves_what_an_autoregressive_row_gives():
    noise, rows = drawn(40, 2000), [drawn(40)]
    for step in range(1, 2000):
        rows.append(0.8 * rows[-1] + 0.6 * noise[:, step])
    assert predictable_bits(torch.stack(rows, 1)) == pytest.approx(-0.5 * math.log2(1 - 0.64), abs=0.02)
    assert predictable_bits(noise) < 1e-3
    assert predictable_bits(drawn(5, 1)) == predictable_bits(torch.ones(4, 4)) == 0


def test_orders_find_shuffled_curves_again_and_sorting_does_not():
    weight = shuffled_curves()
    found = {view.name: view for view in views(weight)}
    assert abs(found["raw"].along_rows.alike.value) < 0.25
    assert found["spectral"].along_rows.alike.value > 0.9 and found["greedy"].along_rows.alike.value > 0.8
    assert abs(found["sort"].along_rows.alike.value) < 0.5
    assert found["spectral"].net_bits(found["raw"], weight.numel()) > 1


def test_rows_that_differ_in_size_are_alike_in_size_once_sorted():
    weight = (
        drawn(100, 60)
        * torch.logspace(-1, 1, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(1))][:, None]
    )
    found = {view.name: view for view in views(weight)}
    assert abs(found["raw"].along_columns.sizes.value) < 0.1 < 0.3 < found["sort"].along_columns.sizes.value
    assert abs(found["sort"].along_columns.alike.value) < 0.1, "sizes are in order, signs are not"


def test_no_order_of_noise_earns_its_bytes():
    weight = drawn(96, 128)
    raw, *others = views(weight)
    assert [view.name for view in others] == [*METHODS, "singular", "hadamard"]
    for view in others:
        assert view.net_bits(raw, weight.numel()) < 0.01, view.name


def test_orders_cost_what_the_permuted_format_stores_for_them():
    shape = (96, 200)
    found = {view.name: view for view in views(drawn(*shape))}
    for method in METHODS:
        extra = Permuted(base=UNIFORM, method=method, rows=True).nbytes(shape) - UNIFORM.nbytes(shape)
        assert found[method].nbytes == extra == (96 * 7 + 200 * 8) // 8
    assert found["raw"].nbytes == found["hadamard"].nbytes == 0
    assert found["singular"].nbytes == basis_nbytes(96) == 96 * 96 + 2 * 96


def test_a_side_whose_order_does_not_pay_is_left_out_of_the_net():
    weight = drawn(64, 64)
    raw, costly = describe_view("raw", weight), describe_view("sort", weight, order_bytes=(10_000, 10_000))
    assert costly.net_bits(raw, weight.numel()) == 0
    assert describe_view("singular", weight, basis_nbytes=512).net_bits(raw, 64 * 64) == pytest.approx(-1)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_singular_basis_has_falling_energy_on_the_smaller_side(shape):
    weight = drawn(*shape)
    moved = rotate_to_singular_basis(weight)
    falling = moved.square().sum(0 if shape[1] < shape[0] else 1)
    values = torch.linalg.svdvals(weight).square()
    torch.testing.assert_close(falling, values, rtol=1e-4, atol=1e-4)


def test_the_hadamard_basis_takes_outliers_and_scales_away():
    weight = (
        drawn(128, 128) * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    )
    found = {view.name: view for view in views(weight)}
    assert found["raw"].kurtosis > 6 and found["hadamard"].kurtosis == pytest.approx(3, abs=0.2)
    assert found["hadamard"].scale_bits < 0.1 * found["raw"].scale_bits


def test_a_size_that_no_transform_fits_has_no_hadamard_view(monkeypatch):
    monkeypatch.setattr(rotated, "MAX_ODD", 3)
    assert [view.name for view in views(drawn(8, 15))][-1] == "singular"


def test_an_order_that_would_compare_too_many_rows_is_left_out(monkeypatch):
    monkeypatch.setattr(permutation, "_MOST_COMPARED", 10)
    assert [view.name for view in views(drawn(12, 15))] == ["raw", "sort", "singular", "hadamard"]


def test_shuffling_keeps_spectrum_and_scales_and_takes_neighbours_away():
    places = torch.arange(80) / 80
    weight = torch.sin(drawn(60, 1) + 6 * places) * (1 + places)
    moved = shuffle(weight, seed=2)
    torch.testing.assert_close(energies(moved), energies(weight))
    torch.testing.assert_close(moved.square().sum(0).sort().values, weight.square().sum(0).sort().values)
    assert autocorrelation(weight).value > 0.9 > 0.3 > abs(autocorrelation(moved).value)


CODECS = [
    UNIFORM,
    from_spec({"format": "codebook", "index_bits": 5, "vector_dim": 2, "group_size": 16}),
    from_spec({"format": "rotated", "base": {"format": "trellis", "bits": 2, "state_bits": 6}}),
]


def test_codecs_do_as_well_on_a_shuffled_copy_of_what_has_no_order():
    weight = drawn(96, 128)
    for found in codec_errors(CODECS, weight, noise_like(weight, 1)):
        assert abs(found.order_bits) < 0.05 and found.noise == pytest.approx(found.real, rel=0.05)


def test_a_codec_that_uses_neighbours_does_worse_on_a_shuffled_copy():
    weight = drawn(96, 8, seed=1).repeat_interleave(16, 1) * 4 + 0.1 * drawn(
        96, 128
    )  # groups around a mean of their own
    uniform, *_ = codec_errors(CODECS, weight, noise_like(weight, 1))
    assert uniform.order_bits > 1 and uniform.noise > 4 * uniform.real


def test_codecs_are_rated_at_the_bytes_they_store():
    weight = drawn(96, 128)
    for fmt, found in zip(CODECS, codec_errors(CODECS, weight, weight), strict=True):
        assert found.nbytes == fmt.nbytes((96, 128)) and from_spec(found.codec) == fmt
        assert found.bits_per_weight == fmt.bits_per_weight((96, 128))


@pytest.mark.parametrize("shape", [(2, 2), (2, 50), (50, 2), (17, 33)])
def test_small_and_odd_matrices_have_finite_figures(shape):
    found = analyze_matrix(drawn(*shape), [Uniform(bits=3)])
    assert math.isfinite(found.kurtosis) and math.isfinite(found.spectrum.top_share)
    raw = found.orders[0]
    assert all(math.isfinite(view.net_bits(raw, shape[0] * shape[1])) for view in found.orders)


def test_one_seed_gives_the_same_figures():
    weight = drawn(40, 32)
    assert analyze_matrix(weight, [UNIFORM], seed=3) == analyze_matrix(weight, [UNIFORM], seed=3)
