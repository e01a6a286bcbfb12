"""Where kernels can run."""

from __future__ import annotations

import importlib.util


def has_triton(device: str) -> bool:
    """Whether there are Triton kernels for a type of device."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None
