import pytest
import torch

from reallm.fit import Objective, fit
from reallm.formats import from_spec
from reallm.kernels import side_by_side

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
SPECS = [
    {"format": "rotated", "base": {"format": "trellis", "bits": 2, "state_bits": 12}},
    {"format": "rotated", "base": {"format": "e8", "bits": 3}},
    {"format": "scaled", "base": {"format": "rotated", "base": {"format": "entropy_coded", "bits": 2.0}}},
    {"format": "codebook", "index_bits": 6, "vector_dim": 2},
    {"format": "uniform", "bits": 3},
]


def test_without_a_gpu_each_piece_begins_when_it_is_asked_for():
    begun = []
    results = side_by_side([lambda n=n: begun.append(n) or n for n in range(3)], "cpu")
    assert begun == []
    assert next(results) == 0 and begun == [0]
    assert list(results) == [1, 2]


@needs_gpu
def test_fits_in_streams_of_their_own_are_those_of_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 192, generator=generator)
    objective = Objective.of_outputs((inputs.T @ inputs / 512).cuda())
    formats = [from_spec(spec) for spec in SPECS * 4]
    weights = [torch.randn(128, 192, generator=generator).cuda() for _ in formats]

    def decoded(fmt, weight):
        with torch.no_grad():
            return fmt.decode(fit(fmt, weight, objective), (128, 192))

    work = [lambda fmt=fmt, weight=weight: decoded(fmt, weight) for fmt, weight in zip(formats, weights, strict=True)]
    together, alone = (list(side_by_side(work, "cuda", at_once)) for at_once in (True, False))
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_a_mistake_in_a_thread_is_raised_where_its_result_is_asked_for():
    def wrong():
        raise ValueError("wrong")

    results = side_by_side([lambda: 1, wrong], "cuda")
    with pytest.raises(ValueError, match="wrong"):
        list(results)
