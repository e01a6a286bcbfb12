import pytest
import torch

from reallm.fit import fit, relative_error
from reallm.fit.kmeans import kmeans, nearest
from reallm.formats.codebook import Codebook


def drawn(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) / 3


def alike(vectors):
    return torch.ones_like(vectors)


def distortion(vectors, importance, codebook):
    codes = nearest(vectors, codebook, importance).long()
    return ((vectors - codebook[codes]).square() * importance).sum().item()


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_entries_serve_better_than_drawn_vectors(dim):
    vectors, importance = drawn(4000, dim), torch.ones(4000, dim)
    chance = vectors[:32].sort(0).values if dim == 1 else vectors[:32]
    found = kmeans(vectors, importance, 32)
    assert distortion(vectors, importance, found) < 0.9 * distortion(vectors, importance, chance)


def test_the_same_seed_gives_the_same_entries_and_another_others():
    vectors, importance = drawn(3000, 2), torch.ones(3000, 2)
    first, second, other = (kmeans(vectors, importance, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("dim", [2, 4])
def test_no_entry_is_dead(dim):
    vectors, importance = drawn(4000, dim), torch.ones(4000, dim)
    # Far away from every vector but one: without repair they would stay there for good.
    start = torch.full((32, dim), 0.95)
    start[0] = 0
    found = kmeans(vectors, importance, 32, start=start)
    for _ in range(3):  # each warm start may revive what the first one had no time for
        found = kmeans(vectors, importance, 32, start=found)
    assert len(nearest(vectors, found, importance).unique()) >= 30


def test_important_vectors_are_served_better():
    vectors, importance = drawn(4000, 2), torch.ones(4000, 2)
    importance[:400] = 100
    weighted, plain = kmeans(vectors, importance, 16), kmeans(vectors, alike(vectors), 16)
    assert distortion(vectors, importance, weighted) < distortion(vectors, importance, plain)


def test_an_important_coordinate_is_served_better():
    vectors, importance = drawn(4000, 2), torch.ones(4000, 2)
    importance[:, 0] = 100
    errors = [
        (vectors - found[nearest(vectors, found, weights).long()]).square().mean(0)
        for weights in (importance, alike(vectors))
        for found in [kmeans(vectors, weights, 16)]
    ]
    assert errors[0][0] < 0.3 * errors[1][0]


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_fewer_vectors_than_entries_are_met_almost_exactly(dim):
    vectors = drawn(10, dim) * 0.8  # below where coordinates are pinned to 1
    found = kmeans(vectors, alike(vectors), 64)
    assert found.shape == (64, dim) and torch.isfinite(found).all()
    assert distortion(vectors, alike(vectors), found) < 1e-4 * len(vectors)


def test_one_vector_repeated_and_vectors_of_no_importance_are_no_problem():
    same = torch.full((50, 2), 0.5)
    assert distortion(same, alike(same), kmeans(same, alike(same), 8)) < 1e-6
    assert torch.isfinite(kmeans(drawn(50, 2), torch.zeros(50, 2), 8)).all()


def test_scalar_entries_come_sorted():
    found = kmeans(drawn(2000, 1), torch.ones(2000, 1), 16)[:, 0]
    assert torch.equal(found, found.sort().values)


def test_a_warm_start_does_not_lose_much():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    fmt = Codebook(index_bits=5, vector_dim=2)
    cold = fit(fmt, weight)
    warm = fit(fmt, weight, start=cold)
    errors = [relative_error(weight, fmt.decode(unpacked, (64, 64))) for unpacked in (cold, warm)]
    assert errors[1] <= errors[0] * 1.02


def test_more_index_bits_lower_the_error():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 4, 6, 8):
        fmt = Codebook(index_bits=bits, vector_dim=2)
        errors.append(relative_error(weight, fmt.decode(fit(fmt, weight), (64, 128))))
    assert errors == sorted(errors, reverse=True)
