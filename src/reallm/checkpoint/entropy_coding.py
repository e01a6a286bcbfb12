"""Stored tensors entropy-coded as a whole: what a file holds of a tensor that coding makes smaller.

Formats know nothing of it: a tensor is coded after `pack` and decoded before `unpack`, whatever it means. Of two
codecs each tensor has the one that serves it best: symbols by their frequencies (`kernels/rans.py`), which is best for
codes of weights, or LZMA, which is best for some thousand scales, where a table of frequencies is too large.
"""

from __future__ import annotations

import lzma

import numpy as np
import torch
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import Tensors, WeightFormat
from reallm.kernels.rans import decode_bytes, encode_bytes

# A coded tensor costs time at every load: 1 % is what it must save for that.
LEAST_GAIN = 0.01
# A matrix whose coded tensors are others than those of its like has a layout of its own in the manifest.
_LEAST_SAVED = 400
# Roles that `reallm tune` changes unless told otherwise: other values may code worse, so that an artifact which has to
# keep within a size has them as they are. On SmolLM2-135M coding left 0.68 to 0.94 of scales, 0.2 % of a 60 MB file.
TRAINED_ROLES = frozenset({"residual", "scales", "gains", "codebooks"})
_LZMA = 0  # first byte; those of the other codec begin with 1 to 8
_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20}]
_LARGEST_FOR_LZMA = 1 << 18  # beyond, the table of frequencies is nothing, and LZMA codes 2 MB a second


def encode_tensor(tensor: Tensor, least_gain: float = LEAST_GAIN) -> Tensor | None:
    """The tensor's bytes in fewer, uint8 of shape [bytes] on the CPU; None where that saves less than `least_gain`."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    most = float(min((1 - least_gain) * len(raw), len(raw) - _LEAST_SAVED))
    found = encode_bytes(raw, most) if most > 0 else None
    if most > 0 and len(raw) <= _LARGEST_FOR_LZMA:
        packed = bytes([_LZMA]) + lzma.compress(raw.tobytes(), lzma.FORMAT_RAW, filters=_FILTERS)
        most = most if found is None else len(found) - 1
        found = np.frombuffer(packed, np.uint8) if len(packed) <= most else found
    return None if found is None else torch.from_numpy(found.copy())


def decode_tensor(coded: Tensor, like: Tensor) -> Tensor:
    """The tensor that `coded` stands for, of shape and dtype of `like` (any device), on the device of `coded`.

    Errors: FormatError for bytes that are damaged.
    """
    stored = coded.detach().cpu().numpy()
    if len(stored) and stored[0] == _LZMA:
        raw = np.frombuffer(_decompress_lzma(stored[1:].tobytes(), like.nbytes), np.uint8)
    else:
        raw = decode_bytes(stored, like.nbytes)
    return torch.from_numpy(raw.copy()).view(like.dtype).view(like.shape).to(coded.device)


def encode_tensors(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Tensors as they are written, and the names of those that are coded."""
    coded = {name: found for name, tensor in tensors.items() if (found := encode_tensor(tensor)) is not None}
    return tensors | coded, tuple(coded)


def encode_untrained_tensors(fmt: WeightFormat, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """As `encode_tensors` for the tensors of a matrix, without those that tuning changes: they could take more bytes then."""
    coded, names = encode_tensors(
        {name: tensor for name, tensor in tensors.items() if fmt.role(name) not in TRAINED_ROLES}
    )
    return tensors | coded, names


def _decompress_lzma(data: bytes, nbytes: int) -> bytes:
    damaged = FormatError("entropy-coded tensor is damaged; copy the artifact again")
    if nbytes > _LARGEST_FOR_LZMA:  # never written: a few bytes would stand for any number
        raise damaged
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        found = decompressor.decompress(data, nbytes + 1)
    except lzma.LZMAError as error:
        raise damaged from error
    if len(found) != nbytes or not decompressor.eof or decompressor.unused_data:
        raise damaged
    return found
