"""Device checks: whether a device is available, and which one holds a module."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from reallm.errors import RecipeError
from reallm.source.limits import error_line


def check_device(device: str) -> None:
    """Raise RecipeError for a device that torch does not know, or that is not available."""
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RecipeError(f"--device {device!r} is not available ({error_line(error)}); use cpu") from error


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products, AVX-512 BF16 or AMX.

    They are 2 to 4 times as fast as float32 products; without them torch converts back and forth.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 lacks it and has the function below
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def module_device(module: nn.Module) -> torch.device:
    """Return the device of a module. A compressed module may have only buffers: OLMo's norms have no weights."""
    return next(itertools.chain(module.parameters(), module.buffers())).device
