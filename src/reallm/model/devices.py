"""Whether a device is there, and on which one a module is."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from reallm.errors import RecipeError
from reallm.model.untrusted import said


def check_device(device: str) -> None:
    """Errors: RecipeError for a device that torch does not know, or that is not here."""
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RecipeError(f"--device {device!r} is not available ({said(error)}); use cpu") from error


def device_of(module: nn.Module) -> torch.device:
    """Where a module is. A compressed one may have no parameters, only buffers: OLMo's norms have no weights."""
    return next(itertools.chain(module.parameters(), module.buffers())).device
