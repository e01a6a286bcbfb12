"""Lossless entropy coding of stored tensors that coding makes smaller.

Formats are not involved: a tensor is coded after `pack` and decoded before `unpack`, whatever it means. Each tensor
takes the smaller output of two codecs: rANS over symbol frequencies (`kernels/rans.py`), best for weight codes, or
LZMA, best for a few thousand scales, where a frequency table is too large.
"""

from __future__ import annotations

import lzma

import numpy as np
import torch
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import Tensors, WeightFormat
from reallm.kernels.rans import decode_bytes, encode_bytes

# Decoding costs time at every load: a tensor is coded only if that saves at least 1 %.
LEAST_GAIN = 0.01
# Bytes: a matrix whose set of coded tensors differs from similar matrices needs its own layout entry in the manifest.
_LEAST_SAVED = 400
# Roles that `reallm tune` trains by default: new values may code worse, so an artifact with a size limit stores them
# uncoded. On SmolLM2-135M coding left 0.68 to 0.94 of the scales' bytes, a saving of 0.2 % of a 60 MB file.
TRAINED_ROLES = frozenset({"residual", "scales", "gains", "codebooks"})
_LZMA = 0  # first byte; rANS output begins with 1 to 8
_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20}]
_LARGEST_FOR_LZMA = 1 << 18  # above it the frequency table is negligible, and LZMA codes 2 MB per second


def encode_tensor(tensor: Tensor, least_gain: float = LEAST_GAIN) -> Tensor | None:
    """Return the coded tensor, uint8 of shape [bytes] on the CPU; None if coding saves less than `least_gain`."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    most = float(min((1 - least_gain) * len(raw), len(raw) - _LEAST_SAVED))
    found = encode_bytes(raw, most) if most > 0 else None
    if most > 0 and len(raw) <= _LARGEST_FOR_LZMA:
        packed = bytes([_LZMA]) + lzma.compress(raw.tobytes(), lzma.FORMAT_RAW, filters=_FILTERS)
        most = most if found is None else len(found) - 1
        found = np.frombuffer(packed, np.uint8) if len(packed) <= most else found
    return None if found is None else torch.from_numpy(found.copy())


def decode_tensor(coded: Tensor, like: Tensor) -> Tensor:
    """Decode a tensor to the shape and dtype of `like` (any device), on the device of `coded`.

    Errors: FormatError for damaged bytes.
    """
    stored = coded.detach().cpu().numpy()
    if len(stored) and stored[0] == _LZMA:
        raw = np.frombuffer(_decompress_lzma(stored[1:].tobytes(), like.nbytes), np.uint8)
    else:
        raw = decode_bytes(stored, like.nbytes)
    return torch.from_numpy(raw.copy()).view(like.dtype).view(like.shape).to(coded.device)


def encode_tensors(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Return the tensors as they are written, and the names of the coded ones."""
    coded = {name: found for name, tensor in tensors.items() if (found := encode_tensor(tensor)) is not None}
    return tensors | coded, tuple(coded)


def encode_untrained_tensors(fmt: WeightFormat, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Apply `encode_tensors` to a matrix, except for roles that tuning trains: they could grow afterwards."""
    coded, names = encode_tensors(
        {name: tensor for name, tensor in tensors.items() if fmt.role(name) not in TRAINED_ROLES}
    )
    return tensors | coded, names


def _decompress_lzma(data: bytes, nbytes: int) -> bytes:
    damaged = FormatError("entropy-coded tensor is damaged; copy the artifact again")
    if nbytes > _LARGEST_FOR_LZMA:  # never written; without this bound a few bytes could decode to any number
        raise damaged
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        found = decompressor.decompress(data, nbytes + 1)
    except lzma.LZMAError as error:
        raise damaged from error
    if len(found) != nbytes or not decompressor.eof or decompressor.unused_data:
        raise damaged
    return found
