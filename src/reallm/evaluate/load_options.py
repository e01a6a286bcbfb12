"""Convert command-line options to arguments of `reallm.load`."""

from typing import Any

import torch

from reallm.errors import SourceError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_options(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Return `device` and `dtype` for `reallm.load`; auto: the first GPU if any, and the model's own dtype.

    Errors: SourceError if torch does not know the device or it is missing, or if the dtype is not one of DTYPES.
    """
    if dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return {"device": _device(device), "dtype": DTYPES[dtype]}


def _device(name: str) -> torch.device | None:
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises AssertionError
        raise SourceError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device
