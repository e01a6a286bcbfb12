"""Triton compilation of our kernels. Importable only with Triton."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


def jit_kernel(function: Callable) -> Any:
    """Apply `triton.jit` to the function without the type checker that tests wrap around: it reads its source."""
    return triton.jit(inspect.unwrap(function))


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context whose launches run on the GPU of `tensor`; a null context in Triton's interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
