"""Tensors inside tuples, lists and mappings: what modules of transformers are called with and put out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]  # keys and indices on the way to a leaf


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) of everything that is no container."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def rebuilt(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return the same containers, made again, around `change(path, leaf)` in place of every leaf."""
    if isinstance(value, Mapping):
        inner = {key: rebuilt(one, change, (*path, key)) for key, one in value.items()}
        if type(value) is dict:
            return inner
        made = copy.copy(value)
        made.update(inner)  # type: ignore[attr-defined]
        return made
    if isinstance(value, tuple | list):
        inner = [rebuilt(one, change, (*path, index)) for index, one in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return change(path, value)


def moved(value: Any, device: torch.device) -> Any:
    """Return the same containers, made again, around tensors on `device`."""
    return rebuilt(value, lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def writable(value: Any) -> bool:
    """Return whether a value is a container that can be written into."""
    return isinstance(value, MutableMapping | MutableSequence)


def overwrite(container: Any, content: Any) -> None:
    """Give a mapping or list the content of another; it stays the same object."""
    if isinstance(container, MutableMapping):
        container.clear()
        container.update(content)
    else:
        container[:] = content
