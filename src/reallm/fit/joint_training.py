"""Decoders that many matrices share: what each matrix asks of one, and its training on all of them together."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from reallm.fit.dispatch import fit
from reallm.fit.objective import Objective
from reallm.formats import WeightFormat, parameters

_capturing: contextvars.ContextVar[bool] = contextvars.ContextVar("asking", default=False)


@dataclass
class FitInput(Exception):
    """What a format with a shared decoder was asked to fit, inside whatever formats there are around it."""

    fmt: WeightFormat
    weight: Tensor
    objective: Objective


def capture_fit_input(fmt: WeightFormat, weight: Tensor, objective: Objective, seed: int) -> FitInput:
    """What the first fit of the inner format would see: permuted, rotated, without the first residual.

    The fit is broken off there. Errors: AssertionError if no format in `fmt` names a shared decoder.
    """
    token = _capturing.set(True)
    try:
        fit(fmt, weight, objective, seed)
    except FitInput as found:
        return FitInput(found.fmt, found.weight.cpu(), found.objective.to(torch.device("cpu")))
    finally:
        _capturing.reset(token)
    raise AssertionError(f"{fmt.name}: names no shared decoder")


def record_fit_input(fmt: WeightFormat, weight: Tensor, objective: Objective) -> None:
    """To be called by the fit of a format with a shared decoder, before it looks for that."""
    if _capturing.get():
        raise FitInput(fmt, weight, objective)


@contextlib.contextmanager
def disable_capture() -> Iterator[None]:
    """Fits in here are real ones."""
    token = _capturing.set(False)
    try:
        yield
    finally:
        _capturing.reset(token)


@singledispatch
def train_shared_decoder(
    fmt: WeightFormat, fit_inputs: Sequence[FitInput], device: str, seed: int = 0
) -> parameters.UnpackedParameters:
    """The decoder that serves all demands, whose formats differ from `fmt` at most in what is not the decoder's."""
    raise NotImplementedError(f"no way to train a decoder for {type(fmt).__name__} is registered")
