"""Availability of GPU kernels."""

from __future__ import annotations

import importlib.util


def has_triton(device: str) -> bool:
    """Return whether Triton kernels are available for a device type."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None
