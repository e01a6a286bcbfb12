"""Triton kernel of the Viterbi algorithm of `viterbi.py`: one launch per pass.

Importable only with Triton, which torch's CUDA builds for Linux install.
"""

from __future__ import annotations

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from reallm.kernels.jit import device_guard, jit_kernel

# Windows per block of a program, and its warps: the fastest of 512 … 8,192 and 4 … 32 on an H100 at 16 state bits.
# 96 rings at 2 bits take 1.3 ms; the torch implementation takes 39 ms.
_BLOCK = 4096
_WARPS = 32


def path(
    targets: Float[Tensor, "n steps"],
    values: Float[Tensor, " states"],
    bits: int,
    importance: Float[Tensor, "n steps"] | None = None,
    seam: Int[Tensor, " n"] | None = None,
) -> Int[Tensor, "n steps"]:
    """Return the best states of rings, one program per ring; `seam` and `importance` as in `viterbi._path`."""
    n, steps = targets.shape
    shared = len(values) >> bits
    scratch = torch.empty(n, 2, shared, dtype=torch.float32, device=targets.device)
    decisions = torch.empty(n, steps, shared, dtype=torch.uint8, device=targets.device)
    states = torch.empty(n, steps, dtype=torch.int32, device=targets.device)
    block = min(shared, _BLOCK)
    with device_guard(targets):
        _viterbi[(n,)](
            targets.contiguous(),
            targets if importance is None else importance.contiguous(),
            values.contiguous(),
            targets if seam is None else seam,
            scratch,
            decisions,
            states,
            steps=steps,
            shared=shared,
            bits=bits,
            block=block,
            weighted=importance is not None,
            bound=seam is not None,
            num_warps=max(1, min(_WARPS, block // 32)),
        )
    return states.long()


@jit_kernel
def _viterbi(
    targets,
    importance,
    values,
    seams,
    scratch,
    decisions,
    states,
    steps: tl.constexpr,
    shared: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    weighted: tl.constexpr,
    bound: tl.constexpr,
):
    fan: tl.constexpr = 1 << bits
    ring = tl.program_id(0).to(tl.int64)
    targets += ring * steps
    importance += ring * steps
    states += ring * steps
    scratch += ring * 2 * shared
    decisions += ring * steps * shared
    seam = tl.load(seams + ring) if bound else 0

    # Least cost of each window so far: any window may be the first, or only the one at the seam.
    for first in range(0, shared, block):
        window = first + tl.arange(0, block)
        least = tl.where(window == seam, 0.0, float("inf")) if bound else tl.zeros([block], tl.float32)
        tl.store(scratch + window, least)
    tl.debug_barrier()

    for step in range(steps):
        before = scratch + (step % 2) * shared
        after = scratch + ((step + 1) % 2) * shared
        target = tl.load(targets + step)
        weight = tl.load(importance + step) if weighted else 1.0
        for first in range(0, shared, block):
            window = first + tl.arange(0, block)
            # States that differ only in their oldest code have the same successors: the better one survives.
            best = tl.full([block], float("inf"), tl.float32)
            chosen = tl.zeros([block], tl.int32)
            for oldest in tl.static_range(fan):
                state = oldest * shared + window
                distance = target - tl.load(values + state).to(tl.float32)
                cost = distance * distance * weight + tl.load(before + (state >> bits))
                chosen = tl.where(cost < best, oldest, chosen)
                best = tl.minimum(cost, best)
            tl.store(after + window, best)
            tl.store(decisions + step * shared + window, chosen.to(tl.uint8))
        # The next step reads values written by other threads of this program.
        tl.debug_barrier()

    if bound:
        window_now = seam.to(tl.int32)
    else:
        last = scratch + (steps % 2) * shared
        lowest = tl.full([], float("inf"), tl.float32)
        window_now = tl.zeros([], tl.int32)
        for first in range(0, shared, block):
            cost = tl.load(last + first + tl.arange(0, block))
            here = tl.min(cost, 0)
            window_now = tl.where(here < lowest, first + tl.argmin(cost, 0), window_now)
            lowest = tl.minimum(here, lowest)
    for back in range(steps):
        step = steps - 1 - back
        state = tl.load(decisions + step * shared + window_now).to(tl.int32) * shared + window_now
        tl.store(states + step, state)
        window_now = state >> bits
