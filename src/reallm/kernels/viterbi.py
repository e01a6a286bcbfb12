"""Bit-shift trellis codes: sequences whose every value is read off a window of the bit stream.

The stream of a sequence has `bits` bits a value and is closed to a ring. State t is the window of the last
`state_bits` bits up to value t; a table of 2^state_bits values says what each state stands for. Neighbouring
windows overlap, so that few stored bits choose among many values: the trellis-coded quantisation of QTIP
(Tseng et al., arXiv:2406.11235). The best stream is found by Viterbi's algorithm.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.backend import has_triton

_MIXING = ((0x9E3779B1, 0), (0x85EBCA6B, 1), (0xC2B2AE35, 0))  # odd factors, and how much less to shift
# Decisions kept for the way back, a byte each: what bounds the sequences of one pass.
_TRACE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


@functools.lru_cache(maxsize=32)
def quantile_of_state(bits: int, state_bits: int) -> Int[Tensor, " states"]:
    """Which of 2^state_bits quantiles each state stands for, each one once.

    The states that can follow one another, which differ in their last `bits` bits, lie in different
    2^-bits parts of the distribution, at the same place within their part: their choice is as good as that of a
    scalar code with an offset, and the hashed offset is what makes the windows look independent. A plain hash
    of the state loses 0.003 in squared error at 12 state bits and 2 bits
    (docs/experiments/values-of-trellis-states.md).
    """
    state = torch.arange(1 << state_bits)
    before, newest = state >> bits, state & ((1 << bits) - 1)
    place = _hash_bits(before, state_bits - bits)
    part = newest ^ (place & ((1 << bits) - 1))
    return (part << (state_bits - bits)) + place


def _hash_bits(values: Int[Tensor, " n"], width: int) -> Int[Tensor, " n"]:
    """A bijection of the numbers below 2^width: odd factors and shifts, each of which can be undone."""
    mask, found = (1 << width) - 1, values
    for factor, less in _MIXING:
        found = (found * factor) & mask
        found = found ^ (found >> max(1, width // 2 - less))
    return found


def ring_states(codes: Int[Tensor, "n steps"], bits: int, state_bits: int) -> Int[Tensor, "n steps"]:
    """The window of the last `state_bits` bits at every step of a ring of `bits`-bit codes."""
    states = torch.zeros_like(codes, dtype=torch.int64)
    for age in range(-(-state_bits // bits)):
        states |= torch.roll(codes, age, 1).long() << (bits * age)
    return states & ((1 << state_bits) - 1)


def closest_states(
    targets: Float[Tensor, "n steps"],
    values: Float[Tensor, " states"],
    bits: int,
    importance: Float[Tensor, "n steps"] | None = None,
) -> Int[Tensor, "n steps"]:
    """The states of rings whose values are close to `targets` in (weighted) squared distance; last bits are the codes.

    The best ring would need a search for each state to begin in; as QTIP does, a first pass over the ring cut
    at the opposite side finds the state at the seam, a second one is bound to begin and end there. The search looks at
    values in float16, which is half the memory to go through at each step and finds the same errors to five digits.
    """
    steps, states = targets.shape[1], len(values)
    values = values.to(torch.float16)
    trace = _TRACE_BYTES.get(targets.device.type, _TRACE_BYTES["cpu"])
    count = max(1, trace // (steps * (states >> bits)))
    weights = [None] * -(-len(targets) // count) if importance is None else importance.split(count)
    found = [
        _search_ring(part, values, bits, weight) for part, weight in zip(targets.split(count), weights, strict=True)
    ]
    return torch.cat(found) if found else targets.long()


def _search_ring(targets: Tensor, values: Tensor, bits: int, importance: Tensor | None) -> Int[Tensor, "n steps"]:
    path, half = _path_implementation(targets.device.type), targets.shape[1] // 2
    turned = None if importance is None else torch.roll(importance, -half, 1)
    seam = path(torch.roll(targets, -half, 1), values, bits, turned, None)[:, targets.shape[1] - half] >> bits
    return path(targets, values, bits, importance, seam)


@functools.cache
def _path_implementation(device: str) -> Callable[[Tensor, Tensor, int, Tensor | None, Tensor | None], Tensor]:
    """The Triton kernel on a GPU where there is Triton, else `_path`."""
    if has_triton(device):
        return importlib.import_module("reallm.kernels.viterbi_triton").path
    return _path


def _path(
    targets: Tensor, values: Tensor, bits: int, importance: Tensor | None, seam: Tensor | None = None
) -> Int[Tensor, "n steps"]:
    """The best states; with `seam`, its bits are those before the first value and the last ones at the end."""
    n, steps = targets.shape
    fan, shared = 1 << bits, len(values) >> bits  # a state's successors; windows without their newest code
    by_window = values.to(targets.dtype).view(shared, fan)

    def step_cost(step: int) -> Tensor:
        distance = (targets[:, step, None, None] - by_window).square_()
        return distance if importance is None else distance.mul_(importance[:, step, None, None])

    cost = step_cost(0)
    if seam is not None:
        elsewhere = torch.arange(shared, device=seam.device) != seam[:, None]
        cost = cost.masked_fill(elsewhere[..., None], float("inf"))
    decisions = torch.empty(steps, n, shared, dtype=torch.uint8, device=targets.device)
    for step in range(1, steps):
        # States that differ in their oldest code only go on to the same states: the better one stays.
        least, oldest = cost.view(n, fan, shared).min(1)
        decisions[step] = oldest
        cost = step_cost(step).add_(least[..., None])
    return _traceback(cost.view(n, fan, shared), decisions, bits, seam)


def _traceback(cost: Tensor, decisions: Tensor, bits: int, seam: Tensor | None) -> Tensor:
    (steps, n, shared), lanes = decisions.shape, torch.arange(len(cost), device=cost.device)
    state = cost.view(n, -1).argmin(1) if seam is None else cost[lanes, :, seam].argmin(1) * shared + seam
    states = torch.empty(n, steps, dtype=torch.int64, device=cost.device)
    for step in range(steps - 1, -1, -1):
        states[:, step] = state
        window = state >> bits
        state = decisions[step, lanes, window].long() * shared + window
    return states
