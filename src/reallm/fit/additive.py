"""The additive format: residual k-means, a beam search over its codebooks, refits of codebooks and scales in turn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.feedback import assign_codes
from reallm.fit.kmeans import kmeans, split_vectors
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.fit.rounding import GroupScaledCoder, normalize
from reallm.formats import Unpacked
from reallm.formats import scales as scale_store
from reallm.formats.additive import Additive, UnpackedAdditive, sum_of_entries
from reallm.formats.neural_codebook import NeuralCodebook

_BEAM = 8
_ROUNDS = 4
# Scores of one chunk.
_SCORES_PER_CHUNK = {"cpu": 1 << 22}
_SCORES_PER_CHUNK_ELSEWHERE = 1 << 27
# Codebooks with up to 2^8 sums are searched as one: exact, and fewer steps.
_SUMS_BITS = 8
_NAMES = (("codebooks",), ("scales",))


@fit.register
def fit_additive(
    fmt: Additive, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedAdditive:
    """AQLM's alternation: codes by beam search, codebooks and scales by least squares; error feedback if there is data.

    Scales begin as root mean squares of their groups.
    """
    objective = objective or Objective.plain(weight)
    if isinstance(start, UnpackedAdditive):
        codebooks, scales = start.codebooks, start.scales
    else:
        codebooks, scales = _initialize(fmt, weight, objective, seed)

    def make_coder(unpacked: UnpackedAdditive) -> AdditiveCoder:
        return AdditiveCoder(fmt, unpacked.codebooks, unpacked.scales)

    unpacked = UnpackedAdditive(
        assign_codes(weight, AdditiveCoder(fmt, codebooks, scales), objective), codebooks, scales
    )
    return alternate(fmt, unpacked, weight, objective, _NAMES, make_coder, _ROUNDS if start is None else 1)


def _initialize(fmt: Additive, weight: Tensor, objective: Objective, seed: int) -> tuple[Tensor, Tensor]:
    """(codebooks, scales) by residual k-means: each codebook for what those before it leave."""
    sizes = scale_store.split_groups(weight, fmt.group_size).square()
    counts = scale_store.split_groups(torch.ones_like(weight[:1]), fmt.group_size).sum(2)
    scales = scale_store.fake_quantize(fmt.scales, (sizes.sum(2) / counts).sqrt())
    importance = scale_store.expand_groups(scales.square(), weight.shape[1], fmt.group_size) * objective.importance
    remainders, importance = (
        split_vectors(values, fmt.vector_dim) for values in (normalize(weight, scales, fmt.group_size), importance)
    )
    codebooks = []
    for book in range(fmt.books):
        entries = kmeans(remainders, importance, 2**fmt.index_bits, seed + book, pin_entries=False)
        codebooks.append(entries.to(torch.float16).to(torch.float32))
        if book + 1 < fmt.books:
            codes = beam_search(remainders, codebooks[-1:], importance, width=1)
            remainders = remainders - codebooks[-1][codes[:, 0]]
    return torch.stack(codebooks), scales


@dataclass(frozen=True)
class AdditiveCoder(GroupScaledCoder):
    """Beam search for vectors of neighbouring columns; a codebook made by a net is one of one book."""

    fmt: Additive | NeuralCodebook
    codebooks: Float[Tensor, "books entries dim"]
    scales: Float[Tensor, "out groups"]
    beam: int = _BEAM

    @property
    def width(self) -> int:
        """Columns of a vector."""
        return self.fmt.vector_dim

    @functools.cached_property
    def tables(self) -> list[Float[Tensor, "entries dim"]]:
        """The codebooks as they are searched: neighbours whose sums are few are one table of all of them."""
        return [_all_sums(group) for group in self.codebooks.split(_books_at_once(self.fmt.index_bits))]

    def encode(
        self, columns: Float[Tensor, "out columns"], start: int, importance: Float[Tensor, "rows columns"]
    ) -> tuple[Int[Tensor, "out codes"], Float[Tensor, "out columns"]]:
        """Codes of small error of the weights themselves: coordinates weighted by squared scale and importance."""
        count = columns.shape[1]
        vectors = split_vectors(columns / self.expand_columns(self.divisors, start, count), self.width)
        if not self._one_scale:
            importance = importance * self.expand_columns(self.squares, start, count)
        weights = split_vectors(importance.expand_as(columns), self.width)
        return self._split_and_decode(beam_search(vectors, self.tables, weights, self.beam), start, count)

    def encode_with_metric(
        self, columns: Float[Tensor, "out columns"], start: int, root: Float[Tensor, "columns columns"]
    ) -> tuple[Int[Tensor, "out codes"], Float[Tensor, "out columns"]]:
        """The same for one vector a row, its errors weighed together: in space turned by `root` distance is plain."""
        if not self._one_scale:
            return self.encode(columns, start, root.square().sum(1)[None])
        count = columns.shape[1]
        turned = [table[:, : len(root)] @ root for table in self.tables]
        vectors = (columns / self.expand_columns(self.divisors, start, count)) @ root
        return self._split_and_decode(beam_search(vectors, turned, None, self.beam), start, count)

    @property
    def _one_scale(self) -> bool:
        """Whether all of a vector has one scale: it is a factor of all distances then, and no matter."""
        return self.fmt.group_size % self.width == 0

    def _split_and_decode(self, codes: Int[Tensor, "n tables"], start: int, count: int) -> tuple[Tensor, Tensor]:
        """Codes of single codebooks and decoded values, by rows."""
        codes = self._split_codes(codes)
        vectors = sum_of_entries(codes, self.codebooks).view(len(self.scales), -1)
        return codes.view(len(self.scales), -1), vectors[:, :count] * self.expand_columns(self.scales, start, count)

    def _split_codes(self, codes: Int[Tensor, "n tables"]) -> Int[Tensor, "n books"]:
        bits, joined = self.fmt.index_bits, _books_at_once(self.fmt.index_bits)
        if joined == 1:
            return codes
        columns = []
        for book in range(self.fmt.books):
            together = min(joined, self.fmt.books - book // joined * joined)
            shift = bits * (together - 1 - book % joined)
            columns.append(codes[:, book // joined] >> shift & (1 << bits) - 1)
        return torch.stack(columns, 1)


def beam_search(
    vectors: Float[Tensor, "n dim"],
    tables: Sequence[Float[Tensor, "_ dim"]],
    importance: Float[Tensor, "n dim"] | None,
    width: int,
) -> Int[Tensor, "n tables"]:
    """Codes whose sum of entries is at a small squared distance, each coordinate weighted by `importance`.

    Table by table the `width` best partial sums go on; then every code of the survivors is chosen again, the others
    fixed. One table is searched exactly.
    """
    scores = _SCORES_PER_CHUNK.get(vectors.device.type, _SCORES_PER_CHUNK_ELSEWHERE)
    chunk = max(1, scores // (width * max(len(table) for table in tables)))
    if len(vectors) <= chunk:
        return _search_chunk(vectors, tables, importance, width).to(torch.int32)
    weights = [None] * -(-len(vectors) // chunk) if importance is None else importance.split(chunk)
    pairs = zip(vectors.split(chunk), weights, strict=True)
    return torch.cat([_search_chunk(part, tables, weight, width) for part, weight in pairs]).to(torch.int32)


def _search_chunk(
    vectors: Tensor, tables: Sequence[Tensor], importance: Tensor | None, width: int
) -> Int[Tensor, "n tables"]:
    if importance is None:
        energies = [table.square().sum(1)[None] for table in tables]
    else:
        energies = [importance @ table.square().T for table in tables]
        importance = importance[:, None]
    scores = _scores(vectors[:, None], tables[0], importance, energies[0])[:, 0]
    if len(tables) == 1:
        return scores.argmin(1, keepdim=True)
    scores, first = scores.topk(min(width, len(tables[0])), largest=False)
    codes, remainders = [first], vectors[:, None] - tables[0][first]
    for table, energy in zip(tables[1:], energies[1:], strict=True):
        total = scores[..., None] + _scores(remainders, table, importance, energy)
        scores, places = total.flatten(1).topk(min(width, total[0].numel()), largest=False)
        parents, chosen = places // len(table), places % len(table)
        codes = [*(earlier.gather(1, parents) for earlier in codes), chosen]
        remainders = remainders.gather(1, parents[..., None].expand(-1, -1, vectors.shape[1])) - table[chosen]
    for number, (table, energy) in enumerate(zip(tables, energies, strict=True)):
        freed = remainders + table[codes[number]]
        codes[number] = _scores(freed, table, importance, energy).argmin(2)
        remainders = freed - table[codes[number]]
    squares = remainders.square() if importance is None else remainders.square() * importance
    best = squares.sum(2).argmin(1, keepdim=True)
    return torch.cat([codes_of_table.gather(1, best) for codes_of_table in codes], 1)


def _scores(
    remainders: Float[Tensor, "n beam dim"],
    table: Float[Tensor, "entries dim"],
    importance: Float[Tensor, "n 1 dim"] | None,
    energy: Float[Tensor, "_ entries"],
) -> Float[Tensor, "n beam entries"]:
    """Weighted squared distance of every entry, less that of 0."""
    weighted = remainders if importance is None else remainders * importance
    return torch.add(energy[:, None], weighted @ table.T, alpha=-2)


def _books_at_once(index_bits: int) -> int:
    """Codebooks that are searched as one table."""
    return max(1, _SUMS_BITS // index_bits)


def _all_sums(books: Float[Tensor, "books entries dim"]) -> Float[Tensor, "sums dim"]:
    """The sums of one entry of each; the code of the first one is the highest part of the index."""
    total = books[0]
    for book in books[1:]:
        total = (total[:, None] + book).flatten(0, 1)
    return total
