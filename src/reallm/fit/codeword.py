"""The codeword format: the net behind a codebook trained in turn with the codes, and shared decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.additive import AdditiveCoder
from reallm.fit.dispatch import fit, shape_of
from reallm.fit.feedback import coded
from reallm.fit.kmeans import kmeans, nearest
from reallm.fit.objective import Objective
from reallm.fit.refit import alternated
from reallm.fit.rounding import normalised
from reallm.fit.shared import Demand, note_demand, train_shared
from reallm.fit.training import Adam, descend, falling, quantised, stored_parameters
from reallm.formats import Parts, parameters
from reallm.formats import scales as scale_store
from reallm.formats.codeword import Codeword, CodewordParts
from reallm.kernels import average, segment_sum, total

# Sums by code are exact for up to 2^19 vectors. With few vectors a codeword a net of 2,000 numbers learns them by heart
# (8 a codeword: 0.090 on them, 0.0985 on others, d = 6 at 12 bits); of its own matrix it may.
_LEAST_SAMPLES, _MOST_SAMPLES = 1 << 15, 1 << 17
_SAMPLES_PER_CODEWORD = 16
# A plain table of 2^16 entries has a number for each of its own: with 2^17 vectors it would learn two of them by heart.
_MANY_PARAMETERS, _MOST_SAMPLES_OF_MANY = 1 << 17, 1 << 19
_ASSIGNMENTS, _STEPS, _RATE = 12, 20, 0.02
_WARM_ASSIGNMENTS = 2
_ANSWERS, _ANSWER_RATE = 40, 0.003  # steps of the net by what all errors together cost
# Gaussian weights, correlated inputs: 2 rounds of codes alone 0.128, with the net 0.125, 4 rounds 0.119.
_ROUNDS, _LEAST_GAIN = 4, 5e-3
_TINY = 1e-30


@fit.register
def fit_codeword(
    fmt: Codeword, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> CodewordParts:
    """Net and codes in turn by the error of the weights (scale², importance); then codes, fed back with a hessian.

    Rows or groups are divided by their root mean square. A shared decoder is taken as it is, and an earlier result's
    is trained on.
    """
    objective = objective or Objective.plain(weight)
    if fmt.shared:
        note_demand(fmt, weight, objective)
    scales = root_mean_squares(weight, fmt.group_size, fmt.scales)
    if fmt.shared:
        decoder = fmt.decoder({"codes": weight})
    else:
        vectors, importance = vectors_of(fmt, weight, objective, scales)
        first = start.decoder if isinstance(start, CodewordParts) else None
        decoder = trained(fmt, vectors, importance, seed, first)
    parts = CodewordParts(coded(weight, _coder(fmt, decoder, scales), objective), decoder, scales)
    rounds = _ROUNDS if start is None else 1
    if fmt.shared or objective.hessian is None:
        return _alternated(fmt, parts, weight, objective, rounds)
    error = float("inf")
    for _ in range(rounds):
        parts = _alternated(fmt, answering(fmt, parts, weight, objective), weight, objective, 1)
        before, error = error, objective.error(weight, fmt.decode(parts, shape_of(weight)))
        if error > before * (1 - _LEAST_GAIN):
            break
    return parts


def _coder(fmt: Codeword, decoder: parameters.Stored, scales: Float[Tensor, "out groups"]) -> AdditiveCoder:
    return AdditiveCoder(fmt, fmt.table(decoder)[None], scales, beam=1)


def _alternated(
    fmt: Codeword, parts: CodewordParts, weight: Tensor, objective: Objective, rounds: int
) -> CodewordParts:
    """Scales and codes in turn; the net stays."""
    table = fmt.table(parts.decoder)[None]

    def coder_of(parts: CodewordParts) -> AdditiveCoder:
        return AdditiveCoder(fmt, table, parts.scales, beam=1)

    return alternated(fmt, parts, weight, objective, (("scales",),), coder_of, rounds)


def answering(fmt: Codeword, parts: CodewordParts, weight: Tensor, objective: Objective) -> CodewordParts:
    """The net moved along the gradient of tr(D H Dᵀ) while codes stay; `parts` themselves if that gains nothing.

    The gradient of a codeword is the sum of those of its vectors, added up as whole numbers: the same in every run.
    """
    bits, shape = fmt.decoder_bits, shape_of(weight)
    least = objective.error(weight, fmt.decode(parts, shape))
    adam = Adam(parameters.values(bits, parts.decoder, fmt.net.parameters), _ANSWER_RATE)
    missing = -shape[1] % fmt.vector_dim
    scales = scale_store.spread(parts.scales, shape[1], fmt.group_size)
    unit = total(weight.square() * objective.importance).clamp(min=_TINY)
    codes, best = parts.codes.reshape(-1).long(), parts
    for step in range(_ANSWERS):
        moved = dataclasses.replace(parts, decoder=stored_parameters(bits, adam.tensor))
        difference = fmt.decode(moved, shape) - weight
        if (error := objective.error(weight, weight + difference)) < least:
            best, least = moved, error
        slopes = (difference @ objective.hessian) * scales / unit
        slopes = torch.nn.functional.pad(slopes, (0, missing)).reshape(-1, fmt.vector_dim)
        slopes = segment_sum(slopes, codes, 2**fmt.index_bits)

        def along(flat: Tensor, slopes: Tensor = slopes) -> Tensor:
            return (fmt.net.table(quantised(bits, flat)) * slopes).sum(0).sum()

        descend([adam], along, falling(step, _ANSWERS))
    return best


@train_shared.register
def train_codeword(fmt: Codeword, demands: Sequence[Demand], device: str, seed: int = 0) -> parameters.Stored:
    """One net for the vectors of all matrices; each gives as many, drawn with its errors' weight."""
    share = max(1, _most_samples(fmt) // len(demands))
    vectors, importance = [], []
    for number, demand in enumerate(demands):
        weight, objective = demand.weight.to(device), demand.objective.to(torch.device(device))
        scales = root_mean_squares(weight, demand.fmt.group_size, demand.fmt.scales)
        chosen = _sample(*vectors_of(fmt, weight, objective, scales), share, seed + number)
        vectors.append(chosen[0])
        # Losses of matrices are compared by nobody here: each counts as much as it has vectors.
        importance.append(chosen[1] / average(chosen[1]).clamp(min=_TINY))
    return trained(fmt, torch.cat(vectors), torch.cat(importance), seed)


def root_mean_squares(weight: Float[Tensor, "out in"], group_size: int, kind: str) -> Float[Tensor, "out groups"]:
    """Scales of groups as they are stored."""
    largest = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    energy = scale_store.grouped(weight / largest, group_size).square().sum(2)  # squares of tiny weights would be 0
    counts = scale_store.grouped(torch.ones_like(weight[:1]), group_size).sum(2)
    return scale_store.stored(kind, (energy / counts).sqrt() * largest)


def vectors_of(
    fmt: Codeword, weight: Tensor, objective: Objective, scales: Float[Tensor, "out groups"]
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
    """Normalised vectors, and what a squared error in each place costs."""
    importance = scale_store.spread(scales / scales.max().clamp(min=_TINY), weight.shape[1], fmt.group_size).square()
    importance = importance * objective.importance
    matrices = normalised(weight, scales, fmt.group_size), importance
    missing = -weight.shape[1] % fmt.vector_dim
    vectors, importance = (torch.nn.functional.pad(m, (0, missing)).reshape(-1, fmt.vector_dim) for m in matrices)
    return vectors, importance


def trained(
    fmt: Codeword,
    vectors: Float[Tensor, "n dim"],
    importance: Float[Tensor, "n dim"],
    seed: int,
    start: parameters.Stored | None = None,
) -> parameters.Stored:
    """Assign vectors to codewords, move the net towards the means of what it was assigned, and again.

    The generalised Lloyd iteration with a constrained codebook: for given codes the loss is that of a table of means,
    Σ mass · (codeword - mean)², so that a step costs what the table does and not what the vectors do. Begins with the
    entries of residual k-means as the tables of the digits, which revives dead ones; the best of all rounds is kept.
    """
    vectors, importance = _sample(vectors, importance, _most_samples(fmt), seed)
    importance = importance / average(importance).clamp(min=_TINY)
    count, bits = fmt.net.parameters, fmt.decoder_bits
    flat = _first(fmt, vectors, importance, seed) if start is None else parameters.values(bits, start, count)
    assignments = _ASSIGNMENTS if start is None else _WARM_ASSIGNMENTS
    adam, best, least = Adam(flat, _RATE if start is None else _RATE / 4), None, float("inf")
    for number in range(assignments + 1):
        stored = stored_parameters(bits, adam.tensor)
        table = fmt.table(stored)
        codes = nearest(vectors, table, importance).long()
        error = total((vectors - table[codes]).square() * importance, torch.float64).item()
        if best is None or error < least:
            best, least = stored, error
        if number == assignments:
            break
        mass = segment_sum(importance, codes, len(table))
        means = segment_sum(vectors * importance, codes, len(table)) / mass.clamp(min=_TINY)
        mass = mass / len(vectors)

        def loss(flat: Tensor, mass: Tensor = mass, means: Tensor = means) -> Tensor:
            return ((fmt.net.table(quantised(bits, flat)) - means).square() * mass).sum(0).sum()

        for step in range(number * _STEPS, (number + 1) * _STEPS):
            descend([adam], loss, falling(step, assignments * _STEPS))
    assert best is not None
    return best


def _first(fmt: Codeword, vectors: Tensor, importance: Tensor, seed: int) -> Float[Tensor, " parameters"]:
    """Residual k-means, each digit for what those before it leave; hidden numbers begin at random, and unheard."""
    net = fmt.net
    generator = torch.Generator().manual_seed(seed)
    remainders, bias, tables = vectors, torch.zeros(net.vector_dim), []
    for j, bits in enumerate(net.digits):
        entries = kmeans(remainders, importance, 2**bits, seed + j, anchored=False)
        remainders = remainders - entries[nearest(remainders, entries, importance)]
        bias = bias + entries[0].cpu()
        hidden = torch.randn(2**bits - 1, net.hidden, generator=generator) * (0.5 / len(net.digits) ** 0.5)
        tables.append(torch.cat([(entries[1:] - entries[0]).cpu(), hidden], 1).reshape(-1))
    out = torch.randn(net.hidden * net.vector_dim, generator=generator) * 0.02
    return torch.cat([*tables, bias, torch.zeros(net.hidden), out]).to(vectors.device)


def _most_samples(fmt: Codeword) -> int:
    most = _MOST_SAMPLES_OF_MANY if fmt.net.parameters > _MANY_PARAMETERS else _MOST_SAMPLES
    return min(max(_LEAST_SAMPLES, _SAMPLES_PER_CODEWORD << fmt.index_bits), most)


def _sample(vectors: Tensor, importance: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(vectors) <= most:
        return vectors, importance
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:most].to(vectors.device)
    return vectors[chosen], importance[chosen]
