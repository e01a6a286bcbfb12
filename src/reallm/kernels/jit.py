"""Triton's compiler for our kernels. Importable only where Triton is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


def jit_kernel(function: Callable) -> Any:
    """`triton.jit`, which reads source and globals: not those of a type checker that tests wrap around functions."""
    return triton.jit(inspect.unwrap(function))


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the GPU of `tensor`; Triton's interpreter has none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
