"""The compressed model on disk: manifest, writer, reader, ledger. Specified in docs/artifact.md."""

from reallm.artifact.ledger import Ledger, Row, read_ledger
from reallm.artifact.manifest import VERSION, Manifest, StoredMatrix, read_manifest
from reallm.artifact.writer import save_tensors, write_shards

__all__ = [
    "VERSION",
    "Ledger",
    "Manifest",
    "Row",
    "StoredMatrix",
    "read_ledger",
    "read_manifest",
    "save_tensors",
    "write_shards",
]
