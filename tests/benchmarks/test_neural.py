"""What `benchmarks/neural.py` compares an arm with."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def neural(monkeypatch):
    """The module; benchmarks import each other by their file names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("neural")


def test_bits_of_vector_quantisation_lie_on_the_lower_hull_of_its_arms(neural):
    curve = [(1.0, 0.5), (2.0, 0.25), (2.5, 0.24), (3.0, 0.125)]  # the third is worse than a mixture of its neighbours
    assert neural.vq_bits(0.5, curve) == 1.0
    assert neural.vq_bits(2**-2.5, curve) == pytest.approx(2.5)
    assert neural.vq_bits(0.6, curve) is None and neural.vq_bits(0.01, curve) is None


def test_every_arm_is_a_format_and_has_a_name_of_its_own(neural):
    formats = [neural.from_spec(arm.spec) for arm in neural.ARMS]
    assert len({arm.name for arm in neural.ARMS}) == len(neural.ARMS)
    assert all(
        bool(fmt.shared_decoders()) == (arm.spec.get("shared", arm.spec.get("base", {}).get("shared", "")) != "")
        for fmt, arm in zip(formats, neural.ARMS, strict=True)
    )
    parameters = [neural.parameters_of(fmt) for fmt, arm in zip(formats, neural.ARMS, strict=True) if arm.group == "c"]
    assert min(parameters) < 1e4 and max(parameters) > 4e6


def test_a_shared_decoder_is_charged_to_all_its_matrices(neural):
    generator = torch.Generator().manual_seed(0)
    matrices = {("q", block): torch.randn(32, 64, generator=generator) for block in range(3)}
    bench = neural.Bench(matrices, torch.device("cpu"))
    spec = neural.codeword(4, 4, hidden=2, shared="x")
    alone, three = (
        bench.run(neural.Task("q", 1, source, neural.Arm("a", "tiny", spec, share)))
        for source, share in ((neural.ORIGINAL, 1), (neural.SHUFFLED, 3))
    )
    table = 8 * sum(t.nbytes for t in neural.from_spec(spec).shared_decoders()["x"].layout.values()) / (32 * 64)
    assert alone["bits"] - three["bits"] == pytest.approx(table * 2 / 3)
    assert 0 < three["relative_error"] < 1


def test_an_order_is_paid_for_and_finds_in_a_shuffled_copy_what_it_found_in_the_matrix(neural):
    generator = torch.Generator().manual_seed(0)
    curve = torch.linspace(0, 6, 64)
    weight = torch.sin(curve[:, None] + 2 * curve) + 0.05 * torch.randn(64, 64, generator=generator)
    rows, columns = (torch.randperm(64, generator=generator) for _ in range(2))
    bench = neural.Bench({("q", 0): weight[rows][:, columns]}, torch.device("cpu"))
    base = neural.vectors(4, 2)

    def ran(spec, source):
        return bench.run(neural.Task("q", 0, source, neural.Arm("order", "tiny", spec)))

    plain = ran(base, neural.ORIGINAL)
    real, shuffled = (ran(neural.ordered("greedy", base), source) for source in (neural.ORIGINAL, neural.SHUFFLED))
    assert real["bits"] - plain["bits"] == pytest.approx(2 * 64 * 6 / 64**2)  # 64 rows, 64 columns, 6 bits each
    assert real["relative_error"] < plain["relative_error"] / 2
    assert real["relative_error"] == pytest.approx(shuffled["relative_error"], rel=0.2)


def test_arms_with_orders_name_the_same_vectors_with_and_without_a_net(neural):
    groups = {arm.name: arm for arm in neural.ORDER_ARMS}
    for order in neural.ORDERS:
        alone = groups[f"{order} codebook d=4, 8 bits"].spec
        net = groups[f"{order} conv 2×2, width 8, codebook d=4, 1 matrices"].spec
        assert (alone["method"], alone["rows"], alone["base"]) == (net["method"], net["rows"], net["base"]["base"])


