"""Tensors in nested tuples, lists and mappings: the arguments and outputs of transformers modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]  # keys and indices from the root to a leaf


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) of every item that is not a container."""
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


def map_leaves(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return copies of the containers with every leaf replaced by `change(path, leaf)`."""
    if isinstance(value, Mapping):
        inner = {key: map_leaves(one, change, (*path, key)) for key, one in value.items()}
        if type(value) is dict:
            return inner
        made = copy.copy(value)
        made.update(inner)  # type: ignore[attr-defined]
        return made
    if isinstance(value, tuple | list):
        inner = [map_leaves(one, change, (*path, index)) for index, one in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return change(path, value)


def to_device(value: Any, device: torch.device) -> Any:
    """Return copies of the containers with their tensors on `device`."""
    return map_leaves(value, lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def writable(value: Any) -> bool:
    """Return whether a value is a mutable container."""
    return isinstance(value, MutableMapping | MutableSequence)


def overwrite(container: Any, content: Any) -> None:
    """Replace the content of a mapping or list in place."""
    if isinstance(container, MutableMapping):
        container.clear()
        container.update(content)
    else:
        container[:] = content
