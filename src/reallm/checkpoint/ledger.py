"""The ledger: accounts for every byte of an artifact, read from the files and never from a formula."""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from reallm.checkpoint.entropy_coding import decode_tensor
from reallm.checkpoint.manifest import Manifest, StoredMatrix, read_manifest
from reallm.checkpoint.validation import check_inside, read_header
from reallm.errors import ArtifactError
from reallm.formats import Shape, WeightFormat, collect_shared_decoders, shared_decoder_layout
from reallm.formats.parameters import ROLE

_TOKENIZER_MARKS = ("token", "vocab", "merges", "chat_template", "spiece", ".model", ".bpe", ".spm", ".codes", "tekken")


@dataclass(frozen=True)
class Row:
    """A range of bytes in one file: a stored tensor, a header, or an auxiliary file.

    `role` is the category of the bytes (codes, scales, …), `matrix` the matrix they belong to; `kind` is block,
    embedding or head for compressed matrices, `kept` for unquantized tensors, else `file`. A shared decoder has no
    `matrix`, and its kind is `block` if a block matrix uses it. `nbytes` counts bytes on disk, `raw_nbytes` bytes
    before entropy coding (None for a tensor that is not entropy-coded).
    """

    file: str
    name: str
    matrix: str | None
    kind: str
    role: str
    nbytes: int
    raw_nbytes: int | None = None


@dataclass(frozen=True)
class Ledger:
    """All rows of an artifact; they sum to the bytes on disk.

    `compressed_matrices` are the manifest's matrices; `unquantized_weights` counts the elements of unquantized tensors.
    """

    rows: tuple[Row, ...]
    compressed_matrices: tuple[StoredMatrix, ...]
    unquantized_weights: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(row.nbytes for row in self.rows)

    @property
    def block_weights(self) -> int:
        """Return the number of weights in the compressed block matrices."""
        return sum(m.weights for m in self.compressed_matrices if m.kind == "block")

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the whole model; tied matrices count once."""
        return sum(m.weights for m in self.compressed_matrices) + self.unquantized_weights

    @property
    def bits_per_weight(self) -> float:
        """Return 8 · stored bytes / weights over the compressed block matrices, all overhead included."""
        stored = sum(row.nbytes for row in self.rows if row.kind == "block")
        return 8 * stored / self.block_weights if self.block_weights else math.nan

    @property
    def bits_per_parameter(self) -> float:
        """Return 8 · bytes of all files / parameters of the whole model."""
        return 8 * self.total_bytes / self.parameters if self.parameters else math.nan

    @property
    def entropy_coded_rows(self) -> tuple[Row, ...]:
        """Return the rows of entropy-coded tensors."""
        return tuple(row for row in self.rows if row.raw_nbytes is not None)

    def sum_bytes(self, field: str) -> dict[str, int]:
        """Return the bytes grouped by a field of the rows (`role`, `kind`, `matrix`, `file`), largest first."""
        sums: dict[str, int] = defaultdict(int)
        for row in self.rows:
            sums[str(getattr(row, field))] += row.nbytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for `reallm info --json`; NaN, which JSON lacks, becomes null."""
        bits = self.bits_per_weight
        return {
            "total_bytes": self.total_bytes,
            "bits_per_weight": None if math.isnan(bits) else bits,
            "bits_per_parameter": self.bits_per_parameter,
            "block_weights": self.block_weights,
            "parameters": self.parameters,
            "entropy_coded": {
                "tensors": len(self.entropy_coded_rows),
                "bytes": sum(row.nbytes for row in self.entropy_coded_rows),
                "raw_bytes": sum(row.raw_nbytes or 0 for row in self.entropy_coded_rows),
            },
            "by_role": self.sum_bytes("role"),
            "by_kind": self.sum_bytes("kind"),
            "rows": [asdict(row) for row in self.rows],
        }


