"""Predict every byte of an artifact before it exists: render its texts, and count its tensors by their layouts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from reallm.allocate import MatrixInfo, Plan, recipe_of_plan
from reallm.allocate.recipe import dump_recipe
from reallm.checkpoint import predict_files, predict_nbytes
from reallm.checkpoint.checksums import DIGITS, placeholder_checksums
from reallm.formats import Shape, WeightFormat, shared_decoder_layout, to_spec
from reallm.formats.base import add_prefix
from reallm.pipeline.job import Job, matrix_info

PLAN_FILE = "plan.yaml"
_PLACEHOLDER_FINGERPRINT = "0" * 64  # as long as a sha256


class ArtifactSize:
    """Predicted bytes of the artifact that a job would write with a given plan, without entropy coding.

    For a job with a size, the bytes reserved for tuning records are included.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._shared_text: dict[tuple[str, Shape, WeightFormat], dict[str, int]] = {}
        self._header_nbytes: dict[tuple[Shape, WeightFormat], tuple[int, int]] = {}

    @property
    def auxiliary_files(self) -> dict[str, int]:
        """Bytes of the tokenizer and generation settings, by file."""
        return self._job.source.auxiliary_file_bytes

    def nbytes(self, plan: Plan) -> int:
        """Return the bytes of all files."""
        return self.overhead(plan) + _matrices_nbytes(plan)

    def overhead(self, plan: Plan) -> int:
        """Return the bytes of everything except the compressed matrices.

        These are shared decoders, unquantized tensors, headers, texts, auxiliary files, and the bytes reserved for
        tuning.
        """
        job = dataclasses.replace(self._job, plan=plan)
        with tempfile.TemporaryDirectory() as folder:
            write_texts(
                job,
                _PLACEHOLDER_FINGERPRINT,
                {},
                Path(folder),
                placeholder_checksums(predict_files(artifact_tensors(job))),
            )
            texts = nbytes_by_file(Path(folder)) | self.auxiliary_files
        return (
            job.reserved_for_tuning
            + sum(texts.values())
            + predict_nbytes(artifact_tensors(job))
            - _matrices_nbytes(plan)
        )

    def text_nbytes(self, matrix: MatrixInfo, fmt: WeightFormat) -> int:
        """Return the approximate bytes of headers, checksums and index for one matrix in this format.

        The model is linear: totals are sums over matrices. It excludes what config.json and the plan store once for all
        matrices with the same format; see `shared_text`.
        """
        if (matrix.shape, fmt) not in self._header_nbytes:
            layout = fmt.layout(matrix.shape).items()
            texts = (f'"{name}":{_entry_text(tensor)},' for name, tensor in layout)
            self._header_nbytes[matrix.shape, fmt] = len(layout), sum(map(len, texts)) + DIGITS * len(layout)
        count, nbytes = self._header_nbytes[matrix.shape, fmt]
        return nbytes + count * (len(matrix.name) + 1)

    def shared_text(self, matrix: MatrixInfo, fmt: WeightFormat) -> dict[str, int]:
        """Return the approximate bytes that config.json and the plan store once per kind, shape and format, by key."""
        key = (matrix.kind, matrix.shape, fmt)
        if key not in self._shared_text:
            layout = {"kind": matrix.kind, "shape": list(matrix.shape), "format": to_spec(fmt)}
            # config.json has an indent of two and nests three levels deep.
            config = json.dumps(layout, indent=2)
            spec = yaml.safe_dump({"match": [], "format": to_spec(fmt)})
            nbytes = len(config) + 6 * (config.count("\n") + 1), len(spec) + 4 * spec.count("\n")
            keys = f"{matrix.kind} {matrix.shape} {fmt}", str(fmt)
            self._shared_text[key] = dict(zip(keys, nbytes, strict=True))
        return self._shared_text[key]


def _entry_text(tensor: Tensor) -> str:
    """Return a tensor's entry in a safetensors header; its offsets have about as many digits as its byte count."""
    return f'{{"dtype":"F16","shape":{list(tensor.shape)},"data_offsets":[{tensor.nbytes},{tensor.nbytes}]}}'


def write_texts(
    job: Job, fingerprint: str, coded: Mapping[str, tuple[str, ...]], folder: Path, checksums: dict[str, str]
) -> None:
    """Write config.json and the executed plan. `coded`: local names of the entropy-coded tensors, by matrix."""
    from reallm.hf import write_config

    manifest = dataclasses.replace(job.manifest(fingerprint, coded), checksums=checksums)
    write_config(job.source, manifest, folder)
    matrices = [matrix_info(matrix) for matrix in job.walk.matrices]
    recipe = recipe_of_plan(job.plan, matrices, job.coding, job.objective)
    (folder / PLAN_FILE).write_text(dump_recipe(recipe), encoding="utf-8")


def _matrices_nbytes(plan: Plan) -> int:
    """Return the stored bytes of the planned matrices, excluding shared decoders."""
    return sum(entry.nbytes for entry in plan.entries)


def nbytes_by_file(folder: Path) -> dict[str, int]:
    """Return the bytes of every file in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def artifact_tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the artifact, on the meta device, in the order they are written."""
    from reallm.hf import marker_tensors

    for matrix, planned in job.compressed_matrices:
        yield from add_prefix(matrix.name, planned.fmt.layout(matrix.shape)).items()
    yield from shared_decoder_layout(job.plan.shared_decoders).items()
    shapes = job.source.shapes()
    for name in job.unquantized_tensors:
        yield name, torch.empty(shapes[name], dtype=job.source.tensor_dtype(name), device="meta")
    yield from marker_tensors([matrix for matrix, _ in job.compressed_matrices]).items()
