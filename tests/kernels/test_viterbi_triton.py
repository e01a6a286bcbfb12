"""The Triton kernel of the Viterbi algorithm against the torch one: on a GPU, or in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/kernels/test_trellis_triton.py
"""

import os

import pytest
import torch

from reallm.kernels import closest_states, ring_states
from reallm.kernels.viterbi import _path

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU and no interpreter")
DEVICE = "cpu" if INTERPRETED else "cuda"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cost(states, targets, values, importance):
    return (importance * (targets - values[states]).square()).sum(1)


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 6), (2, 8), (3, 9), (4, 8)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_the_kernel_finds_paths_as_good_as_the_plain_algorithm(bits, state_bits, weighted, bound):
    from reallm.kernels.viterbi_triton import path

    values, targets = drawn(1 << state_bits), drawn(3, 32, seed=1)
    importance = drawn(3, 32, seed=2).square() if weighted else None
    seam = torch.tensor([1, 0, 2], device=DEVICE) if bound else None
    found, expected = (f(targets, values, bits, importance, seam) for f in (path, _path))
    one = torch.ones_like(targets) if importance is None else importance
    torch.testing.assert_close(cost(found, targets, values, one), cost(expected, targets, values, one))
    assert torch.equal(found[:, 1:] >> bits, found[:, :-1] & ((1 << (state_bits - bits)) - 1))


@pytest.mark.skipif(INTERPRETED, reason="16 state bits take minutes in the interpreter")
def test_rings_of_16_state_bits_on_a_gpu_are_as_good_as_on_a_processor():
    values, targets = drawn(1 << 16), drawn(4, 256, seed=1)
    errors = []
    for device in ("cuda", "cpu"):
        codes = closest_states(targets.to(device), values.to(device), 2) & 3
        decoded = values.to(device)[ring_states(codes, 2, 16)]
        errors.append((decoded - targets.to(device)).square().mean().item())
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
