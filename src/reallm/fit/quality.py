"""How good a format is, apart from any model."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit, relative_error
from reallm.fit.joint_training import capture_fit_input, train_shared_decoder
from reallm.fit.objective import Objective
from reallm.formats import Shape, WeightFormat, to_spec, use_shared_decoders
from reallm.formats.scaled import Scaled
from reallm.formats.shared_decoders import rename_shared_decoders

Result = TypeVar("Result")

# The least of so many decodings: what else the processor does only ever adds time.
_DECODINGS = 5
_WEIGHTS_PER_LEARNED = 16
# A net with 100 weights per parameter was 9 % better on them than on others (fit/neural_codebook.py).
_SAMPLES_PER_PARAMETER = 8
_SEEN = (2048, 1024)  # as many vectors of 16 as a decoder is trained on
_ANY = "x"  # stands for all names of shared decoders


@dataclass(frozen=True)
class Quality:
    """A format on a Gaussian source: what it stores, what it loses, and how long that takes."""

    bits_per_weight: float  # everything stored included
    relative_error: float
    fit_seconds_per_million: float  # seconds per 10⁶ weights
    decode_seconds_per_million: float  # the same, from stored tensors to float32

    @property
    def shannon_error(self) -> float:
        """The least relative error of any code at this rate R: 2^(-2R) (Shannon, 1959)."""
        return 2.0 ** (-2 * self.bits_per_weight)

    @property
    def gap_bits(self) -> float:
        """Bits per weight above those that the best code needs for the same error; -inf for no error at all.

        R - ½ log2(1/D). Below 0 by no more than sampling noise, as long as D > 0: a lossless format has an
        error of 0 because the source is not real numbers but float32, for which the bound does not hold.
        """
        if self.relative_error == 0:
            return -math.inf
        return self.bits_per_weight + 0.5 * math.log2(self.relative_error)


def gaussian_quality(fmt: WeightFormat, shape: Shape, device: str | torch.device = "cpu", seed: int = 0) -> Quality:
    """Fit, store and decode an i.i.d. Gaussian matrix drawn from `seed`, the same on every device.

    Errors: FormatError if the format cannot store `shape`.
    """
    fmt.check(shape)
    weight = gaussian(shape, seed).to(device)
    millions = weight.numel() / 1e6
    with torch.no_grad():
        unpacked, fit_seconds = _time_call(lambda: fit(fmt, weight, seed=seed), weight.device)
        tensors = fmt.pack(unpacked, shape)
        decodings = [
            _time_call(lambda: fmt.decode(fmt.unpack(tensors, shape), shape), weight.device) for _ in range(_DECODINGS)
        ]
    return Quality(
        bits_per_weight=fmt.bits_per_weight(shape),
        relative_error=relative_error(weight, decodings[0][0]),
        fit_seconds_per_million=fit_seconds / millions,
        decode_seconds_per_million=min(seconds for _, seconds in decodings) / millions,
    )


@functools.cache
def gaussian_error(fmt: WeightFormat) -> float:
    """Relative squared error on a seeded Gaussian matrix; that of a budget's candidate is looked up."""
    while isinstance(fmt, Scaled):  # independent normal weights have rows and columns of one size already
        fmt = fmt.base
    known = _table().get(_key(fmt))
    return measured_gaussian_error(fmt) if known is None else known["error"]


@functools.cache
def gaussian_share(fmt: WeightFormat) -> float:
    """Stored bytes / bytes before entropy coding of a budget's candidate on Gaussian weights; 1 for other formats."""
    return _table().get(_key(fmt), {}).get("share", 1.0)


def _key(fmt: WeightFormat) -> str:
    """The format's spec, whatever the name of a decoder that it shares."""
    return json.dumps(to_spec(rename_shared_decoders(fmt, _ANY)))


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """Errors of the candidates by spec, from benchmarks/gaussian_errors.py: 150 fits that no dry run waits for."""
    text = resources.files("reallm.fit").joinpath("gaussian_errors.json").read_text(encoding="utf-8")
    return {json.dumps(row["format"]): row for row in json.loads(text)}


def measured_gaussian_error(fmt: WeightFormat) -> float:
    """Relative squared error on a seeded Gaussian matrix, large enough that no codebook overfits it."""
    if fmt.shared_decoders() and "codeword" in json.dumps(to_spec(fmt)):
        return _held_out_error(fmt)
    fmt = rename_shared_decoders(fmt, "")
    # The tables of an entropy coder, which a real matrix hardly feels, would be 6 % of the bytes of 16,384 weights.
    shape = (512, 1024) if "entropy_coded" in json.dumps(to_spec(fmt)) else (32, 512)
    roles = {"codebooks": 1, "decoders": _SAMPLES_PER_PARAMETER}
    learned = sum(t.numel() * roles.get(fmt.role(name), 0) for name, t in fmt.layout(shape).items())
    # 4,096 entries of four for the 4,096 vectors of the small sample had an error of 0.0003 in place of 0.02.
    shape = (max(shape[0], _WEIGHTS_PER_LEARNED * learned // shape[1]), shape[1])
    sample = gaussian(shape)
    return relative_error(sample, fmt.decode(fit(fmt, sample), shape))


def _held_out_error(fmt: WeightFormat) -> float:
    """Relative squared error of a shared codeword decoder on weights that it was not trained on: as on most of its own.

    At 16 bits and vectors of 8 it is 0.087 on the 41,000 vectors that a decoder was trained on by itself.
    """
    seen, sample = gaussian(_SEEN, seed=1), gaussian((64, 512))
    fit_input = capture_fit_input(fmt, seen, Objective.plain(seen), 0)
    decoder = fit_input.fmt.pack_decoder(train_shared_decoder(fit_input.fmt, [fit_input], "cpu"))
    with use_shared_decoders(dict.fromkeys(fmt.shared_decoders(), decoder)):
        return relative_error(sample, fmt.decode(fit(fmt, sample), (64, 512)))


def gaussian(shape: Shape, seed: int = 0) -> Float[Tensor, "out in"]:
    """Independent normal weights of variance 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _time_call(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What `work` gives and the seconds until the device has done it."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
