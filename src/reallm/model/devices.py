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


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, AVX-512 BF16 or AMX.

    They are 2 to 4 times as fast as products of float32; where there are none, torch converts back and forth.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has the other
    if known:
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def device_of(module: nn.Module) -> torch.device:
    """Where a module is. A compressed one may have no parameters, only buffers: OLMo's norms have no weights."""
    return next(itertools.chain(module.parameters(), module.buffers())).device
