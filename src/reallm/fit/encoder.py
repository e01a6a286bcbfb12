"""A net from weights to latents, after ConvNeXt (Liu et al., arXiv:2201.03545): trained, asked once, thrown away."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reallm.decoders import ConvNet
from reallm.decoders.flat_vector import Shapes, count, split

_BLOCKS, _WIDTH = 2, 32


def encoder_shapes(net: ConvNet) -> Shapes:
    """Parameters of the encoder that belongs to a decoder."""
    found: Shapes = {"stem": (_WIDTH, net.factor**2), "skip": (net.channels, net.factor**2)}
    for k in range(_BLOCKS):
        found |= {
            f"depth{k}": (_WIDTH, 1, 7, 7),
            f"wide{k}": (4 * _WIDTH, _WIDTH),
            f"narrow{k}": (_WIDTH, 4 * _WIDTH),
        }
    return {**found, "out": (net.channels, _WIDTH)}


def initial_parameters(net: ConvNet, skip: Float[Tensor, "channels patch"], seed: int) -> Float[Tensor, " parameters"]:
    """Random ones; what the blocks add is nothing at first, so that the encoder begins as the linear map `skip`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = encoder_shapes(net)
    flat = torch.randn(count(shapes), generator=generator)
    named = split(flat, shapes)
    for name, tensor in named.items():
        tensor *= 0.0 if name == "out" else (tensor[0].numel()) ** -0.5
    named["skip"].copy_(skip.cpu())
    return flat.to(skip.device)


def encode(
    net: ConvNet, flat: Float[Tensor, " parameters"], matrix: Float[Tensor, "out in"]
) -> Float[Tensor, "channels down across"]:
    """Latents of a matrix whose sides are multiples of the patch."""
    named = split(flat, encoder_shapes(net))
    patches = F.pixel_unshuffle(matrix[None, None], net.factor)
    values = F.conv2d(patches, named["stem"][:, :, None, None])
    for k in range(_BLOCKS):
        inside = F.conv2d(values, named[f"depth{k}"], padding=3, groups=_WIDTH)
        inside = F.layer_norm(inside.movedim(1, 3), (_WIDTH,)).movedim(3, 1)
        inside = F.gelu(F.conv2d(inside, named[f"wide{k}"][:, :, None, None]))
        values = values + F.conv2d(inside, named[f"narrow{k}"][:, :, None, None])
    skip = F.conv2d(patches, named["skip"][:, :, None, None])
    return (skip + F.conv2d(values, named["out"][:, :, None, None]))[0]
