"""Validate the numbers of a loaded artifact: finite, and not larger than a compressor writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reallm.errors import ArtifactError, FormatError
from reallm.formats import Unpacked, map_tensors

# The compressor refuses weights above 1e15. Products of two numbers below this stay finite in float32.
_LARGEST = 1e18


def check_unpacked(unpacked: Unpacked) -> None:
    """Raise FormatError if a float tensor (scales, codebooks, factors) is not finite, or larger than any weight."""

    def check(tensor: Tensor) -> Tensor:
        # One pass: the largest magnitude of a tensor with a NaN is NaN, and NaN <= x is false.
        if tensor.is_floating_point() and tensor.numel() and not tensor.detach().abs().max().item() <= _LARGEST:
            raise FormatError("a stored number is NaN, infinite or huge")
        return tensor

    map_tensors(check, unpacked)


def check_decoded(weight: Tensor) -> None:
    """Raise FormatError if a decoded matrix is not finite."""
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise FormatError("the stored numbers decode to NaN or infinity")


def check_unquantized(model: nn.Module) -> None:
    """Raise ArtifactError naming a parameter that is not finite: the compressor refuses those."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            raise ArtifactError(f"tensor {name!r} holds NaN or infinity; copy the artifact again")
