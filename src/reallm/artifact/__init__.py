"""The compressed model on disk: manifest, writer, reader, ledger. Specified in docs/artifact.md."""

from reallm.artifact.coding import code, coded_tensor, decoded_tensor
from reallm.artifact.ledger import Ledger, Row, read_ledger
from reallm.artifact.manifest import VERSION, Manifest, StoredMatrix, read_manifest
from reallm.artifact.work import check_finished, check_output, finished_file, opened, work_folder
from reallm.artifact.writer import save_tensors, write_shards

__all__ = [
    "VERSION",
    "Ledger",
    "Manifest",
    "Row",
    "StoredMatrix",
    "check_finished",
    "check_output",
    "code",
    "coded_tensor",
    "decoded_tensor",
    "finished_file",
    "opened",
    "read_ledger",
    "read_manifest",
    "save_tensors",
    "work_folder",
    "write_shards",
]
