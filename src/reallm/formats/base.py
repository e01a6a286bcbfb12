"""The core interface: a matrix in a format.

format -> a frozen dataclass of plain numbers; parts -> tensors in natural units; tensors -> what is
written. Everything above asks only the methods below; everything below knows only plain tensors.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib.metadata
import reprlib
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError

Shape: TypeAlias = tuple[int, int]  # (out_features, in_features), as nn.Linear.weight
Tensors: TypeAlias = dict[str, Tensor]  # local names: "codes", "base.scales"
Unpacked: TypeAlias = Any  # the format's own frozen dataclass of tensors

PLUGINS = "reallm.formats"  # entry-point group of packages that bring formats
_REGISTRY: dict[str, type[WeightFormat]] = {}


@dataclass(frozen=True)
class SharedDecoder:
    """A decoder that many matrices share: what it is, in plain values, and what is stored of it (meta device)."""

    decoder: tuple[Any, ...]
    layout: Tensors = dataclasses.field(compare=False)


class WeightFormat(abc.ABC):
    """How one (out, in) matrix is stored. Final subclasses: `@register @dataclass(frozen=True)`."""

    name: ClassVar[str]
    # Ledger role of each stored tensor by local name: the ledger groups bytes by these words.
    roles: ClassVar[dict[str, str]]
    # Settings worth comparing, each the fields of a spec: `reallm formats` rates and measures them.
    examples: ClassVar[tuple[dict, ...]] = ()

    # Whether the sensitivity of a matrix's role, which knows its error alone, predicts what the format loses. Scales of
    # channels leave the relative error as it is: only an analysis of the model sees what they gain.
    predicted_by_role: ClassVar[bool] = True
    # Whether fitting takes milliseconds per million weights, so that an analysis tries it on the embedding itself.
    cheap_to_fit: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise FormatError naming the field and its value if `shape` cannot be stored."""

    @abc.abstractmethod
    def layout(self, shape: Shape) -> Tensors:
        """What `pack` writes for a matrix of `shape`, as empty tensors on the meta device."""

    @abc.abstractmethod
    def pack(self, unpacked: Unpacked, shape: Shape) -> Tensors:
        """Parts -> stored tensors; lossless for parts that came from `fit` or `unpack`."""

    @abc.abstractmethod
    def unpack(self, tensors: Tensors, shape: Shape) -> Unpacked:
        """Stored tensors -> parts; `pack` of the result gives the same tensors again."""

    @abc.abstractmethod
    def decode(self, unpacked: Unpacked, shape: Shape) -> Float[Tensor, "out in"]:
        """The matrix in float32, differentiable in every float part."""

    # One definition of size for the whole library: never overridden.
    def nbytes(self, shape: Shape) -> int:
        """Stored bytes of a matrix of `shape`, everything included."""
        return sum(t.nbytes for t in self.layout(shape).values())

    def bits_per_weight(self, shape: Shape) -> float:
        """8 · stored bytes / weights, everything included."""
        return 8 * self.nbytes(shape) / (shape[0] * shape[1])

    def inner_shape(self, shape: Shape) -> Shape:
        """Shape of the inner format's matrix, where there is one: the same, unless a format takes something out."""
        return shape

    def decode_rows(self, tensors: Tensors, shape: Shape, rows: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return the named rows of the decoded matrix in float32: what an embedding look-up needs.

        By default everything is decoded; formats with a shorter way have their own.
        """
        return self.decode(self.unpack(tensors, shape), shape)[rows]

    # What a format says of itself to planner, cost model and tuner; wrappers say what the format inside says.
    def children(self) -> dict[str, WeightFormat]:
        """Return the formats that are fields of this one, by field name. Never overridden."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, WeightFormat)}

    def error_model(self) -> str:
        """Return how errors spread over a matrix, a kind of `allocate.loss_prediction.Analysis.numbers`.

        `grouped`: proportional to the size of the weights in a group; `stepped`: the same everywhere;
        `rotated_N`: spread evenly by a rotation, of codes that decide N columns together.
        """
        return self._base().error_model() if self._base() else "grouped"

    def block_width(self) -> int:
        """Return how many columns are decided together, between which no error is fed back."""
        return self._base().block_width() if self._base() else 1

    def codes_vectors(self) -> bool:
        """Return whether one code stands for several weights: at equal squared error they hurt a model differently."""
        return self._base().codes_vectors() if self._base() else False

    def residual_rank(self) -> int:
        """Return the rank of the low-rank residual that this format adds; 0 for none."""
        return 0

    def residual_dtype(self) -> str | None:
        """Return how the factors of the residual are stored; None without a residual."""
        return None

    def without_residual(self) -> WeightFormat:
        """Return the format inside the residual, or the format itself."""
        return self

    def timing_format(self) -> WeightFormat:
        """Return the format whose fit is timed in place of this one: group sizes do not change the time."""
        has_groups = "group_size" in {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return dataclasses.replace(self, group_size=64) if has_groups else self  # type: ignore[type-var]

    @classmethod
    def candidates(cls, kind: str, device: str) -> tuple[WeightFormat, ...]:
        """Return what budgets choose from in addition to `allocate/candidates.py`.

        `kind` of matrix: block, embedding or head; `device` that fits. A format from another package is chosen by
        budgets through this.
        """
        return ()

    def _base(self) -> WeightFormat | None:
        return self.children().get("base")

    def own_shared_decoders(self) -> dict[str, SharedDecoder]:
        """The shared decoder that this format names, by its name; those of inner formats apart."""
        return {}

    def own_multiply_adds(self, shape: Shape) -> int:
        """Multiply-adds of this format's decoder net for a matrix; look-ups, scales and inner formats apart."""
        return 0

    def shared_decoders(self) -> dict[str, SharedDecoder]:
        """Shared decoders, inner formats' too: they are stored once, and are not in the layout. Never overridden."""
        found = self.own_shared_decoders()
        for fmt in self.children().values():
            found |= fmt.shared_decoders()
        return found

    def multiply_adds(self, shape: Shape) -> int:
        """Multiply-adds of all decoder nets for a matrix of `shape`, inner formats' too. Never overridden."""
        inside = sum(fmt.multiply_adds(self.inner_shape(shape)) for fmt in self.children().values())
        return self.own_multiply_adds(shape) + inside

    def role(self, local_name: str) -> str:
        """Ledger role of a stored tensor; a name under `base.` is the inner format's."""
        head, _, rest = local_name.partition(".")
        if rest and isinstance(base := getattr(self, head, None), WeightFormat):
            return base.role(rest)
        return self.roles[local_name]


def register(cls: type[WeightFormat]) -> type[WeightFormat]:
    """Make a format known by its name; a new format joins by this and edits no old file."""
    if _REGISTRY.setdefault(cls.name, cls) is not cls:
        raise AssertionError(f"format name {cls.name!r} is taken by {_REGISTRY[cls.name]}")
    return cls


def known_formats() -> dict[str, type[WeightFormat]]:
    """Return registered formats by name, sorted; those of other packages too.

    A package joins by an entry point of the group `reallm.formats` that names a module: importing it registers its
    formats and how they are fitted.
    """
    _load_plugins()
    return dict(sorted(_REGISTRY.items()))


@functools.cache
def _load_plugins() -> None:
    """Import what other packages registered under the entry-point group; one that fails is a warning that names it."""
    for point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as problem:  # somebody else's module may raise anything, and other models must go on working
            package = point.dist.name if point.dist else point.value
            warnings.warn(f"formats of {package} cannot be loaded ({type(problem).__name__}: {problem})", stacklevel=3)


def known_format(name: Any) -> type[WeightFormat]:
    """The format registered as `name`; FormatError that lists the known ones if there is none."""
    if isinstance(name, str) and name not in _REGISTRY:
        _load_plugins()
    if not isinstance(name, str) or name not in _REGISTRY:
        raise FormatError(f"unknown format {reprlib.repr(name)}; known formats: {', '.join(known_formats())}")
    return _REGISTRY[name]


def example_formats(cls: type[WeightFormat]) -> list[WeightFormat]:
    """The format in each of its `examples`."""
    return [from_spec({"format": cls.name, **fields}) for fields in cls.examples]


def to_spec(fmt: WeightFormat) -> dict[str, Any]:
    """A format as plain JSON values: `{"format": name, field: value, ...}`, inner formats nested."""
    spec: dict[str, Any] = {"format": fmt.name}
    for field in dataclasses.fields(fmt):  # type: ignore[arg-type]
        value = getattr(fmt, field.name)
        spec[field.name] = to_spec(value) if isinstance(value, WeightFormat) else value
    return spec


_DEEPEST = 8  # formats in formats; all that differ make 5


def from_spec(spec: Any, _depth: int = 1) -> WeightFormat:
    """The inverse of `to_spec`; fields left out take their defaults.

    Errors: FormatError for an unknown format (lists the known ones), an unknown field, a bad value, or formats nested
    more than 8 deep.
    """
    if not isinstance(spec, dict) or "format" not in spec:
        raise FormatError(f"a format is a mapping with the key 'format', not {reprlib.repr(spec)}")
    if _depth > _DEEPEST:
        raise FormatError(f"formats are nested more than {_DEEPEST} deep")
    name = spec["format"]
    cls = known_format(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {k: v for k, v in spec.items() if k != "format"}
    if unknown := sorted(set(values) - set(fields), key=str):
        raise FormatError(
            f"{name}: unknown field {reprlib.repr(unknown[0])}; its fields: {', '.join(fields) or 'none'}"
        )
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if absent := [name for name in required if name not in values]:
        raise FormatError(f"{name}: field {absent[0]!r} is missing")
    for key, value in values.items():
        if fields[key].type in ("WeightFormat", WeightFormat):
            values[key] = from_spec(value, _depth + 1)
        elif not _plain_type_matches(str(fields[key].type), value):
            raise FormatError(f"{name}: {key}={reprlib.repr(value)} is not of type {fields[key].type}")
    return cls(**values)


def _plain_type_matches(annotation: str, value: Any) -> bool:
    """Whether a JSON value fits an annotation; formats hold only ints, floats, bools, strings, None."""
    allowed: tuple[type, ...] = tuple(
        t for word, t in {"int": int, "float": float, "bool": bool, "str": str}.items() if word in annotation
    )
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return (value is None and "None" in annotation) or isinstance(value, allowed)


def add_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Put an inner format's tensors under `prefix.`"""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def strip_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The inverse of `add_prefix`: the tensors whose name starts with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device: shape and dtype, no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def map_tensors(fn: Any, unpacked: Unpacked) -> Unpacked:
    """Parts with `fn` applied to every tensor, inner parts included: parts are walked as a tree."""
    changes = {}
    for field in dataclasses.fields(unpacked):
        value = getattr(unpacked, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = fn(value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = map_tensors(fn, value)
    return dataclasses.replace(unpacked, **changes)


def named_tensors(unpacked: Unpacked) -> Tensors:
    """The tensors of parts by local name: `scales`, `base.left`. A float part has the name it is stored under."""
    found: Tensors = {}
    for field in dataclasses.fields(unpacked):
        value = getattr(unpacked, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif dataclasses.is_dataclass(value):
            found |= add_prefix(field.name, named_tensors(value))
    return found


def replace_tensors(unpacked: Unpacked, tensors: Tensors) -> Unpacked:
    """Parts with the tensors of these local names put in; all others stay."""
    changes = {}
    for field in dataclasses.fields(unpacked):
        value = getattr(unpacked, field.name)
        if field.name in tensors:
            changes[field.name] = tensors[field.name]
        elif dataclasses.is_dataclass(value):
            changes[field.name] = replace_tensors(value, strip_prefix(field.name, tensors))
    return dataclasses.replace(unpacked, **changes)
