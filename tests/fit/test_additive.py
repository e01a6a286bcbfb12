import itertools

import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, fit, relative_error
from reallm.fit.additive import AdditiveCoder, beam_search
from reallm.formats.additive import Additive


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(books=3, entries=8, dim=4):
    """Each finer than the one before."""
    return [drawn(entries, dim, seed=10 + book) * 0.6**book for book in range(books)]


def distances(vectors, books, codes, importance):
    total = sum(book[codes[:, number]] for number, book in enumerate(books))
    return ((vectors - total).square() * importance).sum(1)


def test_a_wider_beam_serves_better_than_a_greedy_search():
    vectors, books = drawn(500, 4), tables()
    importance = 0.1 + drawn(500, 4, seed=3).square()
    errors = [
        distances(vectors, books, beam_search(vectors, books, importance, width), importance).sum()
        for width in (1, 4, 8)
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] <= errors[1]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_beam_as_wide_as_all_partial_sums_finds_the_nearest_of_all(weighted):
    vectors, books = drawn(60, 4), tables()
    importance = 0.1 + drawn(60, 4, seed=3).square() if weighted else torch.ones(60, 4)
    found = beam_search(vectors, books, importance if weighted else None, width=64)
    every = [
        distances(vectors, books, torch.tensor([codes]).expand(60, -1), importance)
        for codes in itertools.product(range(8), repeat=3)
    ]
    torch.testing.assert_close(distances(vectors, books, found, importance), torch.stack(every).amin(0))


def test_many_vectors_are_searched_in_parts_with_the_same_codes(monkeypatch):
    vectors, books, importance = drawn(300, 4), tables(), drawn(300, 4, seed=3).square()
    whole = beam_search(vectors, books, importance, 4)
    monkeypatch.setattr("reallm.fit.additive._SCORES_PER_CHUNK", {"cpu": 1000})
    assert torch.equal(beam_search(vectors, books, importance, 4), whole)


@pytest.mark.parametrize(("books", "index_bits"), [(1, 8), (2, 4), (5, 3), (3, 5), (16, 1)])
def test_codes_decode_to_what_the_coder_says(books, index_bits):
    """Codebooks that are searched as one table come apart again in their order."""
    fmt = Additive(books=books, index_bits=index_bits, vector_dim=4)
    codebooks, scales = drawn(books, 2**index_bits, 4), 0.5 + drawn(6, 1, seed=4).abs()
    codes, decoded = AdditiveCoder(fmt, codebooks, scales).encode(drawn(6, 10, seed=5), 0, torch.ones(1, 10))
    unpacked = type(fit(fmt, drawn(6, 10)))(codes, codebooks, scales)
    assert codes.max() < 2**index_bits
    torch.testing.assert_close(fmt.decode(unpacked, (6, 10)), decoded)


def test_errors_of_a_block_are_weighed_together():
    """By |error · root|²: what the metric asks for is met better than by its diagonal alone."""
    fmt = Additive(books=2, index_bits=4, vector_dim=4)
    coder = AdditiveCoder(fmt, drawn(2, 16, 4), torch.ones(400, 1))
    columns, root = drawn(400, 4, seed=5), torch.linalg.cholesky(0.2 * torch.eye(4) + torch.ones(4, 4))
    together, apart = (
        coder.encode_with_metric(columns, 0, root)[1],
        coder.encode(columns, 0, root.square().sum(1)[None])[1],
    )
    costs = [((columns - decoded) @ root).square().sum() for decoded in (together, apart)]
    assert costs[0] < 0.8 * costs[1]


def test_more_codebooks_lower_the_error():
    weight, errors = drawn(64, 128), []
    for books in (1, 2, 3, 4):
        fmt = Additive(books=books, index_bits=4)
        errors.append(relative_error(weight, fmt.decode(fit(fmt, weight), (64, 128))))
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]


def test_important_columns_are_served_better():
    weight, importance = drawn(64, 64), torch.ones(1, 64)
    importance[:, ::2] = 50
    fmt = Additive(books=2, index_bits=4)
    errors = (weight - fmt.decode(fit(fmt, weight, Objective(importance)), (64, 64))).square().mean(0)
    assert errors[::2].mean() < 0.5 * errors[1::2].mean()


def test_a_warm_start_does_not_lose_much():
    weight, fmt = drawn(64, 64), Additive(books=2, index_bits=4)
    cold = fit(fmt, weight)
    warm = fit(fmt, weight, start=cold)
    errors = [relative_error(weight, fmt.decode(unpacked, (64, 64))) for unpacked in (cold, warm)]
    assert errors[1] <= errors[0] * 1.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vector_dim": 2}, "vector_dim=2 is not one of"),
        ({"books": 0}, "books=0 is not in 1"),
        ({"index_bits": 17}, "index_bits=17 is not in 1"),
        ({"group_size": -1}, "group_size=-1 is negative"),
        ({"scales": "int4"}, "scales='int4' is not one of"),
    ],
)
def test_fields_that_cannot_be_are_named(fields, message):
    with pytest.raises(FormatError, match=message):
        Additive(**fields)
