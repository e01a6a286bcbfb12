"""Building models that an untrusted config.json describes: bounded, without foreign code, with one kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from reallm.checkpoint.validation import count_values
from reallm.errors import ReallmError

# Modules for every tensor in the files: families of today have 1 to 4. A config of 10^9 blocks ends here in 0.1 s.
_MODULES_PER_TENSOR = 16
_MIN_MODULES = 2_000
# Beside its tensors a model makes tables of its own, of positions mostly.
_MAX_BUFFER_BYTES = 1 << 30
# transformers copies a config about 50 times: 200,000 empty lists took it 20 s. The largest of today has 2,000 values.
_MAX_VALUES = 50_000


@contextlib.contextmanager
def loading_limits(label: str, error: type[ReallmError], tensors: int) -> Iterator[None]:
    """What transformers does in here ends in `error` whatever it raises, and makes no more modules than files can fill.

    `tensors` is how many the files hold.
    """
    left = _MIN_MODULES + _MODULES_PER_TENSOR * tensors

    def count_module(module: nn.Module, name: str, child: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error(f"{label}: config.json describes a model of far more than the {tensors} tensors that are there")

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    except ReallmError:
        raise
    except Exception as problem:  # the code of hundreds of families meets any value: there is no closed list
        raise error(
            f"{label}: transformers cannot load what config.json describes ({error_line(problem)})"
        ) from problem
    finally:
        handle.remove()


def check_buffer_nbytes(model: nn.Module, label: str, error: type[ReallmError]) -> None:
    """Errors: `error` if the tables that a model on the meta device will make for itself take more than 1 GiB."""
    own = sum(
        buffer.nbytes
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    )
    if own > _MAX_BUFFER_BYTES:
        raise error(f"{label}: config.json describes a model that makes {own:,} bytes of tables by itself; damaged?")


def check_untrusted_config(config: dict[str, Any], label: str, error: type[ReallmError]) -> None:
    """Refuse what makes transformers look for weights or kernels elsewhere, or take minutes to copy.

    Errors: `error` naming the key of config.json.
    """
    stored = config.get("quantization_config")
    named = stored.get("matrices") if isinstance(stored, dict) else None
    if (values := count_values(config) - (len(named) if isinstance(named, dict) else 0)) > _MAX_VALUES:
        raise error(f"{label}: config.json holds {values:,} values, more than {_MAX_VALUES:,}; no model needs that")
    if config.get("transformers_weights") is not None:
        raise error(f"{label}: config.json names other weight files (transformers_weights), which reallm never reads")
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise error(f"{label}: config.json wants code from the hub ({key}), which reallm never runs")


def error_line(problem: BaseException) -> str:
    """What an exception of another library says, as part of one line."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
