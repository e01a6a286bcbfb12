"""The codeword format: the net behind a codebook trained in turn with the codes, and shared decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.additive import AdditiveCoder
from reallm.fit.dispatch import fit, matrix_shape
from reallm.fit.feedback import assign_codes
from reallm.fit.joint_training import FitInput, record_fit_input, train_shared_decoder
from reallm.fit.kmeans import kmeans, nearest
from reallm.fit.objective import Objective
from reallm.fit.refit import alternate
from reallm.fit.rounding import normalize
from reallm.fit.training import Adam, cosine_decay, fake_quantize_parameters, gradient_step, quantize_parameters
from reallm.formats import Unpacked, parameters
from reallm.formats import scales as scale_store
from reallm.formats.neural_codebook import NeuralCodebook, UnpackedNeuralCodebook
from reallm.kernels import average, segment_sum, total

# Sums by code are exact for up to 2^19 vectors. With few vectors per codeword a net of 2,000 numbers overfits them
# (8 a codeword: 0.090 on them, 0.0985 on others, d = 6 at 12 bits); of its own matrix it may.
_LEAST_SAMPLES, _MOST_SAMPLES = 1 << 15, 1 << 17
_SAMPLES_PER_CODEWORD = 16
# A plain table of 2^16 entries has a number for each of its own: with 2^17 vectors it would overfit two each.
_MANY_PARAMETERS, _MOST_SAMPLES_OF_MANY = 1 << 17, 1 << 19
_ASSIGNMENTS, _STEPS, _RATE = 12, 20, 0.02
_WARM_ASSIGNMENTS = 2
_REFINE_STEPS, _REFINE_RATE = 40, 0.003  # steps of the net by what all errors together cost
# Gaussian weights, correlated inputs: 2 rounds of codes alone 0.128, with the net 0.125, 4 rounds 0.119.
_ROUNDS, _LEAST_GAIN = 4, 5e-3
_TINY = 1e-30


@fit.register
def fit_codeword(
    fmt: NeuralCodebook,
    weight: Tensor,
    objective: Objective | None = None,
    seed: int = 0,
    start: Unpacked | None = None,
) -> UnpackedNeuralCodebook:
    """Net and codes in turn by the error of the weights (scale², importance); then codes, fed back with a hessian.

    Rows or groups are divided by their root mean square. A shared decoder is taken as it is, and an earlier result's
    is trained on.
    """
    objective = objective or Objective.plain(weight)
    if fmt.shared:
        record_fit_input(fmt, weight, objective)
    scales = root_mean_squares(weight, fmt.group_size, fmt.scales)
    if fmt.shared:
        decoder = fmt.decoder({"codes": weight})
    else:
        vectors, importance = normalized_vectors(fmt, weight, objective, scales)
        first = start.decoder if isinstance(start, UnpackedNeuralCodebook) else None
        decoder = train_net(fmt, vectors, importance, seed, first)
    unpacked = UnpackedNeuralCodebook(assign_codes(weight, _coder(fmt, decoder, scales), objective), decoder, scales)
    rounds = _ROUNDS if start is None else 1
    if fmt.shared or objective.hessian is None:
        return _alternate_scales(fmt, unpacked, weight, objective, rounds)
    error = float("inf")
    for _ in range(rounds):
        unpacked = _alternate_scales(fmt, refine_decoder(fmt, unpacked, weight, objective), weight, objective, 1)
        before, error = error, objective.error(weight, fmt.decode(unpacked, matrix_shape(weight)))
        if error > before * (1 - _LEAST_GAIN):
            break
    return unpacked


def _coder(
    fmt: NeuralCodebook, decoder: parameters.UnpackedParameters, scales: Float[Tensor, "out groups"]
) -> AdditiveCoder:
    return AdditiveCoder(fmt, fmt.codebook(decoder)[None], scales, beam=1)


def _alternate_scales(
    fmt: NeuralCodebook, unpacked: UnpackedNeuralCodebook, weight: Tensor, objective: Objective, rounds: int
) -> UnpackedNeuralCodebook:
    """Scales and codes in turn; the net stays."""
    codebook = fmt.codebook(unpacked.decoder)[None]

    def make_coder(unpacked: UnpackedNeuralCodebook) -> AdditiveCoder:
        return AdditiveCoder(fmt, codebook, unpacked.scales, beam=1)

    return alternate(fmt, unpacked, weight, objective, (("scales",),), make_coder, rounds)


def refine_decoder(
    fmt: NeuralCodebook, unpacked: UnpackedNeuralCodebook, weight: Tensor, objective: Objective
) -> UnpackedNeuralCodebook:
    """The net moved along the gradient of tr(D H Dᵀ) while codes stay; `unpacked` themselves if that gains nothing.

    The gradient of a codeword is the sum of those of its vectors, added up as whole numbers: the same in every run.
    """
    bits, shape = fmt.decoder_bits, matrix_shape(weight)
    least = objective.error(weight, fmt.decode(unpacked, shape))
    adam = Adam(parameters.values(bits, unpacked.decoder, fmt.net.parameters), _REFINE_RATE)
    missing = -shape[1] % fmt.vector_dim
    scales = scale_store.expand_groups(unpacked.scales, shape[1], fmt.group_size)
    unit = total(weight.square() * objective.importance).clamp(min=_TINY)
    codes, best = unpacked.codes.reshape(-1).long(), unpacked
    for step in range(_REFINE_STEPS):
        moved = dataclasses.replace(unpacked, decoder=quantize_parameters(bits, adam.tensor))
        difference = fmt.decode(moved, shape) - weight
        if (error := objective.error(weight, weight + difference)) < least:
            best, least = moved, error
        slopes = (difference @ objective.hessian) * scales / unit
        slopes = torch.nn.functional.pad(slopes, (0, missing)).reshape(-1, fmt.vector_dim)
        slopes = segment_sum(slopes, codes, 2**fmt.index_bits)

        def along(flat: Tensor, slopes: Tensor = slopes) -> Tensor:
            return (fmt.net.codebook(fake_quantize_parameters(bits, flat)) * slopes).sum(0).sum()

        gradient_step([adam], along, cosine_decay(step, _REFINE_STEPS))
    return best


@train_shared_decoder.register
def train_codeword(
    fmt: NeuralCodebook, fit_inputs: Sequence[FitInput], device: str, seed: int = 0
) -> parameters.UnpackedParameters:
    """One net for the vectors of all matrices; each gives as many, drawn with its errors' weight."""
    share = max(1, _most_samples(fmt) // len(fit_inputs))
    vectors, importance = [], []
    for number, fit_input in enumerate(fit_inputs):
        weight, objective = fit_input.weight.to(device), fit_input.objective.to(torch.device(device))
        scales = root_mean_squares(weight, fit_input.fmt.group_size, fit_input.fmt.scales)
        chosen = _sample(*normalized_vectors(fmt, weight, objective, scales), share, seed + number)
        vectors.append(chosen[0])
        # Losses of matrices are compared by nobody here: each counts as much as it has vectors.
        importance.append(chosen[1] / average(chosen[1]).clamp(min=_TINY))
    return train_net(fmt, torch.cat(vectors), torch.cat(importance), seed)


def root_mean_squares(weight: Float[Tensor, "out in"], group_size: int, kind: str) -> Float[Tensor, "out groups"]:
    """Scales of groups as they are stored."""
    largest = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    energy = (
        scale_store.split_groups(weight / largest, group_size).square().sum(2)
    )  # squares of tiny weights would be 0
    counts = scale_store.split_groups(torch.ones_like(weight[:1]), group_size).sum(2)
    return scale_store.fake_quantize(kind, (energy / counts).sqrt() * largest)


def normalized_vectors(
    fmt: NeuralCodebook, weight: Tensor, objective: Objective, scales: Float[Tensor, "out groups"]
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
    """Normalised vectors, and what a squared error in each place costs."""
    importance = scale_store.expand_groups(
        scales / scales.max().clamp(min=_TINY), weight.shape[1], fmt.group_size
    ).square()
    importance = importance * objective.importance
    matrices = normalize(weight, scales, fmt.group_size), importance
    missing = -weight.shape[1] % fmt.vector_dim
    vectors, importance = (torch.nn.functional.pad(m, (0, missing)).reshape(-1, fmt.vector_dim) for m in matrices)
    return vectors, importance


def train_net(
    fmt: NeuralCodebook,
    vectors: Float[Tensor, "n dim"],
    importance: Float[Tensor, "n dim"],
    seed: int,
    start: parameters.UnpackedParameters | None = None,
) -> parameters.UnpackedParameters:
    """Assign vectors to codewords, move the net towards the means of what it was assigned, and again.

    The generalised Lloyd iteration with a constrained codebook: for given codes the loss is that of a table of means,
    Σ mass · (codeword - mean)², so that a step costs what the table does and not what the vectors do. Begins with the
    entries of residual k-means as the tables of the digits, which revives dead ones; the best of all rounds is kept.
    """
    vectors, importance = _sample(vectors, importance, _most_samples(fmt), seed)
    importance = importance / average(importance).clamp(min=_TINY)
    count, bits = fmt.net.parameters, fmt.decoder_bits
    flat = _initialize(fmt, vectors, importance, seed) if start is None else parameters.values(bits, start, count)
    assignments = _ASSIGNMENTS if start is None else _WARM_ASSIGNMENTS
    adam, best, least = Adam(flat, _RATE if start is None else _RATE / 4), None, float("inf")
    for number in range(assignments + 1):
        stored = quantize_parameters(bits, adam.tensor)
        codebook = fmt.codebook(stored)
        codes = nearest(vectors, codebook, importance).long()
        error = total((vectors - codebook[codes]).square() * importance, torch.float64).item()
        if best is None or error < least:
            best, least = stored, error
        if number == assignments:
            break
        mass = segment_sum(importance, codes, len(codebook))
        means = segment_sum(vectors * importance, codes, len(codebook)) / mass.clamp(min=_TINY)
        mass = mass / len(vectors)

        def loss(flat: Tensor, mass: Tensor = mass, means: Tensor = means) -> Tensor:
            return ((fmt.net.codebook(fake_quantize_parameters(bits, flat)) - means).square() * mass).sum(0).sum()

        for step in range(number * _STEPS, (number + 1) * _STEPS):
            gradient_step([adam], loss, cosine_decay(step, assignments * _STEPS))
    assert best is not None
    return best


def _initialize(fmt: NeuralCodebook, vectors: Tensor, importance: Tensor, seed: int) -> Float[Tensor, " parameters"]:
    """Residual k-means, each digit for what those before it leave; hidden numbers begin at random, and unheard."""
    net = fmt.net
    generator = torch.Generator().manual_seed(seed)
    remainders, bias, tables = vectors, torch.zeros(net.vector_dim), []
    for j, bits in enumerate(net.digits):
        entries = kmeans(remainders, importance, 2**bits, seed + j, pin_entries=False)
        remainders = remainders - entries[nearest(remainders, entries, importance)]
        bias = bias + entries[0].cpu()
        hidden = torch.randn(2**bits - 1, net.hidden, generator=generator) * (0.5 / len(net.digits) ** 0.5)
        tables.append(torch.cat([(entries[1:] - entries[0]).cpu(), hidden], 1).reshape(-1))
    out = torch.randn(net.hidden * net.vector_dim, generator=generator) * 0.02
    return torch.cat([*tables, bias, torch.zeros(net.hidden), out]).to(vectors.device)


def _most_samples(fmt: NeuralCodebook) -> int:
    most = _MOST_SAMPLES_OF_MANY if fmt.net.parameters > _MANY_PARAMETERS else _MOST_SAMPLES
    return min(max(_LEAST_SAMPLES, _SAMPLES_PER_CODEWORD << fmt.index_bits), most)


def _sample(vectors: Tensor, importance: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(vectors) <= most:
        return vectors, importance
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:most].to(vectors.device)
    return vectors[chosen], importance[chosen]
