import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import fit, permutation, relative_error
from reallm.fit.objective import Objective
from reallm.fit.permutation import fiedler_order, find_column_orders, find_row_order, greedy_chain
from reallm.formats.dense import Dense
from reallm.formats.permuted import METHODS, Permuted
from reallm.formats.uniform import Uniform

BASE = Uniform(bits=3, group_size=8)


def drawn(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


def slow_chain(block, memory=16):
    """The definition: begin with the largest column, go on to the nearest to the mean of the last ones placed."""
    block = block.double()
    order = [int(block.square().sum(0).argmax())]
    while len(order) < block.shape[1]:
        mean = block[:, order[-memory:]].mean(1)
        left = [j for j in range(block.shape[1]) if j not in order]
        order.append(min(left, key=lambda j: (block[:, j] - mean).square().sum().item()))
    return order


@pytest.mark.parametrize("shape", [(12, 50), (3, 40), (30, 17), (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_chain_is_the_one_of_its_definition(shape, seed):
    block = drawn(*shape, seed)
    assert greedy_chain(block[None])[0].tolist() == slow_chain(block)


def test_chains_of_many_blocks_are_independent():
    blocks = torch.stack([drawn(8, 40, seed) for seed in range(3)])
    together = greedy_chain(blocks)
    assert all(torch.equal(together[i : i + 1], greedy_chain(blocks[i : i + 1])) for i in range(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_rows", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("shape", [(20, 48), (7, 3), (1, 30)])
def test_orders_are_permutations_one_for_each_row_block(method, block_rows, shape):
    fmt = Permuted(base=BASE, block_rows=block_rows, method=method)
    orders = find_column_orders(fmt, drawn(*shape))
    assert orders.shape == (fmt.blocks(shape), shape[1])
    assert all(sorted(order) == list(range(shape[1])) for order in orders.tolist())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "weight",
    [torch.ones(6, 20), torch.zeros(6, 20), drawn(6, 5).repeat(1, 4), torch.full((6, 20), 1e15)],
    ids=["equal", "zero", "duplicates", "huge"],
)
def test_duplicate_columns_are_no_problem(method, weight):
    orders = find_column_orders(Permuted(base=BASE, method=method), weight)
    assert sorted(orders[0].tolist()) == list(range(20))


def test_sorting_puts_the_largest_columns_first():
    weight = drawn(10, 30)
    norms = weight.square().sum(0)[find_column_orders(Permuted(base=BASE), weight)[0].long()]
    assert torch.equal(norms, norms.sort(descending=True).values)


@pytest.mark.parametrize("method", ["sort", "greedy"])  # the spectral order knows directions, not sizes
def test_columns_of_different_size_are_stored_better_in_order(method):
    scale = torch.tensor([1.0, 100.0]).repeat(32)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * scale
    small = scale == 1

    def error(fmt):
        return relative_error(weight[:, small], fmt.decode(fit(fmt, weight), (32, 64))[:, small])

    assert error(Permuted(base=BASE, method=method)) < 0.4 * error(BASE)


def test_an_order_is_undone_exactly():
    fmt = Permuted(base=BASE, block_rows=4, method="greedy")
    weight = drawn(10, 24)
    orders = find_column_orders(fmt, weight)
    assert torch.equal(fmt.gather(fmt.gather(weight, orders), orders.long().argsort(1)), weight)


def smooth(rows, columns, seed=0):
    """Rows that are smooth curves, and the shuffled places of their columns: likeness falls with the distance."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(columns, generator=generator) / columns
    knots = torch.linspace(-0.2, 1.2, 40)[:, None]
    return torch.randn(rows, 40, generator=generator) @ torch.exp(-0.5 * ((places - knots) / 0.05) ** 2), places


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_spectral_order_finds_shuffled_curves_again(noise):
    weight, places = smooth(200, 80)
    weight += noise * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found = places[fiedler_order(weight[None])[0].long()]
    steps = found.diff().abs() * 80
    assert steps.mean() < (1.01 if noise == 0 else 3), "neighbours in the order were neighbours before"


def test_the_spectral_order_of_blocks_is_that_of_each():
    blocks = torch.stack([smooth(30, 40, seed)[0] for seed in range(3)])
    together = fiedler_order(blocks)
    assert all(torch.equal(together[i : i + 1], fiedler_order(blocks[i : i + 1])) for i in range(3))


def test_the_spectral_order_begins_at_the_end_with_the_larger_columns():
    weight, places = smooth(100, 60)
    weight = weight * (1 + places)
    assert places[fiedler_order(weight[None])[0].long()][:10].min() > 0.8


def test_rows_are_ordered_as_the_columns_of_the_transposed_matrix():
    weight = drawn(20, 30).T.contiguous()
    for method in METHODS:
        fmt = Permuted(base=BASE, method=method, rows=True)
        assert torch.equal(find_row_order(fmt, weight), find_column_orders(fmt, weight.T.contiguous())[0])


@pytest.mark.parametrize("block_rows", [0, 5])
@pytest.mark.parametrize("method", METHODS)
def test_ordered_rows_and_columns_are_put_back(method, block_rows):
    weight = drawn(12, 24)
    fmt = Permuted(base=Dense("float32"), block_rows=block_rows, method=method, rows=True)
    unpacked = fit(fmt, weight)
    assert unpacked.row_order.tolist() != list(range(12))
    assert torch.equal(fmt.decode(unpacked, (12, 24)), weight)


def test_an_order_of_rows_takes_its_bytes():
    plain, both = (Permuted(base=BASE, rows=rows) for rows in (False, True))
    assert both.nbytes((100, 24)) - plain.nbytes((100, 24)) == 88  # 7 bits per row


def test_an_objective_by_rows_follows_the_rows():
    weight = drawn(12, 24)
    importance = torch.rand(12, 24, generator=torch.Generator().manual_seed(2)) + 0.1
    fmt = Permuted(base=BASE, rows=True)
    unpacked = fit(fmt, weight, Objective(importance))
    rows, columns = unpacked.row_order.long(), unpacked.order[0].long()
    alone = fit(BASE, weight[rows][:, columns], Objective(importance[rows][:, columns]))
    assert torch.equal(unpacked.base.codes, alone.codes)


def test_a_start_keeps_both_orders():
    weight, fmt = drawn(12, 24), Permuted(base=BASE, method="spectral", rows=True)
    first = fit(fmt, weight)
    again = fit(fmt, weight + drawn(12, 24, 1), start=first)
    assert torch.equal(again.order, first.order) and torch.equal(again.row_order, first.row_order)


def test_a_damaged_order_of_rows_is_refused():
    fmt, weight = Permuted(base=BASE, rows=True), drawn(12, 24)
    tensors = fmt.pack(fit(fmt, weight), (12, 24))
    tensors["row_order"] = torch.zeros_like(tensors["row_order"])
    with pytest.raises(FormatError, match="no permutation of the rows"):
        fmt.unpack(tensors, (12, 24))


def test_rows_that_are_too_many_to_compare_are_refused(monkeypatch):
    monkeypatch.setattr(permutation, "_MOST_COMPARED", 10)
    with pytest.raises(FormatError, match="all pairs of 12 rows.*use method='sort'"):
        fit(Permuted(base=BASE, method="greedy", rows=True), drawn(12, 24))
    assert fit(Permuted(base=BASE, rows=True), drawn(12, 24)).row_order is not None
