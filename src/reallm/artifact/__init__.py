"""The compressed model on disk: manifest, writer, reader, ledger. Specified in docs/artifact.md."""

from reallm.artifact.coding import code, code_within_size, coded_tensor, decoded_tensor
from reallm.artifact.decoding import DecoderCost, decoder_costs
from reallm.artifact.ledger import Ledger, Row, decoding_seconds, read_ledger
from reallm.artifact.manifest import VERSION, Manifest, StoredMatrix, read_manifest
from reallm.artifact.work import (
    STAGING,
    check_finished,
    check_finished_output,
    check_new_file,
    check_output,
    finished_file,
    opened,
    read_kept,
    remove,
    work_folder,
)
from reallm.artifact.writer import foretold_files, foretold_nbytes, save_tensors, write_shards

__all__ = [
    "STAGING",
    "VERSION",
    "DecoderCost",
    "Ledger",
    "Manifest",
    "Row",
    "StoredMatrix",
    "check_finished",
    "check_finished_output",
    "check_new_file",
    "check_output",
    "code",
    "code_within_size",
    "coded_tensor",
    "decoded_tensor",
    "decoder_costs",
    "decoding_seconds",
    "finished_file",
    "foretold_files",
    "foretold_nbytes",
    "opened",
    "read_kept",
    "read_ledger",
    "read_manifest",
    "remove",
    "save_tensors",
    "work_folder",
    "write_shards",
]
