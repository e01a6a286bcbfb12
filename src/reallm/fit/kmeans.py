"""Seeded weighted k-means, and the codebook format fitted with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.feedback import coded
from reallm.fit.objective import Objective
from reallm.fit.refit import alternated
from reallm.fit.rounding import ByGroups, normalised, signed_largest
from reallm.formats import Parts
from reallm.formats import scales as scale_store
from reallm.formats.codebook import Codebook, CodebookParts
from reallm.formats.normal_float import normal_levels
from reallm.kernels import average, entry_table, nearest_entry, nearest_level, segment_sum

# (vectors (n, dim), importance (n, dim)) -> codes (n,)
Search: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_ITERATIONS = 30
_WARM_ITERATIONS = 5
_ROUNDS = 4  # of refits and new codes under a hessian
# An entry is a mean: 64 samples place it to within an eighth of its cell; more samples only cost time.
_SAMPLES_PER_ENTRY = 64
_LEAST_SAMPLES, _MOST_SAMPLES = 1 << 15, 1 << 19
# A coordinate this close to the largest weight of its group stands for it, and is kept exact.
_OUTERMOST = 0.9
_TINY = 1e-30


@fit.register
def fit_codebook(
    fmt: Codebook, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> CodebookParts:
    """k-means over the group-normalised vectors, every coordinate weighted by its squared scale and importance.

    The weighting makes the sum k-means lowers the objective of the weight itself, not of its normalised form.
    A group is divided by its weight of largest magnitude *with its sign*, so that all outliers become exactly
    1, and entries near 1 are pinned there: a few outlier weights carry a model, and means of neighbours would
    shrink them
    (docs/experiments/data-free-codes.md). With a hessian codes are found with error feedback, and then entries and
    codes improve in turn by the objective (`alternated`), pinned ones too: entries that are refitted while codes stay
    are the fit of ClusComp (Liao et al., arXiv:2503.13089).
    """
    scales = scale_store.stored(fmt.scales, signed_largest(weight, fmt.group_size), signed=True)
    vectors = vectors_of(normalised(weight, scales, fmt.group_size), fmt.vector_dim)
    importance = scale_store.spread(scales.square(), weight.shape[1], fmt.group_size)
    if objective is not None:
        importance = importance * objective.importance
    importance = vectors_of(importance, fmt.vector_dim)
    previous = start.codebook if isinstance(start, CodebookParts) else None
    codebook = kmeans(vectors, importance, fmt.codebook_size, seed, previous)
    codebook = codebook.to(torch.float16).to(torch.float32)
    codes = coded(weight, _CodebookCoder(fmt, codebook, scales), objective)
    parts = CodebookParts(codes, codebook, scales)
    if objective is None or objective.hessian is None:
        return parts
    rounds = _ROUNDS if start is None else 1

    def coder_of(parts: CodebookParts) -> _CodebookCoder:
        return _CodebookCoder(fmt, parts.codebook, parts.scales)

    return alternated(fmt, parts, weight, objective, (("codebook",),), coder_of, rounds)


@dataclass(frozen=True)
class _CodebookCoder(ByGroups):
    """Nearest entries of a codebook, for vectors of neighbouring columns."""

    fmt: Codebook
    codebook: Float[Tensor, "size dim"]
    scales: Float[Tensor, "out groups"]

    @property
    def width(self) -> int:
        return self.fmt.vector_dim

    def encode(self, columns: Tensor, start: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest by the error of the weights themselves: coordinates weighted by squared scale and importance."""
        scales, divided, squares = (
            self.of_columns(values, start, columns.shape[1]) for values in (self.scales, self.divisors, self.squares)
        )
        vectors = vectors_of(columns / divided, self.fmt.vector_dim)
        codes = self._nearest(vectors, vectors_of(squares * importance, self.fmt.vector_dim))
        decoded = self.codebook[codes].view(len(columns), -1)[:, : columns.shape[1]] * scales
        return codes.view(len(columns), -1), decoded

    @functools.cached_property
    def _nearest(self) -> Search:
        return search_of(self.codebook)


