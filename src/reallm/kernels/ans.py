"""Entropy coding with given frequencies: an asymmetric numeral system with a 64-bit state and 32-bit words.

The arithmetic is `constriction`'s (Bamler, arXiv:2201.01741); docs/artifact.md says what its words mean. The
coder is a stack: what is written last is read first.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from reallm.errors import FormatError, MissingPackageError, install_hint

# Frequencies of a model sum to this.
TOTAL = 1 << 24
RAW_BITS = 16


class AnsWriter:
    """Writes symbols; what is written first is read last."""

    def __init__(self) -> None:
        self._coder = _stream().stack.AnsCoder()

    def write(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        """Symbols number the entries of `frequencies` (int64, sum TOTAL, only those > 0 may occur)."""
        used = np.flatnonzero(frequencies)
        if len(symbols) and len(used) > 1:  # the only possible symbol takes no bits
            order = np.searchsorted(used, symbols).astype(np.int32)
            self._coder.encode_reverse(order, _model(frequencies[used]))

    def write_raw(self, values: np.ndarray) -> None:
        """Values in 0 … 2^16 - 1, 16 bits each."""
        if len(values):
            self._coder.encode_reverse(values.astype(np.int32), _stream().model.Uniform(1 << RAW_BITS))

    def words(self) -> np.ndarray:
        """The uint32 words; the last one, if there is one, is not 0."""
        return self._coder.get_compressed()


class AnsReader:
    """Reads what an `AnsWriter` wrote, last written first.

    Any words can be read: damaged ones give wrong symbols, and then `exhausted` is most likely false.
    """

    def __init__(self, words: np.ndarray) -> None:
        used = np.flatnonzero(words)
        end = used[-1] + 1 if len(used) else 0
        self._coder = _stream().stack.AnsCoder(np.ascontiguousarray(words[:end], np.uint32))

    def read(self, count: int, frequencies: np.ndarray) -> np.ndarray:
        """`count` symbols, int64.

        Errors: FormatError if no symbol is possible.
        """
        used = np.flatnonzero(frequencies)
        if count and not len(used):
            raise FormatError("entropy-coded stream is damaged: it needs a code that its table does not have")
        if not count or len(used) == 1:
            return np.full(count, used[0] if count else 0, np.int64)
        return used[self._coder.decode(_model(frequencies[used]), count)]

    def read_raw(self, count: int) -> np.ndarray:
        """`count` values of 16 bits, int64."""
        if not count:
            return np.zeros(0, np.int64)
        return self._coder.decode(_stream().model.Uniform(1 << RAW_BITS), count).astype(np.int64)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left."""
        return bool(self._coder.is_empty())


def normalize_frequencies(weights: np.ndarray) -> np.ndarray:
    """Weights of 0 or 16 … 2^21 (at most 255) -> int64 frequencies that sum to TOTAL; only 0 becomes 0.

    Each is its share rounded down, and what is left goes to the first of the largest. All weights 0: all 0.
    """
    weights = weights.astype(np.int64)
    frequencies = weights * TOTAL // max(int(weights.sum()), 1)
    if weights.any():
        frequencies[frequencies.argmax()] += TOTAL - frequencies.sum()
    return frequencies


def _model(frequencies: np.ndarray) -> Any:
    # The library gives every symbol 1 and divides the rest by weight: these weights make that exact.
    return _stream().model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _stream() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise MissingPackageError(
            f"entropy_coded needs the package 'constriction': {install_hint('entropy')}"
        ) from error
    return constriction.stream
