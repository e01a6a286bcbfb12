"""A short run of benchmarks/fuzz.py; results/fuzz.json holds one of 10,000 mutants."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_benchmark", ROOT / "benchmarks" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their module
    spec.loader.exec_module(module)
    # With types checked at run time a plan of every format takes 10 s in place of 1.4, and more beside other work.
    module.SECONDS = 120
    return module


@pytest.mark.slow
def test_every_mutant_loads_or_is_refused_by_one_error(fuzz):
    outcomes = fuzz.fuzz(120, seed=1)
    assert outcomes.failures == []
    assert sum(outcomes.loaded.values()) + sum(outcomes.refused.values()) == 120
    # A fuzzer that only ever meets one of the two tells nothing.
    assert sum(outcomes.loaded.values()) > 5 and len(outcomes.refused) > 6


def test_the_fuzzer_notices_what_is_not_a_reallm_error(fuzz):
    outcomes = fuzz.Outcomes(0)

    def crash():
        raise IndexError("ours")

    def wait():
        while True:
            pass

    outcomes.run("crash", 0, crash)
    fuzz.SECONDS = 1
    outcomes.run("hang", 1, wait)
    assert [failure["mutation"] for failure in outcomes.failures] == ["crash", "hang"]
