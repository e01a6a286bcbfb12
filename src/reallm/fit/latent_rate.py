"""Bits of latents under a learned density, with gradients: the rate in the loss that latents and net are trained by.

The factorised density of learned image compression (Ballé et al., arXiv:1802.01436): one for each class of columns,
which is what a table is stored for. Here it is a mixture of logistics (Salimans et al., arXiv:1701.05517), learned from
the histogram of the codes. It is never stored: tables of frequencies are, and true bytes come from those alone.

                                              every few steps
latents ── lattice, rate and distortion ──▶ codes ── histogram ──▶ density ──▶ bits of latents ──▶ loss
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.fit.training import Adam, gradient_step
from reallm.formats.entropy_coded import EntropyCoded, UnpackedEntropyCoded

# Sizes of the components over a class's root mean square at first: a peak, the body, a tail.
_FIRST_SIZES = (0.15, 0.4, 1.0)
_STEPS, _RATE = 100, 3e-2
_LEAST_SIZE = 0.1  # steps
# A latent costs at most 24 bits: codes beyond the table take no more.
_LEAST_SHARE = 2.0**-24


@dataclass(frozen=True)
class LatentRate:
    """A density for each class of columns; `mixtures` are logits, means and logarithms of sizes, in steps."""

    mixtures: Float[Tensor, "3 components classes"]
    column_classes: Int[Tensor, " columns"]
    step: float

    @staticmethod
    def estimate(fmt: EntropyCoded, unpacked: UnpackedEntropyCoded, start: LatentRate | None = None) -> LatentRate:
        """The densities under which the codes of a matrix take the fewest bits; goes on from `start`."""
        column_classes = (
            torch.from_numpy(fmt.assign_classes(unpacked.codes.cpu().numpy())).to(unpacked.codes.device).long()
        )
        values, shares = _histogram(unpacked.codes, column_classes, fmt.classes)
        adam = Adam(_initialize(values, shares) if start is None else start.mixtures, _RATE)
        for _ in range(_STEPS):
            gradient_step([adam], lambda mixtures: (shares * _bits(values, mixtures[..., None])).sum(), 1.0)
        return LatentRate(adam.tensor.detach(), column_classes, unpacked.step.item())

    def bits(self, latents: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
        """Of all latents together."""
        return _bits(latents / self.step, self.mixtures[:, :, self.column_classes][:, :, None]).sum(0).sum()


def _bits(values: Tensor, mixtures: Float[Tensor, "3 components *places"]) -> Tensor:
    """-log2 of the probability within ±1 of values, which broadcast with the places that mixtures are for.

    A point of E8 in half steps has a cell of 2^8, two for each of its numbers.
    """
    shares, means, sizes = mixtures[0].softmax(0), mixtures[1], mixtures[2].exp()
    found = torch.full_like(values, _LEAST_SHARE)
    for share, mean, size in zip(shares, means, sizes, strict=True):
        # On the side where a sigmoid is small: differences of those that are almost 1 would be 0.
        distance = (values - mean).abs()
        found = found + share * (((1 - distance) / size).sigmoid() - ((-1 - distance) / size).sigmoid())
    return -found.log2()


def _histogram(
    codes: Int[Tensor, "rows columns"], column_classes: Int[Tensor, " columns"], classes: int
) -> tuple[Float[Tensor, " values"], Float[Tensor, "classes values"]]:
    """The values from the least to the largest code, and what share of all codes are codes of a class and a value."""
    least, largest = int(codes.min()), int(codes.max())
    size = largest - least + 1
    counts = torch.bincount((codes - least + column_classes * size).view(-1), minlength=classes * size)
    values = torch.arange(least, largest + 1, device=codes.device, dtype=torch.float32)
    return values, counts.view(classes, size) / codes.numel()


def _initialize(
    values: Float[Tensor, " values"], shares: Float[Tensor, "classes values"]
) -> Float[Tensor, "3 components classes"]:
    """Components around 0, as large as the codes of a class are."""
    mass = shares.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    sizes = ((shares * values.square()).sum(1) / mass).sqrt().clamp(min=_LEAST_SIZE)
    sizes = sizes * sizes.new_tensor(_FIRST_SIZES)[:, None]
    return torch.stack([torch.zeros_like(sizes), torch.zeros_like(sizes), sizes.log()])
