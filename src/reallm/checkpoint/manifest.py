"""The manifest: which matrix is stored in which format. Stored in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reallm.checkpoint.validation import check_folder, check_name, read_json
from reallm.errors import ArtifactError, FormatError
from reallm.formats import (
    Shape,
    SharedDecoder,
    WeightFormat,
    collect_shared_decoders,
    from_spec,
    shared_decoder_layout,
    to_spec,
)
from reallm.formats.shared_decoders import PREFIX as SHARED

QUANT_METHOD = "reallm"
VERSION = 2
_VERSION_WITHOUT_CODING = 1
KINDS = ("block", "embedding", "head")
# The largest matrices in use, embeddings, have 2^32 weights. Sizes beyond these limits overflow 64 bits later.
_MOST_ROWS = 1 << 31
_MOST_WEIGHTS = 1 << 40


@dataclass(frozen=True)
class StoredMatrix:
    """One compressed matrix: module path, format, (out, in) shape, and `kind` block, embedding or head.

    `coded` lists the local names of entropy-coded tensors.
    """

    name: str
    fmt: WeightFormat
    shape: Shape
    kind: str
    coded: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes by the format's layout; fewer are stored where tensors are entropy-coded."""
        return self.fmt.nbytes(self.shape)


@dataclass(frozen=True)
class Manifest:
    """All compressed matrices of an artifact in model order, their provenance, and checksums by weight file.

    Without `checksums` (see `checksums.py`) nothing can be verified; the first artifacts of version 1 have none.
    """

    matrices: tuple[StoredMatrix, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = field(default=VERSION, compare=False)  # as read
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def shared_decoders(self) -> dict[str, SharedDecoder]:
        """Return the shared decoders by name; they follow from the formats."""
        return collect_shared_decoders(matrix.fmt for matrix in self.matrices)

    @property
    def size(self) -> int | None:
        """Return the size limit of the artifact in bytes, which tuning respects too; None if there is none."""
        size = self.provenance.get("size")
        return size if type(size) is int and size > 0 else None

    @property
    def unused_rows(self) -> list[dict[str, Any]]:
        """Return unused tensors and files of the source, with name, reason, tensors (0: a file) and nbytes."""
        found = self.provenance.get("unused")
        rows = found if isinstance(found, list) else []
        return [row for row in rows if isinstance(row, dict) and _is_unused(row)]

    def check_shared_decoders(self) -> None:
        """Raise ArtifactError if two shared decoders have one name, or a matrix has the name of a shared decoder."""
        try:
            names = shared_decoder_layout(self.shared_decoders)
        except FormatError as error:
            raise ArtifactError(f"config.json: {error}; it is damaged") from error
        if taken := [m.name for m in self.matrices if names and f"{m.name}.".startswith(f"{SHARED}.")]:
            raise ArtifactError(f"config.json: {taken[0]} is not a valid name of a matrix; it is damaged")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. Matrices with equal kind, shape and format share one entry of `layouts`."""
        layouts: list[dict[str, Any]] = []
        indices: dict[str, int] = {}
        # Sorted by name, as they are read back from sorted JSON: rewriting gives the same indices with as many digits.
        for matrix in sorted(self.matrices, key=lambda matrix: matrix.name):
            layout = {"kind": matrix.kind, "shape": list(matrix.shape), "format": to_spec(matrix.fmt)}
            if matrix.coded:
                layout["coded"] = list(matrix.coded)
            if layout not in layouts:
                layouts.append(layout)
            indices[matrix.name] = layouts.index(layout)
        coded = any(matrix.coded for matrix in self.matrices)
        return {
            # An artifact without coded tensors stays readable for version 1.
            "version": VERSION if coded else _VERSION_WITHOUT_CODING,
            "layouts": layouts,
            "matrices": {matrix.name: indices[matrix.name] for matrix in self.matrices},
            "provenance": self.provenance,
            **({"checksums": self.checksums} if self.checksums else {}),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Manifest:
        """Return the manifest of `to_dict`'s output; unknown keys are ignored.

        Errors: ArtifactError for an unknown version or a malformed entry, FormatError for an unknown format.
        """
        version = check_version(values.get("version"))
        try:
            layouts = [(e["kind"], e["shape"], e["format"], e.get("coded", [])) for e in values["layouts"]]
            named = {check_name(str(name)): index for name, index in values["matrices"].items()}
            checksums = dict(values.get("checksums") or {})
            provenance = dict(values.get("provenance") or {})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"quantization_config in config.json is damaged: {error!r}") from error
        if not all(isinstance(value, str) for value in checksums.values()):
            raise ArtifactError("checksums in config.json are not strings; it is damaged")
        for name, index in named.items():
            if not isinstance(index, int) or not 0 <= index < len(layouts):
                raise ArtifactError(f"quantization_config: {name} has layout {index!r:.50} of {len(layouts)}; damaged")
        built = {index: _stored_matrix(name, *layouts[index]) for name, index in named.items()}
        matrices = tuple(replace(built[index], name=name) for name, index in named.items())
        manifest = Manifest(matrices, provenance, version, checksums)
        manifest.check_shared_decoders()
        return manifest


def _is_unused(row: dict[str, Any]) -> bool:
    texts, numbers = (row.get("name"), row.get("reason")), (row.get("tensors"), row.get("nbytes"))
    return all(isinstance(text, str) and text.isprintable() for text in texts) and all(type(n) is int for n in numbers)


def check_version(version: Any) -> int:
    """Return a version that this library can read.

    Errors: ArtifactError for anything else.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"artifact version {version!r} is not a version; config.json is damaged")
    if version > VERSION:
        raise ArtifactError(
            f"artifact version {version} was written by a newer reallm (this one reads up to {VERSION}); "
            "update the clone and run pip install -U . there"
        )
    return version


def _stored_matrix(name: str, kind: Any, shape: Any, spec: Any, coded: Any) -> StoredMatrix:
    ok = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < _MOST_ROWS for n in shape)
    if not ok or shape[0] * shape[1] > _MOST_WEIGHTS or kind not in KINDS:
        raise ArtifactError(f"{name}: kind={kind!r:.50} shape={shape!r:.50} is not a stored matrix")
    fmt = from_spec(spec)
    fmt.check((shape[0], shape[1]))
    if not isinstance(coded, list) or not set(map(str, coded)) <= set(fmt.layout((shape[0], shape[1]))):
        raise ArtifactError(
            f"{name}: coded={coded!r} does not list tensors of the format {fmt.name}; config.json is damaged"
        )
    return StoredMatrix(name, fmt, (shape[0], shape[1]), kind, tuple(coded))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the artifact in `folder`.

    Errors: ArtifactError if the folder or its config.json is missing, it is not a reallm artifact, or a link in it
    leads out of it.
    """
    path = Path(folder) / "config.json"
    if Path(folder).is_file():
        raise ArtifactError(f"{folder}: is a file; give the folder written by `reallm compress`")
    if not Path(folder).is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    if not path.is_file():
        raise ArtifactError(f"{folder}: no config.json; is this a folder written by `reallm compress`?")
    check_folder(Path(folder))
    config = read_json(path)
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise ArtifactError(f"{folder}: not compressed by reallm (config.json names no quant_method 'reallm')")
    return Manifest.from_dict(section)
