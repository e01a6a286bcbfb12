"""The additive format: residual k-means, a beam search over its codebooks, refits of codebooks and scales in turn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.feedback import coded
from reallm.fit.kmeans import kmeans
from reallm.fit.objective import Objective
from reallm.fit.refit import alternated
from reallm.fit.rounding import divisors, normalised
from reallm.formats import Parts
from reallm.formats import scales as scale_store
from reallm.formats.additive import Additive, AdditiveParts, sum_of_entries

_BEAM = 8
_ROUNDS = 4
# Scores of one chunk.
_SCORES_PER_CHUNK = {"cpu": 1 << 22}
_SCORES_PER_CHUNK_ELSEWHERE = 1 << 27
_NAMES = (("codebooks",), ("scales",))


@fit.register
def fit_additive(
    fmt: Additive, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> AdditiveParts:
    """AQLM's alternation: codes by beam search, codebooks and scales by least squares; error feedback if there is data.

    Scales begin as root mean squares of their groups.
    """
    objective = objective or Objective.plain(weight)
    parts = start if isinstance(start, AdditiveParts) else _first(fmt, weight, objective, seed)

    def recoded(parts: AdditiveParts) -> AdditiveParts:
        return dataclasses.replace(parts, codes=coded(weight, AdditiveCoder(fmt, parts.codebooks, parts.scales), objective))

    return alternated(fmt, recoded(parts), weight, objective, _NAMES, recoded, _ROUNDS)


def _first(fmt: Additive, weight: Tensor, objective: Objective, seed: int) -> AdditiveParts:
    """Residual k-means: each codebook for what those before it leave."""
    sizes = scale_store.grouped(weight, fmt.group_size).square()
    counts = scale_store.grouped(torch.ones_like(weight[:1]), fmt.group_size).sum(2)
    scales = scale_store.stored(fmt.scales, (sizes.sum(2) / counts).sqrt())
    importance = scale_store.spread(scales.square(), weight.shape[1], fmt.group_size) * objective.importance
    remainders, importance = (
        torch.nn.functional.pad(values, (0, -values.shape[1] % fmt.vector_dim)).view(-1, fmt.vector_dim)
        for values in (normalised(weight, scales, fmt.group_size), importance)
    )
    codebooks = []
    for book in range(fmt.books):
        entries = kmeans(remainders, importance, 2**fmt.index_bits, seed + book, anchored=False)
        codebooks.append(entries.to(torch.float16).to(torch.float32))
        if book + 1 < fmt.books:
            codes = beam_search(remainders, codebooks[-1][None], importance, width=1)
            remainders = remainders - codebooks[-1][codes[:, 0]]
    return AdditiveParts(torch.zeros(0), torch.stack(codebooks), scales)


@dataclass(frozen=True)
class AdditiveCoder:
    """Beam search for vectors of neighbouring columns."""

    fmt: Additive
    codebooks: Float[Tensor, "books entries dim"]
    scales: Float[Tensor, "out groups"]
    beam: int = _BEAM

    @property
    def width(self) -> int:
        """Columns of a vector."""
        return self.fmt.vector_dim

    def encode(
        self, columns: Float[Tensor, "out columns"], start: int, importance: Float[Tensor, "rows columns"]
    ) -> tuple[Int[Tensor, "out codes"], Float[Tensor, "out columns"]]:
        """Codes of small error of the weights themselves: coordinates weighted by squared scale and importance."""
        scales = scale_store.of_columns(self.scales, start, columns.shape[1], self.fmt.group_size)
        weights = importance
        if self.fmt.group_size % self.width:  # else a vector has one scale, and ratios inside a vector are all that counts
            weights = importance * scales.square()
        vectors, weights = self._vectors(columns / divisors(scales)), self._vectors(weights)
        if len(weights) not in (1, len(vectors)):  # one row of importance for all
            weights = weights.repeat(len(columns), 1)
        codes = beam_search(vectors, self.codebooks, weights, self.beam)
        return self._decoded(codes, scales)

    def encode_by(
        self, columns: Float[Tensor, "out columns"], start: int, root: Float[Tensor, "columns columns"]
    ) -> tuple[Int[Tensor, "out codes"], Float[Tensor, "out columns"]]:
        """The same for one vector a row, its errors weighed together: in space turned by `root` distance is plain."""
        if self.fmt.group_size % self.width:
            return self.encode(columns, start, root.square().sum(1)[None])
        scales = scale_store.of_columns(self.scales, start, columns.shape[1], self.fmt.group_size)
        turned = self.codebooks[..., : columns.shape[1]] @ root
        codes = beam_search((columns / divisors(scales)) @ root, turned, root.new_ones(1, len(root)), self.beam)
        return self._decoded(codes, scales)

    def _vectors(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "n dim"]:
        return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % self.width)).reshape(-1, self.width)

    def _decoded(self, codes: Tensor, scales: Float[Tensor, "out columns"]) -> tuple[Tensor, Tensor]:
        vectors = sum_of_entries(codes, self.codebooks).view(len(scales), -1)
        return codes.view(len(scales), -1), vectors[:, : scales.shape[1]] * scales


def beam_search(
    vectors: Float[Tensor, "n dim"],
    codebooks: Float[Tensor, "books entries dim"],
    importance: Float[Tensor, "rows dim"],
    width: int,
) -> Int[Tensor, "n books"]:
    """Codes whose sum of entries is at a small weighted squared distance; `importance` for each vector, or one for all.

    Codebook by codebook the `width` best partial sums go on; then every code of the survivors is chosen anew, the others
    fixed. One codebook is searched exactly.
    """
    chunk = max(1, _SCORES_PER_CHUNK.get(vectors.device.type, _SCORES_PER_CHUNK_ELSEWHERE) // (width * codebooks.shape[1]))
    if len(importance) == 1:
        importance = importance.expand(len(vectors), -1)[:1]
    found = []
    for at in range(0, len(vectors), chunk):
        own = importance if len(importance) == 1 else importance[at : at + chunk]
        found.append(_searched(vectors[at : at + chunk], codebooks, own, width))
    return torch.cat(found).to(torch.int32)


def _searched(vectors: Tensor, codebooks: Tensor, importance: Tensor, width: int) -> Tensor:
    energies = [importance @ book.square().T for book in codebooks]  # (n or 1, entries)
    codes = torch.zeros(len(vectors), 1, 0, dtype=torch.int64, device=vectors.device)
    remainders, scores = vectors[:, None], vectors.new_zeros(len(vectors), 1)
    for book, energy in zip(codebooks, energies, strict=True):
        total = scores[..., None] + _scores(remainders, book, importance, energy)
        scores, places = total.flatten(1).topk(min(width, total[0].numel()), largest=False)
        parents, chosen = places // len(book), places % len(book)
        codes = torch.cat([_of(codes, parents), chosen[..., None]], 2)
        remainders = _of(remainders, parents) - book[chosen]
    if len(codebooks) == 1:
        return codes[:, 0]
    for number, (book, energy) in enumerate(zip(codebooks, energies, strict=True)):
        freed = remainders + book[codes[..., number]]
        codes[..., number] = _scores(freed, book, importance, energy).argmin(2)
        remainders = freed - book[codes[..., number]]
    best = (remainders.square() * importance[:, None]).sum(2).argmin(1)
    return codes[torch.arange(len(codes), device=codes.device), best]


def _scores(remainders: Tensor, book: Tensor, importance: Tensor, energy: Tensor) -> Float[Tensor, "n beam entries"]:
    """Weighted squared distance of every entry, less that of 0."""
    return energy[:, None] - 2 * (remainders * importance[:, None]) @ book.T


def _of(values: Tensor, parents: Int[Tensor, "n beam"]) -> Tensor:
    """The values of each new candidate's parent."""
    return values.gather(1, parents[..., None].expand(-1, -1, values.shape[2]))
