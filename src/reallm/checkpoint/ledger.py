"""The ledger: where every byte of an artifact went. Read from the files, never from a formula."""

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

_TOKENIZER_WORDS = ("token", "vocab", "merges", "chat_template", "spiece", ".model", ".bpe", ".spm", ".codes", "tekken")


@dataclass(frozen=True)
class Row:
    """Some bytes of one file: a stored tensor, a header, or a whole auxiliary file.

    `role` says what the bytes are for (codes, scales, …), `matrix` whose they are; `kind` is block,
    embedding or head for compressed matrices, `kept` for tensors left as they were, else `file`. A decoder that
    matrices share has no `matrix`, and is of the kind `block` if a block matrix uses it. `nbytes` are those of the
    file, `raw_nbytes` those before entropy coding where a tensor is coded.
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

    `compressed_matrices` are the manifest's matrices; `unquantized_weights` counts the elements of tensors left as they were.
    """

    rows: tuple[Row, ...]
    compressed_matrices: tuple[StoredMatrix, ...]
    unquantized_weights: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(row.nbytes for row in self.rows)

    @property
    def block_weights(self) -> int:
        """Weights of the compressed block matrices."""
        return sum(m.weights for m in self.compressed_matrices if m.kind == "block")

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied matrices count once."""
        return sum(m.weights for m in self.compressed_matrices) + self.unquantized_weights

    @property
    def bits_per_weight(self) -> float:
        """8 · stored bytes / weights over the compressed block matrices, scales, codebooks and headers included."""
        stored = sum(row.nbytes for row in self.rows if row.kind == "block")
        return 8 * stored / self.block_weights if self.block_weights else math.nan

    @property
    def bits_per_parameter(self) -> float:
        """8 · bytes of all files / parameters of the whole model."""
        return 8 * self.total_bytes / self.parameters if self.parameters else math.nan

    @property
    def entropy_coded_rows(self) -> tuple[Row, ...]:
        """Rows of entropy-coded tensors."""
        return tuple(row for row in self.rows if row.raw_nbytes is not None)

    def sum_bytes(self, field: str) -> dict[str, int]:
        """Bytes summed by a field of the rows (`role`, `kind`, `matrix`, `file`), largest first."""
        sums: dict[str, int] = defaultdict(int)
        for row in self.rows:
            sums[str(getattr(row, field))] += row.nbytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for `reallm info --json`; NaN, which JSON has not, becomes null."""
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
    """The ledger of the artifact in `folder`, from file sizes and safetensors headers.

    Errors: ArtifactError if it is not an artifact or a header is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows: list[Row] = []
    unquantized_weights = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        check_inside(path, folder)
        if path.suffix == ".safetensors":
            tensors, kept = _tensor_rows(path, folder, manifest)
            rows += tensors
            unquantized_weights += kept
        else:
            rows.append(_file_row(path, folder))
    _check_complete(folder, rows, manifest)
    return Ledger(tuple(rows), manifest.matrices, unquantized_weights)


def _check_complete(folder: Path, rows: list[Row], manifest: Manifest) -> None:
    """Every tensor that the manifest leads to is there, with the bytes it should have."""
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
    role = "tokenizer" if any(word in name for word in _TOKENIZER_WORDS) else "metadata"
    return Row(name, name, None, "file", role, path.stat().st_size)


def _tensor_rows(path: Path, folder: Path, manifest: Manifest) -> tuple[list[Row], int]:
    """Rows of one safetensors file and the number of kept weights in it."""
    header, header_bytes = read_header(path)
    file = path.relative_to(folder).as_posix()
    owners = {matrix.name: matrix for matrix in manifest.matrices}
    shared = _kinds_of_shared(manifest)
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


def _kinds_of_shared(manifest: Manifest) -> dict[str, str]:
    """The kind of every tensor of a shared decoder, by full name: what all matrices are that use it, or `block`."""
    found: dict[str, str] = {}
    for kind in sorted({matrix.kind for matrix in manifest.matrices}, key=lambda kind: kind == "block"):
        shared_decoders = collect_shared_decoders(matrix.fmt for matrix in manifest.matrices if matrix.kind == kind)
        found |= dict.fromkeys(shared_decoder_layout(shared_decoders), kind)
    return found


def _owner(tensor: str, owners: dict[str, StoredMatrix]) -> StoredMatrix | None:
    """The matrix whose name and a dot begin the tensor's name."""
    prefix = tensor
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in owners:
            return owners[prefix]
    return None


def _role(matrix: StoredMatrix, tensor: str) -> str | None:
    """What the bytes are for; None for a neighbour that is kept as it was, such as the module's bias."""
    local = tensor.removeprefix(f"{matrix.name}.")
    return matrix.fmt.role(local) if local in _local_names(matrix.fmt, matrix.shape) else None


@functools.lru_cache(maxsize=4096)
def _local_names(fmt: WeightFormat, shape: Shape) -> frozenset[str]:
    return frozenset(fmt.layout(shape))


# Bytes of coded tensors that are decoded to tell how long all of them take.
_TIMED_BYTES = 4_000_000


def decoding_seconds(folder: Path, ledger: Ledger) -> float:
    """How long entropy decoding takes at load, here: timed on some of the tensors."""
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
    """Bytes of a tensor before it was coded; None for one that is stored as it is."""
    local = tensor.removeprefix(f"{matrix.name}.")
    return matrix.fmt.layout(matrix.shape)[local].nbytes if local in matrix.coded else None
