"""Nearest entry of a codebook."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Distances per chunk: 2**22 floats are 16 MB, half of which fits in a CPU cache; larger is slower. A GPU needs few and
# large chunks: with 65,536 entries 2**22 distances are 64 vectors, and launches would take longer than the work.
_DISTANCES_PER_CHUNK = {"cpu": 1 << 22}
_DISTANCES_PER_CHUNK_ELSEWHERE = 1 << 26


def nearest_level(values: Float[Tensor, "..."], levels: Float[Tensor, " levels"]) -> Int[Tensor, "..."]:
    """Return the index of the nearest of the sorted `levels`; a value halfway between two takes the lower."""
    between = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values, between, out_int32=True)


def nearest_entry(
    vectors: Float[Tensor, "n dim"],
    codebook: Float[Tensor, "entries dim"],
    importance: Float[Tensor, "n dim"] | None = None,
    table: Float[Tensor, "twice_dim entries"] | None = None,
) -> Int[Tensor, " n"]:
    """Return the index of the entry at the smallest squared distance, each coordinate weighted by `importance`.

    `table` is the codebook's `entry_table`, precomputed for many calls.
    """
    distances = _DISTANCES_PER_CHUNK.get(vectors.device.type, _DISTANCES_PER_CHUNK_ELSEWHERE)
    chunk = max(1, distances // len(codebook))
    # argmin Σ h (v - c)² = argmin Σ h c²/2 - h v c: the term h v² is the same for all entries.
    if importance is None:
        half_norms = codebook.square().sum(1) / 2
        codes = [torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1) for part in vectors.split(chunk)]
    else:
        table = entry_table(codebook) if table is None else table
        codes = [
            (torch.cat([weight, weight * part], 1) @ table).argmin(1)
            for part, weight in zip(vectors.split(chunk), importance.split(chunk), strict=True)
        ]
    if not codes:
        return vectors.new_empty(0, dtype=torch.int32)
    return (codes[0] if len(codes) == 1 else torch.cat(codes)).to(torch.int32)


def entry_table(codebook: Float[Tensor, "entries dim"]) -> Float[Tensor, "twice_dim entries"]:
    """Return the matrix T with (h, h v) @ T = half the distances of vector v with importance h, minus Σ h v² / 2."""
    return torch.cat([codebook.square() / 2, -codebook], 1).T