def test_a_shared_decoder_can_train_for_fewer_steps_than_each_matrix_takes(neural, monkeypatch):
    matrices = {("q", block): torch.randn(16, 32) for block in range(2)}
    bench = neural.Bench(matrices, torch.device("cpu"))
    spec = neural.ordered("sort", neural.conv(4, 2, 1, neural.vectors(2, 2, 16), steps=5, shared="x"))
    arm = neural.Arm("order", "tiny", spec, 2, training_steps=3)
    steps, train = [], neural.train_shared_decoder
    monkeypatch.setattr(neural, "train_shared_decoder", lambda fmt, *rest: steps.append(fmt.steps) or train(fmt, *rest))
    row = bench.run(neural.Task("q", 0, neural.ORIGINAL, arm))
    assert steps == [3] and row["training_steps"] == 3 and row["format"]["base"]["steps"] == 5


def chosen(neural, **options):
    defaults = {"device": "cuda", "first": True, "groups": None, "only": None, "control_depths": None}
    places = {"roles": ["q"], "depths": [0, 2], "sources": [neural.ORIGINAL, neural.SHUFFLED, neural.SMOOTH]}
    return neural.tasks_of(
        argparse.Namespace(**defaults, **places)
        if not options
        else argparse.Namespace(**{**defaults, **places, **options})
    )


def test_controls_come_after_all_matrices_as_they_are_and_at_the_first_depth_alone(neural):
    tasks = chosen(neural)
    plain = [task for task in tasks if task.source == neural.ORIGINAL]
    assert tasks[: len(plain)] == plain and len(plain) == 2 * len(neural.FIRST)
    assert {task.block for task in tasks[len(plain) :]} == {0}
    assert [task.arm.name for task in plain[::2]] == list(neural.FIRST)
    assert {task.block for task in chosen(neural, control_depths=[2]) if task.source == neural.SHUFFLED} == {2}
    assert {task.arm.name for task in chosen(neural, only=["rotated trellis"])} == set(neural.FIRST[:2])


def test_a_word_that_ends_with_a_bar_asks_for_the_arm_whose_name_ends_there(neural):
    for word, count in (("a | codeword d=8, 12 bits", 7), ("a | codeword d=8, 12 bits |", 1)):
        assert len({task.arm.name for task in chosen(neural, first=False, only=[word])}) == count


def test_a_decoder_of_all_matrices_is_trained_once(neural, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrices = {("q", block): torch.randn(16, 32, generator=generator) for block in range(3)}
    bench = neural.Bench(matrices, torch.device("cpu"))
    spec = neural.codeword(4, 4, hidden=2, shared="x")
    tasks = [neural.Task("q", block, neural.ORIGINAL, neural.Arm("a", "all", spec, 30)) for block in range(3)]
    tasks.insert(1, neural.Task("q", 0, neural.ORIGINAL, neural.Arm("a", "two", spec, 2)))
    jobs = neural.jobs_of(bench, tasks)
    assert [[task.block for task in job] for job in jobs] == [[0, 1, 2], [0]]
    trained, train = [], neural.train_shared_decoder
    monkeypatch.setattr(neural, "train_shared_decoder", lambda *args: trained.append(1) or train(*args))
    rows = [bench.run(task) for task in jobs[0]]
    assert len(trained) == 1 and len({row["relative_error"] for row in rows}) == 3


def test_only_the_arms_with_neural_formats_let_the_solver_choose_them(neural):
    names = {bits: [name for name in neural.SOLVED if neural.SOLVED[name][0] == bits] for bits in (2.0, 2.5)}
    for without, with_them in names.values():
        assert "codeword" not in str(neural.SOLVED[without][1]) and "codeword" in str(neural.SOLVED[with_them][1])
    assert sorted(neural.END_TO_END) == sorted([*neural.EVERYWHERE, *neural.SOLVED])
