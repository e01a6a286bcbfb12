"""Whether a device is there."""

from __future__ import annotations

import torch

from reallm.errors import RecipeError
from reallm.model.untrusted import said


def check_device(device: str) -> None:
    """Errors: RecipeError for a device that torch does not know, or that is not here."""
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RecipeError(f"--device {device!r} is not available ({said(error)}); use cpu") from error
