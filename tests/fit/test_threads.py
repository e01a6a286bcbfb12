"""One seed gives the same bytes whatever the number of threads."""

import filecmp
import importlib.util
from pathlib import Path

import pytest
import torch

import reallm
from reallm.fit import Objective, fit
from reallm.formats import from_spec
from reallm.kernels import one_thread, total

CONTRACT = Path(__file__).parents[1] / "formats" / "test_contract.py"
spec = importlib.util.spec_from_file_location("contract_for_threads", CONTRACT)
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)

SHAPE = (40, 840)  # 33,600 numbers: torch shares more than 32,768 among threads; 840 = 8 · 105
FED_BACK = [
    {"format": "uniform", "bits": 3},
    {"format": "low_rank_plus", "rank": 3, "base": {"format": "codebook", "index_bits": 4}},
    {"format": "rotated", "base": {"format": "normal_float", "bits": 3}},
]


@pytest.fixture
def with_threads():
    """with_threads(make): what it makes with one thread, and with two."""

    def both(make):
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(make())
            return found
        finally:
            torch.set_num_threads(before)

    return both


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# One of each format; what is around a base adds no sum of its own but a residual.
OF_EACH = {example["format"]: example for example in reversed(contract.EXAMPLES)}


@pytest.mark.parametrize("example", OF_EACH.values(), ids=contract.name_of)
def test_bytes_do_not_depend_on_the_number_of_threads(with_threads, example):
    fmt, weight = from_spec(example), contract.weight_of(SHAPE)
    objective = Objective.relative_columns
    assert same(*with_threads(lambda: fmt.pack(fit(fmt, weight, objective(weight), seed=3), SHAPE)))


@pytest.mark.parametrize("example", FED_BACK, ids=contract.name_of)
def test_bytes_with_error_feedback_do_not_depend_on_the_number_of_threads(with_threads, example):
    fmt, weight = from_spec(example), contract.weight_of(SHAPE)
    inputs = torch.randn(400, SHAPE[1], generator=torch.Generator().manual_seed(1))
    hessian = (inputs.T @ inputs / 400).contiguous()
    assert same(*with_threads(lambda: fmt.pack(fit(fmt, weight, Objective.output_error(hessian), seed=3), SHAPE)))


def test_a_calibrated_artifact_does_not_depend_on_the_number_of_threads(with_threads, tiny_llama, text_file, tmp_path):
    made = iter(range(2))

    def compress():
        out = tmp_path / f"out{next(made)}"
        options = {"calibration": (str(text_file),), "calibration_windows": 2, "calibration_context": 64}
        reallm.compress(tiny_llama, out, recipe="rtn3", rank=2, **options)
        return out

    first, second = with_threads(compress)
    names = sorted(path.name for path in first.iterdir())
    assert "model.safetensors" in names and not any(filecmp.cmpfiles(first, second, names, shallow=False)[1:])


def test_a_total_is_the_sum_of_everything(with_threads):
    for count in (0, 1, 1023, 1024, 1025, 2_000_003):
        values = torch.randn(count, generator=torch.Generator().manual_seed(0))
        first, second = with_threads(lambda values=values: total(values, torch.float64))
        assert first == second
        torch.testing.assert_close(first, values.double().sum())


def test_one_thread_gives_the_threads_back(with_threads):
    def number():
        with one_thread():
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    (first, one), (second, several) = with_threads(number)
    assert first == second == one == 1 and several > 1
