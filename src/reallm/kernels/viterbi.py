"""Bit-shift trellis codes: each value of a sequence is decoded from a sliding window of the bit stream.

The stream has `bits` bits per value and is circular (tail-biting). State t is the window of the last `state_bits` bits
up to value t; a table of 2^state_bits values gives the value of each state. Consecutive windows overlap, so that few
stored bits choose among many values: the trellis-coded quantisation of QTIP (Tseng et al., arXiv:2406.11235). The
Viterbi algorithm finds the best stream.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.backend import has_triton

_MIXING = ((0x9E3779B1, 0), (0x85EBCA6B, 1), (0xC2B2AE35, 0))  # odd factors, and reductions of the shift
# Decisions stored for the traceback, one byte each: they bound the sequences of one pass.
_TRACE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


@functools.lru_cache(maxsize=32)
def quantile_of_state(bits: int, state_bits: int) -> Int[Tensor, " states"]:
    """Return the quantile index of each state: a permutation of 2^state_bits quantiles.

    The states that can follow one another, which differ in their last `bits` bits, lie in different
    2^-bits parts of the distribution, at the same place within their part: their choice is as good as that of a
    scalar code with an offset, and the hashed offset is what makes the windows look independent. A plain hash
    of the state loses 0.003 in squared error at 12 state bits and 2 bits
    (docs/experiments/values-of-trellis-states.md).
    """
    state = torch.arange(1 << state_bits)
    before, newest = state >> bits, state & ((1 << bits) - 1)
    offset = _hash_bits(before, state_bits - bits)
    fraction = newest ^ (offset & ((1 << bits) - 1))
    return (fraction << (state_bits - bits)) + offset


def _hash_bits(values: Int[Tensor, " n"], width: int) -> Int[Tensor, " n"]:
    """Apply a bijection of the integers below 2^width: invertible steps of odd factors and shifts."""
    mask, hashed = (1 << width) - 1, values
    for factor, less in _MIXING:
        hashed = (hashed * factor) & mask
        hashed = hashed ^ (hashed >> max(1, width // 2 - less))
    return hashed


def ring_states(codes: Int[Tensor, "n steps"], bits: int, state_bits: int) -> Int[Tensor, "n steps"]:
    """Return the window of the last `state_bits` bits at each step of a ring of `bits`-bit codes."""
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
    """Return the states of rings whose values approximate `targets` in (weighted) squared distance.

    The last `bits` bits of a state are its code. The optimal ring would need one search per initial state. As in QTIP,
    a first pass over the ring, cut at the opposite side, finds the state at the seam; a second pass must start and end
    there. The search reads values in float16: half the memory traffic per step, and the same errors to five digits.
    """
    steps, states = targets.shape[1], len(values)
    values = values.to(torch.float16)
    trace = _TRACE_BYTES.get(targets.device.type, _TRACE_BYTES["cpu"])
    count = max(1, trace // (steps * (states >> bits)))
    weights = [None] * -(-len(targets) // count) if importance is None else importance.split(count)
    found = [
        _search_ring(chunk, values, bits, weight) for chunk, weight in zip(targets.split(count), weights, strict=True)
    ]
    return torch.cat(found) if found else targets.long()


def _search_ring(targets: Tensor, values: Tensor, bits: int, importance: Tensor | None) -> Int[Tensor, "n steps"]:
    path, half = _path_implementation(targets.device.type), targets.shape[1] // 2
    rolled = None if importance is None else torch.roll(importance, -half, 1)
    seam = path(torch.roll(targets, -half, 1), values, bits, rolled, None)[:, targets.shape[1] - half] >> bits
    return path(targets, values, bits, importance, seam)


@functools.cache
def _path_implementation(device: str) -> Callable[[Tensor, Tensor, int, Tensor | None, Tensor | None], Tensor]:
    """Return the Triton kernel on a GPU with Triton, otherwise `_path`."""
    if has_triton(device):
        return importlib.import_module("reallm.kernels.viterbi_triton").path
    return _path


def _path(
    targets: Tensor, values: Tensor, bits: int, importance: Tensor | None, seam: Tensor | None = None
) -> Int[Tensor, "n steps"]:
    """Return the best states; `seam` fixes the bits before the first value, and equally the last bits."""
    n, steps = targets.shape
    fan, shared = 1 << bits, len(values) >> bits  # successors of a state; windows without the newest code
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
        # States that differ only in their oldest code have the same successors: the better one survives.
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
