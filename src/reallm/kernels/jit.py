"""Triton's compiler for our kernels. Importable only where Triton is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def compiled(function: Callable) -> Any:
    """`triton.jit`, which reads source and globals: not those of a type checker that tests wrap around functions."""
    return triton.jit(inspect.unwrap(function))
