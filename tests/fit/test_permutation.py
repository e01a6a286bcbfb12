import pytest
import torch

from reallm.fit import fit, relative_error
from reallm.fit.permutation import column_orders, greedy_chain
from reallm.formats.permuted import Permuted
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


@pytest.mark.parametrize("method", ["sort", "greedy"])
@pytest.mark.parametrize("block_rows", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("shape", [(20, 48), (7, 3), (1, 30)])
def test_orders_are_permutations_one_for_each_row_block(method, block_rows, shape):
    fmt = Permuted(base=BASE, block_rows=block_rows, method=method)
    orders = column_orders(fmt, drawn(*shape))
    assert orders.shape == (fmt.blocks(shape), shape[1])
    assert all(sorted(order) == list(range(shape[1])) for order in orders.tolist())


@pytest.mark.parametrize("method", ["sort", "greedy"])
@pytest.mark.parametrize(
    "weight",
    [torch.ones(6, 20), torch.zeros(6, 20), drawn(6, 5).repeat(1, 4), torch.full((6, 20), 1e15)],
    ids=["equal", "zero", "duplicates", "huge"],
)
def test_duplicate_columns_are_no_problem(method, weight):
    orders = column_orders(Permuted(base=BASE, method=method), weight)
    assert sorted(orders[0].tolist()) == list(range(20))


def test_sorting_puts_the_largest_columns_first():
    weight = drawn(10, 30)
    norms = weight.square().sum(0)[column_orders(Permuted(base=BASE), weight)[0].long()]
    assert torch.equal(norms, norms.sort(descending=True).values)


@pytest.mark.parametrize("method", ["sort", "greedy"])
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
    orders = column_orders(fmt, weight)
    assert torch.equal(fmt.gather(fmt.gather(weight, orders), orders.long().argsort(1)), weight)
