"""A plan: the format of every matrix to be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reallm.errors import FormatError
from reallm.formats import Shape, Table, WeightFormat, tables_of

# What a matrix does in a block, in the order a block uses them; recipes and reports speak of these words.
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2", "embedding", "head", "other")
# Of a second table that tokens are looked up in, for inputs of every block (Gemma 3n and 4): an embedding to recipes,
# unless one of their rules names it.
PER_LAYER = "per_layer_embedding"


@dataclass(frozen=True)
class MatrixInfo:
    """What planning needs to know of a matrix: module path, (out, in), role (q, v, down, …), kind, block."""

    name: str
    shape: Shape
    role: str
    kind: str  # "block", "embedding" or "head"
    block: int | None = None  # number of the decoder block

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Planned:
    """A matrix and the format it gets."""

    matrix: MatrixInfo
    fmt: WeightFormat

    @property
    def nbytes(self) -> int:
        """Stored bytes by the format's layout."""
        return self.fmt.nbytes(self.matrix.shape)


@dataclass(frozen=True)
class Plan:
    """Every matrix that is compressed, in model order; matrices left out are kept as they are."""

    entries: tuple[Planned, ...]
    recipe: str

    @property
    def tables(self) -> dict[str, Table]:
        """Decoders that matrices share, by name. Errors: FormatError if one name stands for two."""
        return tables_of(entry.fmt for entry in self.entries)

    @property
    def block_bits(self) -> float:
        """Stored bits per weight of the block matrices and the decoders they share; 0 when there are none."""
        blocks = [entry for entry in self.entries if entry.matrix.kind == "block"]
        weights = sum(entry.matrix.weights for entry in blocks)
        shared = tables_nbytes(tables_of(entry.fmt for entry in blocks))
        return 8 * (sum(entry.nbytes for entry in blocks) + shared) / weights if weights else 0.0

    @property
    def nbytes(self) -> int:
        """Stored bytes of all planned matrices, and of the decoders they share."""
        return sum(entry.nbytes for entry in self.entries) + tables_nbytes(self.tables)

    def check(self) -> None:
        """Raise FormatError naming the matrix whose shape its format cannot store, or a name of two shared decoders."""
        tables_of(entry.fmt for entry in self.entries)
        for entry in self.entries:
            try:
                entry.fmt.check(entry.matrix.shape)
            except FormatError as error:
                raise FormatError(f"{entry.matrix.name}: {error}") from error


def tables_nbytes(tables: Mapping[str, Table]) -> int:
    """Stored bytes of shared decoders: each counts once."""
    return sum(tensor.nbytes for table in tables.values() for tensor in table.layout.values())
