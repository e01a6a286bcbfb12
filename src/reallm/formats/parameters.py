"""How the parameters of a decoder are stored, biases included: b bits each, a scale for every 32 of them.

The flat vector of parameters is a matrix of one row in the format `uniform`, symmetric, with two-level scales; with 16
bits it is `dense` float16. Its tensors lie under `decoder.`
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats import scales as scale_store
from reallm.formats.base import Shape, Tensors, WeightFormat, add_prefix, strip_prefix
from reallm.formats.dense import Dense, UnpackedDense
from reallm.formats.uniform import Uniform, UnpackedUniform

PREFIX = "decoder"
BITS = (3, 4, 6, 8, 16)
GROUP = 32
ROLE = "decoders"
ROLES = {f"{PREFIX}.{name}": ROLE for name in ("codes", "scales", "scales_max", "values")}

UnpackedParameters = UnpackedUniform | UnpackedDense


def check_bits(owner: str, bits: int) -> None:
    """Errors: FormatError unless parameters can have so many bits."""
    if bits not in BITS:
        raise FormatError(f"{owner}: decoder_bits={bits} is not one of {BITS}")


def check_rate(owner: str, codes: int, shape: Shape) -> None:
    """Errors: FormatError for codes below 1/8 bit per weight, by which a small file could ask for any memory."""
    if 64 * codes < shape[0] * shape[1]:
        raise FormatError(f"{owner}: {codes:,} bytes of codes for a {shape} matrix are below 1/8 bit per weight")


def storage(bits: int) -> WeightFormat:
    """The format of the flat vector."""
    if bits == 16:
        return Dense("float16")
    return Uniform(bits, GROUP, symmetric=True, scales=scale_store.TWO_LEVEL)


def layout(bits: int, count: int) -> Tensors:
    """What `pack` writes for `count` parameters, on the meta device."""
    return add_prefix(PREFIX, storage(bits).layout((1, count)))


def pack(bits: int, stored: UnpackedParameters, count: int) -> Tensors:
    """Stored parameters -> tensors."""
    return add_prefix(PREFIX, storage(bits).pack(stored, (1, count)))


def unpack(bits: int, tensors: Tensors, count: int) -> UnpackedParameters:
    """The inverse of `pack`."""
    return storage(bits).unpack(strip_prefix(PREFIX, tensors), (1, count))


def values(bits: int, stored: UnpackedParameters, count: int) -> Float[Tensor, " parameters"]:
    """The flat vector, differentiable in its scales (or values)."""
    return storage(bits).decode(stored, (1, count))[0]
