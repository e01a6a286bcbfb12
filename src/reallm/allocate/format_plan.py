"""The plan: the format of every matrix to compress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reallm.errors import FormatError
from reallm.formats import Shape, SharedDecoder, WeightFormat, collect_shared_decoders

# Function of a matrix in a block, in the order a block uses them; recipes and reports use these names.
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2", "embedding", "head", "other")
# Role of the per-layer embedding of Gemma 3n and 4, a second table indexed by token that feeds every block: recipes
# treat it as an embedding, unless one of their rules names it.
PER_LAYER = "per_layer_embedding"


@dataclass(frozen=True)
class MatrixInfo:
    """A matrix as planning sees it: module path, (out, in) shape, role (q, v, down, …), kind, block."""

    name: str
    shape: Shape
    role: str
    kind: str  # "block", "embedding" or "head"
    block: int | None = None  # number of the decoder block

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class PlanEntry:
    """A matrix and its planned format."""

    matrix: MatrixInfo
    fmt: WeightFormat

    @property
    def nbytes(self) -> int:
        """Return the stored bytes by the format's layout."""
        return self.fmt.nbytes(self.matrix.shape)


@dataclass(frozen=True)
class Plan:
    """All matrices to compress, in model order; matrices that are not listed stay unquantized."""

    entries: tuple[PlanEntry, ...]
    recipe: str

    @property
    def shared_decoders(self) -> dict[str, SharedDecoder]:
        """Return the shared decoders by name. Errors: FormatError if two of them have one name."""
        return collect_shared_decoders(entry.fmt for entry in self.entries)

    @property
    def block_bits(self) -> float:
        """Return bits per weight of the block matrices, shared decoders included; 0 if there are none."""
        blocks = [entry for entry in self.entries if entry.matrix.kind == "block"]
        weights = sum(entry.matrix.weights for entry in blocks)
        shared = shared_decoder_nbytes(collect_shared_decoders(entry.fmt for entry in blocks))
        return 8 * (sum(entry.nbytes for entry in blocks) + shared) / weights if weights else 0.0

    @property
    def nbytes(self) -> int:
        """Return the stored bytes of all planned matrices, shared decoders included."""
        return sum(entry.nbytes for entry in self.entries) + shared_decoder_nbytes(self.shared_decoders)

    def check(self) -> None:
        """Raise FormatError naming a matrix whose format cannot store its shape, or a name of two shared decoders."""
        collect_shared_decoders(entry.fmt for entry in self.entries)
        for entry in self.entries:
            try:
                entry.fmt.check(entry.matrix.shape)
            except FormatError as error:
                raise FormatError(f"{entry.matrix.name}: {error}") from error


def shared_decoder_nbytes(shared_decoders: Mapping[str, SharedDecoder]) -> int:
    """Return the stored bytes of shared decoders; each counts once."""
    return sum(tensor.nbytes for decoder in shared_decoders.values() for tensor in decoder.layout.values())
