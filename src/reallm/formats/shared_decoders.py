"""Decoders that many matrices share: stored once in an artifact, and put loaded for whoever unpacks a matrix.

A format that names a shared decoder leaves it out of its layout. It is a *table* of the artifact, and its tensors are
loaded inside `with use_shared_decoders({name: tensors})`: so no wrapper around such a format needs to know of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reallm.errors import FormatError
from reallm.formats.base import SharedDecoder, Tensors, WeightFormat

PREFIX = "reallm_shared"  # of the tensors' names in an artifact, and of the module that holds them in a model
_NAME = re.compile(r"[a-z0-9_]{1,40}")

_loaded: contextvars.ContextVar[Mapping[str, Tensors] | None] = contextvars.ContextVar("tables_at_hand", default=None)


def check_shared_name(owner: str, name: Any) -> None:
    """Errors: FormatError unless it is empty (the decoder is the matrix's own) or a name for files and modules."""
    if name and not _NAME.fullmatch(name):
        raise FormatError(f"{owner}: shared={name!r:.60} is not a name of up to 40 small letters, digits and _")


@contextlib.contextmanager
def use_shared_decoders(shared_decoders: Mapping[str, Tensors]) -> Iterator[None]:
    """Inside, matrices that name one of these tables can be fitted, unpacked and decoded."""
    token = _loaded.set({**(_loaded.get() or {}), **shared_decoders})
    try:
        yield
    finally:
        _loaded.reset(token)


def shared_decoder_tensors(name: str) -> Tensors:
    """The tensors of a table by local name. Errors: FormatError if it is not loaded."""
    found = (_loaded.get() or {}).get(name)
    if found is None:
        raise FormatError(f"the shared decoder {name!r} is not loaded: it is trained with all matrices that name it")
    return found


def collect_shared_decoders(formats: Iterable[WeightFormat]) -> dict[str, SharedDecoder]:
    """The tables that formats name, sorted by name.

    Errors: FormatError if one name stands for two decoders, or a format names two tables.
    """
    found: dict[str, SharedDecoder] = {}
    for fmt in dict.fromkeys(formats):
        own = fmt.shared_decoders()
        if len(own) > 1:
            raise FormatError(f"{fmt.name}: names {len(own)} shared decoders ({', '.join(own)}); a matrix has one")
        for name, table in own.items():
            if found.setdefault(name, table).decoder != table.decoder:
                raise FormatError(
                    f"shared decoder {name!r} is {table.decoder} and also {found[name].decoder}; give one another name"
                )
    return dict(sorted(found.items()))


def rename_shared_decoders(fmt: WeightFormat, name: str) -> WeightFormat:
    """The same with another name for every shared decoder; "": with decoders of its own."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(fmt):  # type: ignore[arg-type]
        value = getattr(fmt, field.name)
        if isinstance(value, WeightFormat):
            changes[field.name] = rename_shared_decoders(value, name)
        elif field.name == "shared" and value:
            changes[field.name] = name
    return dataclasses.replace(fmt, **changes)  # type: ignore[type-var]


def shared_decoder_layout(shared_decoders: Mapping[str, SharedDecoder]) -> Tensors:
    """What an artifact stores of tables, on the meta device, by full name."""
    return {
        f"{PREFIX}.{name}.{local}": t for name, table in shared_decoders.items() for local, t in table.layout.items()
    }