def read_ledger(folder: Path) -> Ledger:
    """Return the ledger of the artifact in `folder`, from file sizes and safetensors headers.

    Errors: ArtifactError if it is not an artifact or a header is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows: list[Row] = []
    unquantized_weights = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        check_inside(path, folder)
        if path.suffix == ".safetensors":
            tensors, unquantized = _tensor_rows(path, folder, manifest)
            rows += tensors
            unquantized_weights += unquantized
        else:
            rows.append(_file_row(path, folder))
    _check_complete(folder, rows, manifest)
    return Ledger(tuple(rows), manifest.matrices, unquantized_weights)


def _check_complete(folder: Path, rows: list[Row], manifest: Manifest) -> None:
    """Raise ArtifactError if a tensor that the manifest implies is missing or has another size."""
    found = {row.name: row.nbytes for row in rows if row.kind not in ("file", "kept")}
    for name, tensor in shared_decoder_layout(manifest.shared_decoders).items():
        if found.get(name) != tensor.nbytes:
            raise ArtifactError(f"{folder}: tensor {name!r} is missing or has another size; copy the artifact again")
    for matrix in manifest.matrices:
        for local, tensor in matrix.fmt.layout(matrix.shape).items():
            name = f"{matrix.name}.{local}"
            if name not in found:
                raise ArtifactError(f"{folder}: tensor {name!r} is missing; copy the artifact again")
            if local not in matrix.coded and found[name] != tensor.nbytes:
                raise ArtifactError(
                    f"{folder}: tensor {name!r} has {found[name]:,} bytes, config.json says {tensor.nbytes:,}; "
                    "copy the artifact again"
                )


def _file_row(path: Path, folder: Path) -> Row:
    name = path.relative_to(folder).as_posix()
    role = "tokenizer" if any(mark in name for mark in _TOKENIZER_MARKS) else "metadata"
    return Row(name, name, None, "file", role, path.stat().st_size)


def _tensor_rows(path: Path, folder: Path, manifest: Manifest) -> tuple[list[Row], int]:
    """Return the rows of one safetensors file and its number of unquantized weights."""
    header, header_bytes = read_header(path)
    file = path.relative_to(folder).as_posix()
    owners = {matrix.name: matrix for matrix in manifest.matrices}
    shared = _shared_decoder_kinds(manifest)
    rows = [Row(file, "header", None, "file", "headers", header_bytes)]
    unquantized_weights = 0
    for name, entry in header.items():
        if name in shared:
            rows.append(Row(file, name, None, shared[name], ROLE, entry.nbytes))
            continue
        matrix = _owner(name, owners)
        role = _role(matrix, name) if matrix else None
        if matrix is None or role is None:
            rows.append(Row(file, name, None, "kept", "kept", entry.nbytes))
            unquantized_weights += math.prod(entry.shape)
        else:
            raw = _raw_nbytes(matrix, name)
            rows.append(Row(file, name, matrix.name, matrix.kind, role, entry.nbytes, raw))
    return rows, unquantized_weights


def _shared_decoder_kinds(manifest: Manifest) -> dict[str, str]:
    """Return the kind of shared decoder tensors by name: `block` if a block matrix uses them, else the users' kind."""
    found: dict[str, str] = {}
    for kind in sorted({matrix.kind for matrix in manifest.matrices}, key=lambda kind: kind == "block"):
        shared_decoders = collect_shared_decoders(matrix.fmt for matrix in manifest.matrices if matrix.kind == kind)
        found |= dict.fromkeys(shared_decoder_layout(shared_decoders), kind)
    return found


def _owner(tensor: str, owners: dict[str, StoredMatrix]) -> StoredMatrix | None:
    """Return the matrix whose name plus a dot is a prefix of the tensor's name; None if there is none."""
    prefix = tensor
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in owners:
            return owners[prefix]
    return None


def _role(matrix: StoredMatrix, tensor: str) -> str | None:
    """Return the role of a tensor; None for an unquantized tensor of the same module, such as its bias."""
    local = tensor.removeprefix(f"{matrix.name}.")
    return matrix.fmt.role(local) if local in _local_names(matrix.fmt, matrix.shape) else None


@functools.lru_cache(maxsize=4096)
def _local_names(fmt: WeightFormat, shape: Shape) -> frozenset[str]:
    return frozenset(fmt.layout(shape))


# Bytes of coded tensors that are decoded to estimate the time for all of them.
_TIMED_BYTES = 4_000_000


def decoding_seconds(folder: Path, ledger: Ledger) -> float:
    """Return the estimated seconds of entropy decoding at load on this machine, timed on some of the tensors."""
    layouts = {f"{m.name}.{local}": t for m in ledger.compressed_matrices for local, t in m.fmt.layout(m.shape).items()}
    done, begun = 0, time.perf_counter()
    for row in ledger.entropy_coded_rows:
        with safe_open(Path(folder) / row.file, framework="pt") as file:
            decode_tensor(file.get_tensor(row.name), layouts[row.name])
        done += row.nbytes
        if done >= _TIMED_BYTES:
            break
    return (time.perf_counter() - begun) * sum(row.nbytes for row in ledger.entropy_coded_rows) / max(done, 1)


def _raw_nbytes(matrix: StoredMatrix, tensor: str) -> int | None:
    """Return the bytes of a tensor before entropy coding; None for a tensor that is stored uncoded."""
    local = tensor.removeprefix(f"{matrix.name}.")
    return matrix.fmt.layout(matrix.shape)[local].nbytes if local in matrix.coded else None