def kmeans(
    vectors: Float[Tensor, "n dim"],
    importance: Float[Tensor, "n dim"],
    size: int,
    seed: int = 0,
    start: Float[Tensor, "size dim"] | None = None,
    anchored: bool = True,
) -> Float[Tensor, "size dim"]:
    """`size` entries of small importance-weighted squared distance, by Lloyd's iteration on a sample.

    Vectors lie in [-1, 1]. Starts from `start`, else from the quantiles of a normal in one dimension and
    from drawn vectors in more. Codebooks of more than two entries keep one entry at 0 and pin outermost
    coordinates to ±1; with `anchored` off they do not, and vectors of two coordinates or more may have any size. An
    entry that no vector chooses is moved to the vector that is served worst.
    One-dimensional entries come sorted.
    """
    generator = torch.Generator(device=vectors.device).manual_seed(seed)
    count = min(max(_LEAST_SAMPLES, _SAMPLES_PER_ENTRY * size), _MOST_SAMPLES)
    if len(vectors) > count:
        chosen = torch.randint(len(vectors), (count,), generator=generator, device=vectors.device)
        vectors, importance = vectors[chosen], importance[chosen]
    importance = importance / average(importance).clamp(min=_TINY)
    codebook = _first_entries(vectors, importance, size, generator) if start is None else start
    for _ in range(_ITERATIONS if start is None else _WARM_ITERATIONS):
        codebook = _lloyd_step(vectors, importance, _anchored(codebook) if anchored else codebook)
    return _anchored(codebook) if anchored else codebook


def nearest(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "size dim"], importance: Float[Tensor, "n dim"]
) -> Int[Tensor, " n"]:
    """Index of the nearest entry by the weighted distance."""
    return search_of(codebook)(vectors, importance)


def search_of(codebook: Float[Tensor, "size dim"]) -> Search:
    """`nearest` in one codebook, for many calls."""
    if codebook.shape[1] == 1:
        levels, order = codebook[:, 0].sort(stable=True)  # entries that were refitted may have passed each other
        order = order.to(torch.int32)
        return lambda vectors, importance: order[nearest_level(vectors[:, 0], levels)]
    table = entry_table(codebook)
    return lambda vectors, importance: nearest_entry(vectors, codebook, importance, table)


def vectors_of(matrix: Float[Tensor, "out in"], dim: int) -> Float[Tensor, "n dim"]:
    """Rows cut into vectors; a short last vector is filled with zeros."""
    missing = -matrix.shape[1] % dim
    return (torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix).reshape(-1, dim)


def _first_entries(vectors: Tensor, importance: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if vectors.shape[1] == 1:
        return torch.tensor(normal_levels(size.bit_length() - 1), device=vectors.device)[:, None]
    # Groups of zeros stay possible: something must be drawn.
    probable = importance.mean(1) + average(importance) * 1e-3 + _TINY
    # With fewer vectors than entries some are drawn twice; the copies die and are moved.
    chosen = torch.multinomial(probable, size, replacement=len(vectors) < size, generator=generator)
    return vectors[chosen].clone()


def _anchored(codebook: Tensor) -> Tensor:
    """Sorted if scalar, with outermost coordinates at ±1 and the entry nearest to 0 at 0.

    Groups with one huge weight need the 0: without it all their small weights become noise of its size.
    """
    if len(codebook) > 2:
        codebook = torch.where(codebook.abs() > _OUTERMOST, codebook.sign(), codebook)
        codebook[codebook.square().sum(1).argmin()] = 0
    return codebook.sort(0).values if codebook.shape[1] == 1 else codebook


def _lloyd_step(vectors: Tensor, importance: Tensor, codebook: Tensor) -> Tensor:
    codes = nearest(vectors, codebook, importance).long()
    mass = segment_sum(importance, codes, len(codebook))
    sums = segment_sum(vectors * importance, codes, len(codebook))
    means = torch.where(mass > 0, sums / mass.clamp(min=_TINY), codebook)
    return _revived(vectors, importance, means, codes, (mass > 0).any(1))


def _revived(vectors: Tensor, importance: Tensor, codebook: Tensor, codes: Tensor, alive: Tensor) -> Tensor:
    """Dead entries take the place of the vectors with the largest weighted distance to their own entry."""
    dead = (~alive).nonzero()[:, 0]
    if not len(dead):
        return codebook
    distance = ((vectors - codebook[codes]).square() * importance).sum(1)
    worst = distance.topk(min(len(dead), len(vectors))).indices
    codebook[dead[: len(worst)]] = vectors[worst]
    return codebook
