"""Latents and convolutional decoder trained together, quantised as they will be stored; decoders for many matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reallm.decoders.parameters import split
from reallm.fit.codeword import root_mean_squares
from reallm.fit.dispatch import fit, shape_of
from reallm.fit.encoder import encoded, first_parameters
from reallm.fit.objective import Objective
from reallm.fit.rounding import divisors
from reallm.fit.shared import Demand, note_demand, train_shared
from reallm.fit.training import Adam, descend, falling, quantised, stored_parameters
from reallm.formats import Parts, Shape, parameters
from reallm.formats import scales as scale_store
from reallm.formats.conv_latents import ENCODER, ConvLatents, ConvLatentsParts, plain_convolutions
from reallm.kernels import one_thread, straight_through

_NET_RATE, _LATENT_RATE = 2e-3, 1e-2
# The base is fitted to the latents anew after so many steps; in between its errors stay as they were found.
_REQUANTISED = 10
_TINY = 1e-30


@dataclass
class _Trained:
    """One matrix on its way: what it should be, and its latents as the base stores them."""

    fmt: ConvLatents
    weight: Float[Tensor, "out in"]
    objective: Objective
    scales: Float[Tensor, "out 1"]
    seed: int
    fixed: parameters.Stored | None = None  # a net that does not train
    base: Parts = None
    offset: Tensor = field(default_factory=lambda: torch.zeros(()))

    @functools.cached_property
    def unit(self) -> Tensor:
        """The largest scale at first."""
        return self.scales.abs().max().clamp(min=_TINY)

    @property
    def shape(self) -> Shape:
        return shape_of(self.weight)

    @property
    def filled(self) -> Float[Tensor, "rows columns"]:
        """The normalised matrix, its sides filled up to multiples of the patch."""
        side = self.fmt.net.factor
        normalised = self.weight / divisors(self.scales)
        return F.pad(normalised, (0, -self.shape[1] % side, 0, -self.shape[0] % side))

    @functools.cached_property
    def of_latents(self) -> Objective:
        """What errors of latents cost, about: the mean of their patch."""
        costs = (self.scales / self.unit).square() * self.objective.importance
        side = self.fmt.net.factor
        costs = F.pad(costs.expand(self.shape), (0, -self.shape[1] % side, 0, -self.shape[0] % side))
        means = F.avg_pool2d(costs[None, None], side)[0]
        return Objective(self.fmt.as_matrix(means.expand(self.fmt.channels, -1, -1)).contiguous())

    def requantise(self, latents: Float[Tensor, "channels down across"]) -> None:
        """Fit the base to the latents: k-means begins where it ended, and revives dead entries."""
        with torch.no_grad():
            matrix = self.fmt.as_matrix(latents.detach()).contiguous()
            self.base = fit(self.fmt.base, matrix, self.of_latents, self.seed, self.base)
            self.offset = self.decoded_latents() - latents.detach()

    def decoded_latents(self) -> Float[Tensor, "channels down across"]:
        """As they come back from the file."""
        return self.fmt.as_grid(self.fmt.base.decode(self.base, self.fmt.inner_shape(self.shape)))

    def decoded(
        self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The matrix before its scales; latents and net quantised, gradients straight through."""
        seen = straight_through(latents, (latents + self.offset).detach())
        bits, count = self.fmt.decoder_bits, self.fmt.net.parameters
        net = parameters.values(bits, self.fixed, count) if flat is None else quantised(bits, flat)
        with plain_convolutions():
            decoded = self.fmt.net.whole(net, seen)
        return decoded[: self.shape[0], : self.shape[1]]

    def loss(self, latents: Float[Tensor, "channels down across"], flat: Tensor | None = None) -> Tensor:
        """The error by the objective, over that of zeros."""
        errors = self.weight - self.decoded(latents, flat) * self.scales
        return self._products(errors, errors).sum() / self._products(self.weight, self.weight).sum().clamp(min=_TINY)

    def rescale(self, *tensors: Tensor) -> None:
        """Give every row the scale that serves it best now."""
        decoded = self.decoded(*tensors)
        energy = self._products(decoded, decoded)
        best = self._products(decoded, self.weight) / torch.where(energy > 0, energy, 1.0)
        best = torch.where(energy > 0, best, self.scales[:, 0])[:, None]
        self.scales = scale_store.stored(scale_store.FLOAT16, best)

    def _products(self, one: Float[Tensor, "out in"], other: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Of rows, as errors are weighed."""
        if self.objective.hessian is not None:
            return ((one @ self.objective.hessian) * other).sum(1)
        return (one * other * self.objective.importance).sum(1)


@fit.register
def fit_conv_latents(
    fmt: ConvLatents, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Parts | None = None
) -> ConvLatentsParts:
    """Begins as a linear decoder of the leading directions of patches; then gradients by the true error, scales too.

    The straight-through estimator passes gradients by the rounding of latents and parameters. A shared net is taken as
    it is, and only latents move. The best of all states is kept.
    """
    objective = objective or Objective.plain(weight)
    if fmt.shared:
        note_demand(fmt, weight, objective)
    before = start if isinstance(start, ConvLatentsParts) else None
    scales = root_mean_squares(weight, 0, scale_store.FLOAT16)
    fixed = fmt.decoder({}, weight.device) if fmt.shared else None
    state = _Trained(fmt, weight, objective, scales, seed, fixed, before.base if before else None)
    known = fixed or (before.decoder if before else None)
    if known is None:
        flat = first_net(fmt, [state.filled], seed)
    else:
        flat = parameters.values(fmt.decoder_bits, known, fmt.net.parameters)
    if before:
        latents = state.decoded_latents()
    elif fmt.method == ENCODER:
        latents, flat = _with_encoder(state, flat)
    else:
        latents = projected(fmt, flat, state.filled)
    return _descended(state, latents, flat)


@train_shared.register
def train_conv_latents(fmt: ConvLatents, demands: Sequence[Demand], device: str, seed: int = 0) -> parameters.Stored:
    """One net and the latents of all matrices; a step of one matrix after that of another."""
    states = []
    for number, demand in enumerate(demands):
        weight, objective = demand.weight.to(device), demand.objective.to(torch.device(device))
        scales = root_mean_squares(weight, 0, scale_store.FLOAT16)
        # All latents of a large model do not fit beside it: hessians least of all.
        states.append(_Trained(demand.fmt, weight, Objective(objective.importance), scales, seed + number))
    flat = first_net(fmt, [state.filled for state in states], seed)
    net = Adam(flat, _NET_RATE)
    grids = [Adam(projected(fmt, flat, state.filled), _LATENT_RATE) for state in states]
    for step in range(fmt.steps):
        for state, latents in zip(states, grids, strict=True):
            if step % _REQUANTISED == 0:
                state.requantise(latents.tensor)
            _descend([latents, net], state.loss, falling(step, fmt.steps))
    return stored_parameters(fmt.decoder_bits, net.tensor)


def first_net(
    fmt: ConvLatents, filled: Sequence[Float[Tensor, "rows columns"]], seed: int
) -> Float[Tensor, " parameters"]:
    """The linear way takes the leading directions of the patches; the convolutional one is random, its head nothing."""
    net = fmt.net
    area = net.factor**2
    covariance = torch.zeros(area, area, dtype=torch.float64)
    for matrix in filled:
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
    return flat.to(filled[0].device)


def projected(
    fmt: ConvLatents, flat: Float[Tensor, " parameters"], filled: Float[Tensor, "rows columns"]
) -> Float[Tensor, "channels down across"]:
    """The latents that are best for the linear way alone."""
    net = fmt.net
    skip = split(flat, net.shapes)["skip"]
    inverse = torch.linalg.pinv(skip.double().cpu()).to(skip)
    patches = F.pixel_unshuffle(filled[None], net.factor)
    with one_thread():
        return (inverse @ patches.flatten(1)).view(net.channels, *patches.shape[1:])


def _with_encoder(state: _Trained, flat: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, net) once an encoder was trained with the net; it is thrown away."""
    net, filled, steps = state.fmt.net, state.filled, state.fmt.steps // 2
    skip = torch.linalg.pinv(split(flat, net.shapes)["skip"].double().cpu()).to(flat)
    adams = [Adam(first_parameters(net, skip, state.seed), _NET_RATE)]
    if state.fixed is None:
        adams.append(Adam(flat, _NET_RATE))

    def latents_of(encoder: Tensor) -> Float[Tensor, "channels down across"]:
        with one_thread(), plain_convolutions():
            return encoded(net, encoder, filled)

    for step in range(steps):
        if step % _REQUANTISED == 0:
            state.requantise(latents_of(adams[0].tensor.detach()))
        _descend(adams, lambda encoder, *flat: state.loss(latents_of(encoder), *flat), falling(step, steps))
    return latents_of(adams[0].tensor.detach()), flat if state.fixed else adams[1].tensor.detach()


def _descended(state: _Trained, latents: Tensor, flat: Tensor) -> ConvLatentsParts:
    """The best of the states met on the way, as stored."""
    fmt, steps = state.fmt, state.fmt.steps
    adams = [Adam(latents, _LATENT_RATE)]
    if state.fixed is None:
        adams.append(Adam(flat, _NET_RATE))
    best, least = None, float("inf")
    for step in range(steps + 1):
        if step % _REQUANTISED == 0 or step == steps:
            state.requantise(adams[0].tensor)
            with torch.no_grad(), one_thread():
                state.rescale(*(adam.tensor for adam in adams))
                error = state.loss(*(adam.tensor for adam in adams)).item()
            if best is None or error < least:
                decoder = state.fixed or stored_parameters(fmt.decoder_bits, adams[1].tensor)
                best, least = ConvLatentsParts(decoder, state.scales, state.base), error
        if step < steps:
            _descend(adams, state.loss, falling(step, steps))
    assert best is not None
    return best


def _descend(adams: Sequence[Adam], loss_of: Callable[..., Tensor], share: float) -> None:
    """One step. Autograd chooses algorithms when it goes backwards: there too they must be the same in every run.

    TF32 is good enough for gradients, which the straight-through estimator has made guesses of already.
    """
    with plain_convolutions(tf32=True):
        descend(adams, loss_of, share)
