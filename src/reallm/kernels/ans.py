"""Entropy coding with given symbol frequencies: asymmetric numeral system (ANS), 64-bit state, 32-bit words.

The package `constriction` (Bamler, arXiv:2201.01741) does the arithmetic; docs/artifact.md specifies the stream. The
coder is a stack: symbols are read in the reverse order of writing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from reallm.errors import FormatError, MissingPackageError, install_hint

# Sum of the frequencies of a model.
TOTAL = 1 << 24
RAW_BITS = 16


class AnsWriter:
    """Encoder; the symbols written first are read last."""

    def __init__(self) -> None:
        self._coder = _stream().stack.AnsCoder()

    def write(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        """Write symbols, which are indices into `frequencies` (int64, sum TOTAL); one of frequency 0 may not occur."""
        used = np.flatnonzero(frequencies)
        if len(symbols) and len(used) > 1:  # a single possible symbol takes no bits
            order = np.searchsorted(used, symbols).astype(np.int32)
            self._coder.encode_reverse(order, _model(frequencies[used]))

    def write_raw(self, values: np.ndarray) -> None:
        """Write values in 0 … 2^16 - 1, 16 bits each."""
        if len(values):
            self._coder.encode_reverse(values.astype(np.int32), _stream().model.Uniform(1 << RAW_BITS))

    def words(self) -> np.ndarray:
        """Return the uint32 words of the stream; the last word, if any, is not 0."""
        return self._coder.get_compressed()


class AnsReader:
    """Decoder of the words of an `AnsWriter`, last written symbols first.

    Any words can be decoded: damaged ones give wrong symbols, after which `is_empty` is most likely false.
    """

    def __init__(self, words: np.ndarray) -> None:
        used = np.flatnonzero(words)
        end = used[-1] + 1 if len(used) else 0
        self._coder = _stream().stack.AnsCoder(np.ascontiguousarray(words[:end], np.uint32))

    def read(self, count: int, frequencies: np.ndarray) -> np.ndarray:
        """Read `count` symbols, int64.

        Errors: FormatError if no symbol has a frequency above 0.
        """
        used = np.flatnonzero(frequencies)
        if count and not len(used):
            raise FormatError("entropy-coded stream is damaged: it needs a code with frequency 0 in its table")
        if not count or len(used) == 1:
            return np.full(count, used[0] if count else 0, np.int64)
        return used[self._coder.decode(_model(frequencies[used]), count)]

    def read_raw(self, count: int) -> np.ndarray:
        """Read `count` values of 16 bits, int64."""
        if not count:
            return np.zeros(0, np.int64)
        return self._coder.decode(_stream().model.Uniform(1 << RAW_BITS), count).astype(np.int64)

    @property
    def is_empty(self) -> bool:
        """Whether the whole stream has been read."""
        return bool(self._coder.is_empty())


def normalize_frequencies(weights: np.ndarray) -> np.ndarray:
    """Convert at most 255 weights of 0 or 16 … 2^21 to int64 frequencies that sum to TOTAL; only 0 becomes 0.

    Each frequency is its share rounded down; the remainder goes to the first of the largest. If all weights are 0, so
    are all frequencies.
    """
    weights = weights.astype(np.int64)
    frequencies = weights * TOTAL // max(int(weights.sum()), 1)
    if weights.any():
        frequencies[frequencies.argmax()] += TOTAL - frequencies.sum()
    return frequencies


def _model(frequencies: np.ndarray) -> Any:
    # constriction gives each symbol frequency 1 and divides the remainder by weight: these weights make that exact.
    return _stream().model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _stream() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise MissingPackageError(
            f"entropy_coded needs the package 'constriction': {install_hint('entropy')}"
        ) from error
    return constriction.stream
