"""Allocation under a budget, compared with brute force."""

import itertools
import random
import time

import pytest

from reallm.allocate import Choice, Problem
from reallm.errors import RecipeError


def random_tables(seed, matrices=5, candidates=5, sizes=(1000, 3000, 9000)):
    """Losses that fall about fourfold per bit, with noise, in matrices of very different sizes."""
    rng = random.Random(seed)
    tables = []
    for _ in range(matrices):
        weights, sensitivity = rng.choice(sizes), rng.uniform(0.2, 5)
        bits = sorted(rng.uniform(1, 8) for _ in range(candidates))
        tables.append([Choice(int(b * weights / 8), sensitivity * 4**-b * rng.uniform(0.8, 1.2)) for b in bits])
    return tables


def choose(tables, budget, least=0, **limits):
    return Problem(tables, budget, least, **limits).solve()


def brute_force(tables, budget, least=0):
    options = (picked for picked in itertools.product(*tables) if least <= sum(c.nbytes for c in picked) <= budget)
    return min(sum(c.loss for c in picked) for picked in options)


def cost(tables, chosen):
    picked = [table[i] for table, i in zip(tables, chosen, strict=True)]
    return sum(c.nbytes for c in picked), sum(c.loss for c in picked)


def budgets(tables):
    least, most = (sum(pick(c.nbytes for c in table) for table in tables) for pick in (min, max))
    return [int(least + share * (most - least)) for share in (0, 0.1, 0.3, 0.5, 0.8, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_never_exceeded(seed):
    tables = random_tables(seed)
    assert all(cost(tables, choose(tables, budget))[0] <= budget for budget in budgets(tables))


def test_the_loss_is_close_to_brute_force():
    ratios = []
    for seed in range(40):
        tables = random_tables(seed)
        for budget in budgets(tables):
            ratios.append(cost(tables, choose(tables, budget))[1] / brute_force(tables, budget))
    assert min(ratios) >= 1 - 1e-9 and max(ratios) < 1.005


@pytest.mark.parametrize("seed", [14, 87, 0, 1])
def test_one_matrix_hundreds_of_times_as_large_as_the_others_stays_optimal(seed):
    tables = random_tables(seed, candidates=6, sizes=(110_592, 331_776, 884_736, 28_311_552))
    least, most = (sum(pick(c.nbytes for c in table) for table in tables) for pick in (min, max))
    for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        budget = int(least + share * (most - least))
        assert cost(tables, choose(tables, budget))[1] <= brute_force(tables, budget) * (1 + 1e-9)


def test_with_many_matrices_the_loss_is_within_half_a_percent_of_the_lower_bound():
    tables = random_tables(0, matrices=200, candidates=20)
    for budget in budgets(tables)[1:-1]:
        loss = cost(tables, choose(tables, budget))[1]
        # Any price of a byte bounds the optimum from below (weak duality).
        prices = [10.0**-e for e in (e / 64 for e in range(128, 960))]
        bound = max(sum(min(c.loss + p * c.nbytes for c in t) for t in tables) - p * budget for p in prices)
        assert loss <= bound * 1.005


@pytest.mark.parametrize("seed", range(10))
def test_a_least_number_of_bytes_is_met_if_possible_at_the_least_loss(seed):
    tables = random_tables(seed, matrices=4)
    for budget in budgets(tables)[2:]:
        least = int(0.97 * budget)
        try:
            best = brute_force(tables, budget, least)
        except ValueError:  # no choice lies between
            continue
        used, loss = cost(tables, choose(tables, budget, least))
        assert least <= used <= budget and loss <= best * 1.005


def test_a_budget_for_everything_takes_the_best_option_of_each_matrix():
    tables = random_tables(3)
    assert cost(tables, choose(tables, 10**9))[1] == sum(min(c.loss for c in table) for table in tables)


def test_the_exact_budget_of_the_smallest_plan_is_enough_and_one_byte_less_is_refused():
    tables = random_tables(1)
    least = budgets(tables)[0]
    assert cost(tables, choose(tables, least))[0] == least
    with pytest.raises(RecipeError, match=f"takes {least:,} bytes, the budget is {least - 1:,}"):
        choose(tables, least - 1)


def test_options_that_are_larger_and_lose_more_change_nothing_unless_they_fill_the_budget():
    table = [Choice(10, 1.0), Choice(20, 0.5)]
    worse = [Choice(30, 0.7), *table, Choice(10, 1.5)]
    assert [cost([worse], choose([worse], budget)) for budget in (10, 25, 40)] == [(10, 1.0), (20, 0.5), (20, 0.5)]
    assert cost([worse], choose([worse], 40, 28)) == (30, 0.7)


def test_equal_options_and_zero_losses_are_solved():
    tables = [[Choice(10, 0.0), Choice(10, 0.0)], [Choice(5, 1.0)]]
    assert cost(tables, choose(tables, 15)) == (15, 1.0)


def test_no_matrices_give_an_empty_solution():
    assert choose([], 0) == []


@pytest.mark.parametrize("seed", range(4))
def test_one_matrix_larger_than_all_others_together_costs_no_loss(seed):
    """An embedding: its options differ by many bytes, and other matrices must spend the rest."""
    rng, tables = random.Random(seed), random_tables(seed, matrices=40, candidates=12)
    total = sum(max(c.nbytes for c in table) for table in tables)
    large = [Choice(int(total * b / 8), rng.uniform(2, 8) * 4**-b) for b in (3, 4, 5, 6, 8)]
    for budget in budgets([*tables, large])[1:-1]:
        by_hand = []
        for choice in large:
            rest = budget - choice.nbytes
            if rest >= budgets(tables)[0]:
                by_hand.append(choice.loss + cost(tables, choose(tables, rest))[1])
        assert cost([*tables, large], choose([*tables, large], budget))[1] <= min(by_hand) * (1 + 1e-3)


SMALL = [[Choice(4, 0.0, frozenset("a")), Choice(10, 1.0)] for _ in range(3)]


def test_shared_items_count_once_and_only_if_needed():
    problem = Problem(SMALL, 22, shared={"a": 10})
    assert problem.nbytes([0, 0, 0]) == 22 and problem.solve() == [0, 0, 0]
    assert problem.nbytes([1, 0, 1]) == 34
    assert Problem(SMALL, 40, shared={"a": 60}).solve() == [1, 1, 1]


def test_overhead_counts_and_a_budget_below_the_smallest_plan_names_it():
    assert Problem(SMALL, 122, overhead=100, shared={"a": 10}).solve() == [0, 0, 0]
    with pytest.raises(RecipeError, match="smallest possible plan takes 122 bytes, the budget is 121"):
        Problem(SMALL, 121, overhead=100, shared={"a": 10}).solve()


@pytest.mark.parametrize("seed", range(5))
def test_a_base_plan_is_changed_in_as_many_matrices_as_allowed_at_the_least_loss(seed):
    tables = random_tables(seed, matrices=6)
    budget = budgets(tables)[3]
    base = choose(tables, budgets(tables)[4])
    for most in (1, 2, 6):
        allowed = [
            picked
            for picked in itertools.product(*(range(len(table)) for table in tables))
            if sum(a != b for a, b in zip(picked, base, strict=True)) <= most and cost(tables, picked)[0] <= budget
        ]
        if not allowed:
            with pytest.raises(RecipeError, match=f"with {most} changed matrices at most"):
                choose(tables, budget, base=base, max_changes=most)
            continue
        best = min(cost(tables, picked)[1] for picked in allowed)
        assert cost(tables, choose(tables, budget, base=base, max_changes=most))[1] <= best * (1 + 1e-3)


def test_a_swap_penalty_leaves_a_base_plan_alone_that_is_good_enough():
    tables = random_tables(2, matrices=30, candidates=12)
    budget = budgets(tables)[3]
    base = choose(tables, budget)
    slightly_more = int(1.01 * budget)
    free = choose(tables, slightly_more)
    penalized = choose(tables, slightly_more, base=base, swap_penalty=cost(tables, base)[1])
    assert penalized == base and free != base


def test_the_solution_is_deterministic():
    tables = random_tables(4, matrices=60, candidates=20)
    assert len({tuple(choose(tables, budgets(tables)[2])) for _ in range(3)}) == 1


def test_224_matrices_with_20_options_take_less_than_10_seconds():
    tables = random_tables(5, matrices=224, candidates=20)
    start = time.perf_counter()
    for budget in budgets(tables):
        choose(tables, budget)
    assert (time.perf_counter() - start) / 6 < 10
