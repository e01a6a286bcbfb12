"""The `e8` format: its scale, and the lattice word nearest to eight weights without a look at all 65,536."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.feedback import assign_codes
from reallm.fit.kmeans import split_vectors
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.formats import Unpacked
from reallm.formats.e8 import (
    E8,
    FIRST_BITS,
    RATIOS,
    SHIFT,
    VECTOR_DIM,
    UnpackedE8,
    decode_codes,
    e8p_patterns,
    e8p_words,
    short_words,
)
from reallm.kernels import average, nearest_entry

# Scales in units of the root mean square that serve Gaussian entries best, by bits.
_BEST = {2: 0.97, 3: 1.0, 4: 1.11}
# Around it: the optimum is flat (at 2 bits 3 % off costs 0.2 to 0.6 %), and heavier tails want larger scales.
_MULTIPLES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.6)
_SAMPLES = 1 << 11
_ROUNDS = 1  # of sweeps and refits; the second gains a tenth of the first
# Scores of one chunk, about 128 a vector: 2 MB stay in a CPU's cache; a GPU wants few and large chunks.
_VECTORS_PER_CHUNK = {"cpu": 1 << 12}
_VECTORS_PER_CHUNK_ELSEWHERE = 1 << 17


@fit.register
def fit_e8(
    fmt: E8, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedE8:
    """The scale that serves a sample best and the nearest words; with a hessian error feedback, a sweep and a refit."""
    objective = objective or Objective.plain(weight)
    scale = best_scale(weight, objective, fmt.bits, seed)
    unpacked = UnpackedE8(assign_codes(weight, E8Coder(fmt.bits, scale), objective), scale)
    if objective.hessian is None:
        return unpacked
    return alternate(fmt, unpacked, weight, objective, (("scales",),), lambda p: E8Coder(fmt.bits, p.scales), _ROUNDS)


def best_scale(weight: Float[Tensor, "out in"], objective: Objective, bits: int, seed: int = 0) -> Float[Tensor, " 1"]:
    """The multiple of the root mean square with the least importance-weighted error on vectors drawn by `seed`."""
    vectors = split_vectors(weight, VECTOR_DIM)
    importance = split_vectors(objective.importance.expand_as(weight), VECTOR_DIM)
    if len(vectors) > _SAMPLES:
        generator = torch.Generator(device=weight.device).manual_seed(seed)
        chosen = torch.randint(len(vectors), (_SAMPLES,), generator=generator, device=weight.device)
        vectors, importance = vectors[chosen], importance[chosen]
    middle = _BEST[bits] * _root_mean_square(weight)
    scales = [middle * multiple for multiple in _MULTIPLES]
    sampled = Objective(importance)
    errors = [sampled.error(vectors, E8Coder(bits, s).encode(vectors, 0, importance)[1]) for s in scales]
    return scales[min(range(len(scales)), key=errors.__getitem__)]


@dataclass(frozen=True)
class E8Coder:
    """Rounds eight columns at a time to words times `scale`."""

    bits: int
    scale: Float[Tensor, " 1"]

    width: ClassVar[int] = VECTOR_DIM

    def encode(
        self, columns: Float[Tensor, "out columns"], start: int, importance: Float[Tensor, "rows columns"]
    ) -> tuple[Int[Tensor, "out vectors"], Float[Tensor, "out columns"]]:
        """Codes and decoded values; what fills a short vector has no importance, and so costs nothing."""
        # A zero matrix has the scale 0.
        vectors = split_vectors(columns / torch.where(self.scale > 0, self.scale, 1.0), VECTOR_DIM)
        importance = split_vectors(importance.expand_as(columns), VECTOR_DIM)
        chunk = _VECTORS_PER_CHUNK.get(columns.device.type, _VECTORS_PER_CHUNK_ELSEWHERE)
        pairs = zip(vectors.split(chunk), importance.split(chunk), strict=True)
        codes = torch.cat([nearest_codes(*pair, self.bits) for pair in pairs]).view(len(columns), -1)
        return codes, decode_codes(codes, self.bits).flatten(1)[:, : columns.shape[1]] * self.scale


def nearest_codes(vectors: Float[Tensor, "n 8"], importance: Float[Tensor, "n 8"], bits: int) -> Int[Tensor, " n"]:
    """Codes at small weighted squared distance: the nearest of 2 bits, and of more the best of four first stages."""
    # Only ratios inside a vector matter; their size could under- or overflow.
    importance = importance / importance.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    first = finalists(vectors, importance)
    remainders = vectors[:, None] - e8p_words(vectors.device)[first]
    importance = importance[:, None].expand_as(remainders)
    codes = first
    if bits > 2:
        second = _second_stage(remainders.flatten(0, 1) / RATIOS[bits], importance.flatten(0, 1), bits).view_as(first)
        codes = first | second << FIRST_BITS
        remainders = vectors[:, None] - decode_codes(codes, bits)
    best = (importance * remainders.square()).sum(2).argmin(1, keepdim=True)
    return codes.gather(1, best)[:, 0]


def finalists(vectors: Float[Tensor, "n 8"], importance: Float[Tensor, "n 8"]) -> Int[Tensor, "n 4"]:
    """The nearest word for each shift and each parity of minus signs; the nearest of all is among them.

    With signs free the nearest word has those of the vector. Where their number has the wrong parity, the
    coordinate of least importance · magnitude takes the other sign. With equal importance that is exact for patterns
    that come with all their permutations: swapping its magnitude with another's never makes it worse.
    """
    found = []
    for shift_bit, shift in enumerate((SHIFT, -SHIFT)):
        moved = vectors - shift
        minus = moved < 0
        cheapest = torch.zeros_like(minus).scatter_(1, (importance * moved.abs()).argmin(1, keepdim=True), True)
        odd = minus.sum(1, keepdim=True) % 2 == 1
        for parity in (False, True):
            signs = minus ^ (cheapest & (odd != parity))
            aligned = torch.where(signs, -moved, moved)
            table, patterns = _parity_patterns(parity, vectors.device)
            # Σ h (a - p)² / 2 without the term of h a², which is the same for all patterns p.
            pattern = patterns[(torch.cat([importance, importance * aligned], 1) @ table).argmin(1)]
            found.append(pattern | _pack_signs(signs[:, :7]) << 8 | shift_bit << 15)
    return torch.stack(found, 1)


@functools.cache
def _parity_patterns(odd: bool, device: torch.device) -> tuple[Float[Tensor, "16 n"], Int[Tensor, " n"]]:
    """Patterns of odd or even sum as columns (p² / 2, -p), and their numbers."""
    with torch.inference_mode(False):
        patterns = e8p_patterns(device)
        numbers = (patterns.sum(1) % 2 == odd).nonzero()[:, 0]
        patterns = patterns[numbers]
        return torch.cat([patterns.square() / 2, -patterns], 1).T.contiguous(), numbers


def _pack_signs(bits: Tensor) -> Int[Tensor, " n"]:
    """Numbers whose bit i is column i."""
    return (bits.long() << torch.arange(bits.shape[1], device=bits.device)).sum(1)


def _second_stage(vectors: Float[Tensor, "n 8"], importance: Float[Tensor, "n 8"], bits: int) -> Int[Tensor, " n"]:
    if bits == 3:
        return nearest_entry(vectors, short_words(vectors.device), importance).long()
    return nearest_codes(vectors, importance, bits=2)


def _root_mean_square(weight: Float[Tensor, "out in"]) -> Float[Tensor, " 1"]:
    """Over the whole matrix; squares of tiny weights would be 0 in float32."""
    return average(weight.double().square()).sqrt().to(torch.float32).view(1)
