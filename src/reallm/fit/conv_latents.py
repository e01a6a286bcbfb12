"""Latents and convolutional decoder trained together, quantised as they will be stored; decoders for many matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reallm.decoders.flat_vector import split
from reallm.fit.dispatch import fit, matrix_shape
from reallm.fit.encoder import encode, initial_parameters
from reallm.fit.entropy_coded import BIT
from reallm.fit.joint_training import FitInput, record_fit_input, train_shared_decoder
from reallm.fit.latent_rate import LatentRate
from reallm.fit.neural_codebook import root_mean_squares
from reallm.fit.objective import Objective
from reallm.fit.rounding import divisors
from reallm.fit.training import (
    Adam,
    compute_gradients,
    cosine_decay,
    fake_quantize_parameters,
    gradient_step,
    quantize_parameters,
)
from reallm.formats import Shape, Unpacked, parameters
from reallm.formats import scales as scale_store
from reallm.formats.conv_latents import ENCODER, ConvLatents, UnpackedConvLatents, plain_convolutions
from reallm.formats.entropy_coded import EntropyCoded
from reallm.kernels import average, one_thread, straight_through

_NET_RATE, _LATENT_RATE = 2e-3, 1e-2
# The base is fitted to the latents again after so many steps; in between its errors stay as they were found.
_REQUANTISED = 10
_TINY = 1e-30
_LARGEST_WEIGHT = 1e6  # float16 scales end at 65,504; from 1e8 on training by rate ended in nan
# Of training by rate: descents that make latents sharp, and the least that a latent costs there, of the mean.
_SHARPENING, _LEAST_COST = 5, 1e-3
_LAST = 4  # the last of so many parts of its steps sees errors as they are, and not as noise


@dataclass
class _MatrixState:
    """One matrix on its way: what it should be, and its latents as the base stores them."""

    fmt: ConvLatents
    weight: Float[Tensor, "out in"]
    objective: Objective
    scales: Float[Tensor, "out 1"]
    seed: int
    fixed: parameters.UnpackedParameters | None = None  # a net that does not train
    base: Unpacked = None
    offset: Tensor = field(default_factory=lambda: torch.zeros(()))
    costs: Objective | None = None  # what errors of latents cost
    rate: LatentRate | None = None
    bit: float = 0.0  # what a bit of latents costs, as errors do in `loss`

    @functools.cached_property
    def unit(self) -> Tensor:
        """The largest scale at first."""
        return self.scales.abs().max().clamp(min=_TINY)

    @functools.cached_property
    def energy(self) -> Tensor:
        """The error of zeros by the objective."""
        return self._products(self.weight, self.weight).sum().clamp(min=_TINY)

    @property
    def shape(self) -> Shape:
        return matrix_shape(self.weight)

    @property
    def padded_weight(self) -> Float[Tensor, "rows columns"]:
        """The normalised matrix, its sides filled up to multiples of the patch."""
        side = self.fmt.net.factor
        normalised = self.weight / divisors(self.scales)
        return F.pad(normalised, (0, -self.shape[1] % side, 0, -self.shape[0] % side))

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """Of the signs of noise."""
        return torch.Generator().manual_seed(self.seed)

    def latent_costs(self) -> Objective:
        """What errors of latents cost, about: the mean of their patch."""
        costs = (self.scales / self.unit).square() * self.objective.importance
        side = self.fmt.net.factor
        costs = F.pad(costs.expand(self.shape), (0, -self.shape[1] % side, 0, -self.shape[0] % side))
        means = F.avg_pool2d(costs[None, None], side)[0]
        return Objective(self.fmt.grid_to_matrix(means.expand(self.fmt.channels, -1, -1)).contiguous())

    def refit_base(self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None) -> None:
        """Fit the base to the latents: k-means begins where it ended, and revives dead entries.

        Latents trained by rate are small for its sake, and codes by rate and distortion would be so once more: the base
        is fitted to those that are best by error alone.
        """
        with torch.no_grad():
            if self.costs is None or self.fmt.rate:
                self.costs = self.latent_costs()
            latents = latents.detach()
            wanted = latents if self.rate is None else self.refine_latents(latents, flat)
            self.base = fit(
                self.fmt.base, self.fmt.grid_to_matrix(wanted).contiguous(), self.costs, self.seed, self.base
            )
            self.offset = self.decoded_latents() - latents
            if self.fmt.rate and self.base.step > 0:
                assert isinstance(self.fmt.base, EntropyCoded)
                self.rate = LatentRate.estimate(self.fmt.base, self.base, self.rate)
                self.bit = self.fmt.rate * BIT * self.rate.step**2 * self.mean_error_cost(latents, flat)

    def mean_error_cost(self, latents: Float[Tensor, "channels down across"], flat: Tensor | None) -> float:
        """What a squared error of one latent adds to `loss`: the mean, by noise as large as the base's errors."""
        size = self.offset.square().mean().sqrt().clamp(min=_TINY)
        with one_thread():
            moved = (
                self.decode_weight(latents + size * self.signs(), flat) - self.decode_weight(latents, flat)
            ) * self.scales
            added = self._products(moved, moved).sum() / self.energy
        return (added / (size.square() * latents.numel()).clamp(min=_TINY)).item()

    def decoded_latents(self) -> Float[Tensor, "channels down across"]:
        """As they come back from the file."""
        return self.fmt.matrix_to_grid(self.fmt.base.decode(self.base, self.fmt.inner_shape(self.shape)))

    def decode_weight(
        self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None, offset: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The matrix before its scales; latents and net quantised, gradients straight through."""
        seen = straight_through(latents, (latents + (self.offset if offset is None else offset)).detach())
        bits, count = self.fmt.decoder_bits, self.fmt.net.parameters
        net = parameters.values(bits, self.fixed, count) if flat is None else fake_quantize_parameters(bits, flat)
        with plain_convolutions():
            decoded = self.fmt.net.decode(net, seen)
        return decoded[: self.shape[0], : self.shape[1]]

    def loss(
        self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        """The error by the objective, over that of zeros. `offset` are the errors of latents, by default the base's."""
        errors = self.weight - self.decode_weight(latents, flat, offset) * self.scales
        return self._products(errors, errors).sum() / self.energy

    def loss_and_rate(self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None) -> Tensor:
        """What training descends along: `loss`, and with a rate the cost of bits.

        Errors of the base are noise there, as in learned image compression: its errors with signs drawn again. Latents
        that saw the same errors for some steps would answer them, and be rounded back, worse than before. Noise comes
        with its negative, so that it moves no latents where a decoder is linear
        (docs/experiments/rate-in-the-loss-of-convolutions.md).
        """
        if self.rate is None:
            return self.loss(latents, flat)
        noise = self.offset * self.signs()
        error = (self.loss(latents, flat, noise) + self.loss(latents, flat, -noise)) / 2
        return error + self.bit * self.rate.bits(self.fmt.grid_to_matrix(latents))

    def refine_latents(
        self, latents: Float[Tensor, "channels down across"], flat: Tensor | None
    ) -> Float[Tensor, "channels down across"]:
        """About the best latents by error alone: steepest descent, by steps that are the best if the net is linear."""
        assert self.costs is not None
        none, flat = torch.zeros_like(self.offset), None if flat is None else flat.detach()
        costs = self.fmt.matrix_to_grid(self.costs.importance)
        costs = (costs + _LEAST_COST * costs.mean()).clamp(min=_TINY)
        for _ in range(_SHARPENING):
            (gradient,) = compute_gradients([latents], lambda moving: self.loss(moving, flat, none))
            way = -gradient / costs
            with one_thread():
                moved = (
                    self.decode_weight(latents + way, flat, none) - self.decode_weight(latents, flat, none)
                ) * self.scales
                bend = 2 * self._products(moved, moved).sum() / self.energy
                latents = latents - way * (gradient * way).sum() / bend.clamp(min=_TINY)
        return latents

    def signs(self) -> Float[Tensor, "channels down across"]:
        """One of ±1 for every latent, drawn on the CPU."""
        return (2 * torch.randint(2, self.offset.shape, generator=self.generator) - 1).to(self.offset)

    def rescale(self, *tensors: Tensor) -> None:
        """Give every row the scale that serves it best now."""
        decoded = self.decode_weight(*tensors)
        energy = self._products(decoded, decoded)
        best = self._products(decoded, self.weight) / torch.where(energy > 0, energy, 1.0)
        best = torch.where(energy > 0, best, self.scales[:, 0])[:, None]
        self.scales = scale_store.fake_quantize(scale_store.FLOAT16, best)

    def _products(self, one: Float[Tensor, "out in"], other: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Of rows, as errors are weighed."""
        if self.objective.hessian is not None:
            return ((one @ self.objective.hessian) * other).sum(1)
        return (one * other * self.objective.importance).sum(1)


@fit.register
def fit_conv_latents(
    fmt: ConvLatents, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedConvLatents:
    """Begins as a linear decoder of the leading directions of patches; then gradients by the true error, scales too.

    The straight-through estimator passes gradients by the rounding of latents and parameters. A shared net is taken as
    it is, and only latents move. The best of all states is kept, by error: bytes are the same for all.

    With `rate` the loss is that of learned image compression (Ballé et al., arXiv:1802.01436), error + λ · bits of the
    latents under a learned density. Bytes are given, so that a bit saved makes the step finer: λ is what the base pays
    for a bit when it chooses codes (BIT squared steps, times what a squared error of a latent costs), times `rate`.
    """
    objective = objective or Objective.plain(weight)
    if fmt.shared:
        record_fit_input(fmt, weight, objective)
    before = start if isinstance(start, UnpackedConvLatents) else None
    weight, scales = clamp_weight(fmt, weight)
    fixed = fmt.decoder({}, weight.device) if fmt.shared else None
    state = _MatrixState(fmt, weight, objective, scales, seed, fixed, before.base if before else None)
    known = fixed or (before.decoder if before else None)
    if known is None:
        flat = initial_net(fmt, [state.padded_weight], seed)
    else:
        flat = parameters.values(fmt.decoder_bits, known, fmt.net.parameters)
    if before:
        latents = state.decoded_latents()
    elif fmt.method == ENCODER:
        latents, flat = _train_encoder(state, flat)
    else:
        latents = project_latents(fmt, flat, state.padded_weight)
    return _optimize(state, latents, flat)


@train_shared_decoder.register
def train_conv_latents(
    fmt: ConvLatents, fit_inputs: Sequence[FitInput], device: str, seed: int = 0
) -> parameters.UnpackedParameters:
    """One net and the latents of all matrices; a step of one matrix after that of another."""
    states = []
    for number, fit_input in enumerate(fit_inputs):
        objective = fit_input.objective.to(torch.device(device))
        weight, scales = clamp_weight(fmt, fit_input.weight.to(device))
        # All latents of a large model do not fit beside it: hessians least of all.
        states.append(_MatrixState(fit_input.fmt, weight, Objective(objective.importance), scales, seed + number))
    flat = initial_net(fmt, [state.padded_weight for state in states], seed)
    net = Adam(flat, _NET_RATE)
    grids = [Adam(project_latents(fmt, flat, state.padded_weight), _LATENT_RATE) for state in states]
    for step in range(fmt.steps):
        for state, latents in zip(states, grids, strict=True):
            if step % _REQUANTISED == 0:
                state.refit_base(latents.tensor, net.tensor)
            _train(state, latents, net, step, fmt.steps)
    return quantize_parameters(fmt.decoder_bits, net.tensor)


def clamp_weight(
    fmt: ConvLatents, weight: Float[Tensor, "out in"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out 1"]]:
    """(weight, its first scales): zeros if float16 makes all scales 0, and no weight so large that squares overflow.

    Steps of latents are absolute. Normalised by scales that float16 made 0 or cut, latents would be far from 1, and
    gradients end in nan.
    """
    weight = weight.clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    scales = initial_scales(fmt, weight)
    return weight if scales.any() else torch.zeros_like(weight), scales


def initial_scales(fmt: ConvLatents, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out 1"]:
    """The root mean squares of rows. With a rate all are alike: at the least rate equal errors cost equal bits.

    So small rows take few bits (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3).
    """
    scales = root_mean_squares(weight, 0, scale_store.FLOAT16)
    if not fmt.rate:
        return scales
    largest = scales.max().clamp(min=_TINY)
    mean = average((scales / largest).square()).sqrt() * largest
    return scale_store.fake_quantize(scale_store.FLOAT16, mean.expand_as(scales).contiguous())


def initial_net(
    fmt: ConvLatents, padded_weight: Sequence[Float[Tensor, "rows columns"]], seed: int
) -> Float[Tensor, " parameters"]:
    """The linear way takes the leading directions of the patches; the convolutional one is random, its head nothing."""
    net = fmt.net
    area = net.factor**2
    covariance = torch.zeros(area, area, dtype=torch.float64)
    for matrix in padded_weight:
        patches = F.pixel_unshuffle(matrix[None], net.factor).flatten(1).double()
        with one_thread():
            covariance += (patches @ patches.T).cpu() / max(patches.shape[1], 1)
    with one_thread():
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    flat = torch.randn(net.parameters, generator=torch.Generator().manual_seed(seed))
    named = split(flat, net.shapes)
    for name, tensor in named.items():
        tensor *= 0.0 if name in ("head", "bias", "skip") or name.endswith("_bias") else tensor[0].numel() ** -0.5
    kept = min(net.channels, area)
    # As many latents as weights: each is a weight.
    named["skip"][:, :kept] = torch.eye(area) if kept == area else directions[:, :kept].float()
    if net.channels > area:  # the others say again what these say, half as loud: a finer second look
        named["skip"][:, area:] = torch.eye(area).repeat(1, -(-net.channels // area))[:, : net.channels - area] / 2
    return flat.to(padded_weight[0].device)


def project_latents(
    fmt: ConvLatents, flat: Float[Tensor, " parameters"], padded_weight: Float[Tensor, "rows columns"]
) -> Float[Tensor, "channels down across"]:
    """The latents that are best for the linear way alone."""
    net = fmt.net
    skip = split(flat, net.shapes)["skip"]
    inverse = torch.linalg.pinv(skip.double().cpu()).to(skip)
    patches = F.pixel_unshuffle(padded_weight[None], net.factor)
    with one_thread():
        return (inverse @ patches.flatten(1)).view(net.channels, *patches.shape[1:])


def _train_encoder(state: _MatrixState, flat: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, net) once an encoder was trained with the net; it is thrown away."""
    net, padded_weight, steps = state.fmt.net, state.padded_weight, state.fmt.steps // 2
    skip = torch.linalg.pinv(split(flat, net.shapes)["skip"].double().cpu()).to(flat)
    adams = [Adam(initial_parameters(net, skip, state.seed), _NET_RATE)]
    if state.fixed is None:
        adams.append(Adam(flat, _NET_RATE))

    def encode_latents(encoder: Tensor) -> Float[Tensor, "channels down across"]:
        with one_thread(), plain_convolutions():
            return encode(net, encoder, padded_weight)

    for step in range(steps):
        if step % _REQUANTISED == 0:
            state.refit_base(encode_latents(adams[0].tensor.detach()), *(adam.tensor for adam in adams[1:]))
        _gradient_step(
            adams, lambda encoder, *flat: state.loss_and_rate(encode_latents(encoder), *flat), cosine_decay(step, steps)
        )
    return encode_latents(adams[0].tensor.detach()), flat if state.fixed else adams[1].tensor.detach()


def _optimize(state: _MatrixState, latents: Tensor, flat: Tensor) -> UnpackedConvLatents:
    """The best of the states met on the way, as stored."""
    fmt, steps = state.fmt, state.fmt.steps
    adams = [Adam(latents, _LATENT_RATE)]
    if state.fixed is None:
        adams.append(Adam(flat, _NET_RATE))
    best, least = None, float("inf")
    for step in range(steps + 1):
        if step % _REQUANTISED == 0 or step == steps:
            state.refit_base(*(adam.tensor for adam in adams))
            with torch.no_grad(), one_thread():
                state.rescale(*(adam.tensor for adam in adams))
                error = state.loss(*(adam.tensor for adam in adams)).item()
            if best is None or error < least:
                decoder = state.fixed or quantize_parameters(fmt.decoder_bits, adams[1].tensor)
                best, least = UnpackedConvLatents(decoder, state.scales, state.base), error
        if step < steps:
            _train(state, adams[0], adams[1] if state.fixed is None else None, step, steps)
    assert best is not None
    return best


def _train(state: _MatrixState, latents: Adam, net: Adam | None, step: int, steps: int) -> None:
    """A step of all; with a rate the last quarter moves the net alone, by the errors that the base makes."""
    noisy = steps - steps // _LAST if state.rate is not None and net else steps
    if step < noisy:
        _gradient_step([latents, *([net] if net else [])], state.loss_and_rate, cosine_decay(step, noisy))
    elif net:
        still = latents.tensor.detach()
        _gradient_step([net], lambda flat: state.loss(still, flat), cosine_decay(step - noisy, steps - noisy))


def _gradient_step(adams: Sequence[Adam], loss_fn: Callable[..., Tensor], share: float) -> None:
    """One step. Autograd chooses algorithms when it goes backwards: there too they must be the same in every run.

    TF32 is good enough for gradients, which the straight-through estimator has made guesses of already.
    """
    with plain_convolutions(tf32=True):
        gradient_step(adams, loss_fn, share)
