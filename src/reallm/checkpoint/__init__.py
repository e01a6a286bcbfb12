"""The compressed model on disk: manifest, writer, reader and ledger. docs/artifact.md specifies the format."""

from reallm.checkpoint.decoder_cost import DecoderCost, decoder_costs
from reallm.checkpoint.entropy_coding import decode_tensor, encode_tensor, encode_tensors, encode_untrained_tensors
from reallm.checkpoint.ledger import Ledger, Row, decoding_seconds, read_ledger
from reallm.checkpoint.manifest import VERSION, Manifest, StoredMatrix, read_manifest
from reallm.checkpoint.work_folder import (
    STAGING,
    check_finished,
    check_finished_output,
    check_new_file,
    check_output,
    finished_file,
    open_work_folder,
    read_work_tensors,
    remove_work_folder,
    work_folder,
)
from reallm.checkpoint.writer import predict_files, predict_nbytes, save_tensors, write_shards

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
    "encode_tensors",
    "encode_untrained_tensors",
    "encode_tensor",
    "decode_tensor",
    "decoder_costs",
    "decoding_seconds",
    "finished_file",
    "predict_files",
    "predict_nbytes",
    "open_work_folder",
    "read_work_tensors",
    "read_ledger",
    "read_manifest",
    "remove_work_folder",
    "save_tensors",
    "work_folder",
    "write_shards",
]
