"""Every byte of an artifact before it exists: texts are rendered, and tensors are counted by their layouts."""

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
from reallm.artifact import foretold_files, foretold_nbytes
from reallm.artifact.integrity import DIGITS, foretold_checksums
from reallm.formats import Shape, WeightFormat, table_tensors, to_spec
from reallm.formats.waist import under
from reallm.pipeline.job import Job, info_of

PLAN_FILE = "plan.yaml"
_FINGERPRINT = "0" * 64  # as long as any


class WholeFile:
    """Bytes of the artifacts that a job with other plans would write; no tensor counts as entropy-coded.

    Under a size, what is left for notes of tuning counts too.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._shared_text: dict[tuple[str, Shape, WeightFormat], dict[str, int]] = {}
        self._header_nbytes: dict[tuple[Shape, WeightFormat], tuple[int, int]] = {}

    @property
    def companions(self) -> dict[str, int]:
        """Bytes of tokenizer and generation settings, by file."""
        return self._job.source.companion_bytes

    def nbytes(self, plan: Plan) -> int:
        """Bytes of all files."""
        return self.overhead(plan) + _of_matrices(plan)

    def overhead(self, plan: Plan) -> int:
        """Return the bytes of everything but compressed matrices: shared decoders, unquantized tensors, headers, texts,
        auxiliary files, and what is reserved for tuning."""
        job = dataclasses.replace(self._job, plan=plan)
        with tempfile.TemporaryDirectory() as place:
            write_texts(job, _FINGERPRINT, {}, Path(place), foretold_checksums(foretold_files(tensors_of(job))))
            texts = nbytes_by_file(Path(place)) | self.companions
        return job.kept_for_tuning + sum(texts.values()) + foretold_nbytes(tensors_of(job)) - _of_matrices(plan)

    def text_nbytes(self, matrix: MatrixInfo, fmt: WeightFormat) -> int:
        """Return about how many bytes of headers, checksums and index a matrix takes in this format: it is linear.

        What config and plan say of a format once, for all matrices that have it, is not counted.
        """
        if (matrix.shape, fmt) not in self._header_nbytes:
            layout = fmt.layout(matrix.shape).items()
            texts = (f'"{name}":{_entry_text(tensor)},' for name, tensor in layout)
            self._header_nbytes[matrix.shape, fmt] = len(layout), sum(map(len, texts)) + DIGITS * len(layout)
        count, nbytes = self._header_nbytes[matrix.shape, fmt]
        return nbytes + count * (len(matrix.name) + 1)


    def shared_text(self, matrix: MatrixInfo, fmt: WeightFormat) -> dict[str, int]:
        """Return by a key about how many bytes config.json and the plan say once for all matrices stored alike."""
        key = (matrix.kind, matrix.shape, fmt)
        if key not in self._shared_text:
            layout = {"kind": matrix.kind, "shape": list(matrix.shape), "format": to_spec(fmt)}
            # config.json is indented by two, three levels deep.
            config = json.dumps(layout, indent=2)
            spec = yaml.safe_dump({"match": [], "format": to_spec(fmt)})
            nbytes = len(config) + 6 * (config.count("\n") + 1), len(spec) + 4 * spec.count("\n")
            words = f"{matrix.kind} {matrix.shape} {fmt}", str(fmt)
            self._shared_text[key] = dict(zip(words, nbytes, strict=True))
        return self._shared_text[key]


def _entry_text(tensor: Tensor) -> str:
    """What the header of a safetensors file says of a tensor; offsets have about as many digits as its bytes."""
    return f'{{"dtype":"F16","shape":{list(tensor.shape)},"data_offsets":[{tensor.nbytes},{tensor.nbytes}]}}'


def write_texts(
    job: Job, fingerprint: str, coded: Mapping[str, tuple[str, ...]], folder: Path, checksums: dict[str, str]
) -> None:
    """Config and the plan as run. `coded`: local names of entropy-coded tensors by matrix."""
    from reallm.model import write_config

    manifest = dataclasses.replace(job.manifest(fingerprint, coded), checksums=checksums)
    write_config(job.source, manifest, folder)
    matrices = [info_of(matrix) for matrix in job.walk.matrices]
    recipe = recipe_of_plan(job.plan, matrices, job.coding, job.objective)
    (folder / PLAN_FILE).write_text(dump_recipe(recipe), encoding="utf-8")


def _of_matrices(plan: Plan) -> int:
    """Stored bytes of the planned matrices, decoders that they share apart."""
    return sum(entry.nbytes for entry in plan.entries)


def nbytes_by_file(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def tensors_of(job: Job) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact, on the meta device, in the order they are written."""
    from reallm.model import marker_tensors

    for matrix, planned in job.compressed:
        yield from under(matrix.name, planned.fmt.layout(matrix.shape)).items()
    yield from table_tensors(job.plan.tables).items()
    shapes = job.source.shapes()
    for name in job.kept:
        yield name, torch.empty(shapes[name], dtype=job.source.dtype_of(name), device="meta")
    yield from marker_tensors([matrix for matrix, _ in job.compressed]).items()
