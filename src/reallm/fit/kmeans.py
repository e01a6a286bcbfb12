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
from reallm.fit.feedback import assign_codes
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.fit.rounding import GroupScaledCoder, normalize, signed_largest
from reallm.formats import Unpacked
from reallm.formats import scales as scale_store
from reallm.formats.codebook import Codebook, UnpackedCodebook
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
    fmt: Codebook, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedCodebook:
    """k-means over the group-normalised vectors, every coordinate weighted by its squared scale and importance.

    The weighting makes the sum k-means lowers the objective of the weight itself, not of its normalised form.
    A group is divided by its weight of largest magnitude *with its sign*, so that all outliers become exactly
    1, and entries near 1 are pinned there: a few outlier weights carry a model, and means of neighbours would
    shrink them (docs/experiments/data-free-codes.md). With a hessian codes are found with error feedback, and then
    entries and codes improve in turn by the objective (`alternate`), pinned ones too: entries refitted while codes stay
    are the fit of ClusComp (Liao et al., arXiv:2503.13089).
    """
    scales = scale_store.fake_quantize(fmt.scales, signed_largest(weight, fmt.group_size), signed=True)
    vectors = split_vectors(normalize(weight, scales, fmt.group_size), fmt.vector_dim)
    importance = scale_store.expand_groups(scales.square(), weight.shape[1], fmt.group_size)
    if objective is not None:
        importance = importance * objective.importance
    importance = split_vectors(importance, fmt.vector_dim)
    previous = start.codebook if isinstance(start, UnpackedCodebook) else None
    codebook = kmeans(vectors, importance, fmt.codebook_size, seed, previous)
    codebook = codebook.to(torch.float16).to(torch.float32)
    codes = assign_codes(weight, _CodebookCoder(fmt, codebook, scales), objective)
    unpacked = UnpackedCodebook(codes, codebook, scales)
    if objective is None or objective.hessian is None:
        return unpacked
    rounds = _ROUNDS if start is None else 1

    def make_coder(unpacked: UnpackedCodebook) -> _CodebookCoder:
        return _CodebookCoder(fmt, unpacked.codebook, unpacked.scales)

    return alternate(fmt, unpacked, weight, objective, (("codebook",),), make_coder, rounds)


@dataclass(frozen=True)
class _CodebookCoder(GroupScaledCoder):
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
            self.expand_columns(values, start, columns.shape[1])
            for values in (self.scales, self.divisors, self.squares)
        )
        vectors = split_vectors(columns / divided, self.fmt.vector_dim)
        codes = self._nearest(vectors, split_vectors(squares * importance, self.fmt.vector_dim))
        decoded = self.codebook[codes].view(len(columns), -1)[:, : columns.shape[1]] * scales
        return codes.view(len(columns), -1), decoded

    @functools.cached_property
    def _nearest(self) -> Search:
        return nearest_search(self.codebook)


def kmeans(
    vectors: Float[Tensor, "n dim"],
    importance: Float[Tensor, "n dim"],
    size: int,
    seed: int = 0,
    start: Float[Tensor, "size dim"] | None = None,
    pin_entries: bool = True,
) -> Float[Tensor, "size dim"]:
    """`size` entries of small importance-weighted squared distance, by Lloyd's iteration on a sample.

    Vectors lie in [-1, 1]. Starts from `start`, else from the quantiles of a normal in one dimension and
    from drawn vectors in more. Codebooks of more than two entries keep one entry at 0 and pin outermost
    coordinates to ±1; with `pin_entries` off they do not, and vectors of two coordinates or more may have any size. An
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
        codebook = _lloyd_step(vectors, importance, _pin_entries(codebook) if pin_entries else codebook)
    return _pin_entries(codebook) if pin_entries else codebook


def nearest(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "size dim"], importance: Float[Tensor, "n dim"]
) -> Int[Tensor, " n"]:
    """Index of the nearest entry by the weighted distance."""
    return nearest_search(codebook)(vectors, importance)


def nearest_search(codebook: Float[Tensor, "size dim"]) -> Search:
    """`nearest` in one codebook, for many calls."""
    if codebook.shape[1] == 1:
        levels, order = codebook[:, 0].sort(stable=True)  # entries that were refitted may have passed each other
        order = order.to(torch.int32)
        return lambda vectors, importance: order[nearest_level(vectors[:, 0], levels)]
    table = entry_table(codebook)
    return lambda vectors, importance: nearest_entry(vectors, codebook, importance, table)


def split_vectors(matrix: Float[Tensor, "out in"], dim: int) -> Float[Tensor, "n dim"]:
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


def _pin_entries(codebook: Tensor) -> Tensor:
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
    return _revive_dead_entries(vectors, importance, means, codes, (mass > 0).any(1))


def _revive_dead_entries(vectors: Tensor, importance: Tensor, codebook: Tensor, codes: Tensor, alive: Tensor) -> Tensor:
    """Dead entries take the place of the vectors with the largest weighted distance to their own entry."""
    dead = (~alive).nonzero()[:, 0]
    if not len(dead):
        return codebook
    distance = ((vectors - codebook[codes]).square() * importance).sum(1)
    worst = distance.topk(min(len(dead), len(vectors))).indices
    codebook[dead[: len(worst)]] = vectors[worst]
    return codebook
