"""Build models from an untrusted config.json: within limits, without foreign code, with one kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from reallm.checkpoint.validation import count_values
from reallm.errors import ReallmError

# Modules per tensor in the files: current families have 1 to 4. A config of 10^9 blocks is refused in 0.1 s.
_MODULES_PER_TENSOR = 16
_MIN_MODULES = 2_000
# Non-persistent buffers that a model computes itself, mostly position tables.
_MAX_BUFFER_BYTES = 1 << 30
# transformers copies a config about 50 times: 200,000 empty lists took 20 s. The largest current config has 2,000
# values.
_MAX_VALUES = 50_000


@contextlib.contextmanager
def loading_limits(label: str, error: type[ReallmError], tensors: int) -> Iterator[None]:
    """Convert every exception of transformers inside the context to `error`, and limit the number of modules it builds.

    `tensors` is the number of tensors in the files, which sets the limit.
    """
    remaining = _MIN_MODULES + _MODULES_PER_TENSOR * tensors

    def count_module(module: nn.Module, name: str, child: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise error(f"{label}: config.json describes a model of far more than the {tensors} tensors in the files")

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    except ReallmError:
        raise
    except (
        Exception
    ) as problem:  # any value reaches the code of hundreds of families: there is no closed list of exceptions
        raise error(
            f"{label}: transformers cannot load what config.json describes ({error_line(problem)})"
        ) from problem
    finally:
        handle.remove()


def check_buffer_nbytes(model: nn.Module, label: str, error: type[ReallmError]) -> None:
    """Raise `error` if the non-persistent buffers of a model on the meta device would take more than 1 GiB."""
    own = sum(
        buffer.nbytes
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    )
    if own > _MAX_BUFFER_BYTES:
        raise error(
            f"{label}: config.json describes a model that computes {own:,} bytes of buffers itself; is it damaged?"
        )


def check_untrusted_config(config: dict[str, Any], label: str, error: type[ReallmError]) -> None:
    """Refuse configs that make transformers load weights or kernels from elsewhere, or take minutes to copy.

    Errors: `error` naming the key of config.json.
    """
    stored = config.get("quantization_config")
    matrices = stored.get("matrices") if isinstance(stored, dict) else None
    if (values := count_values(config) - (len(matrices) if isinstance(matrices, dict) else 0)) > _MAX_VALUES:
        raise error(f"{label}: config.json holds {values:,} values, more than {_MAX_VALUES:,}; no model needs that")
    if config.get("transformers_weights") is not None:
        raise error(f"{label}: config.json names other weight files (transformers_weights), which reallm never reads")
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for key, value in section.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise error(f"{label}: config.json wants code from the hub ({key}), which reallm never runs")


def error_line(problem: BaseException) -> str:
    """Return the first line of another library's exception, at most 300 characters."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
