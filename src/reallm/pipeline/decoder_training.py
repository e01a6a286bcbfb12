"""Train shared decoders before any of their matrices is fitted; they stay frozen afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from reallm.allocate import PlanEntry
from reallm.checkpoint import check_finished, finished_file, save_tensors
from reallm.fit import Objective, capture_fit_input, train_shared_decoder
from reallm.formats import Tensors
from reallm.formats.shared_decoders import PREFIX
from reallm.pipeline.job import Job
from reallm.pipeline.load_weight import load_weight, matrix_seed
from reallm.source import Matrix


def matrices_missing_decoder(job: Job, work: Path) -> list[tuple[Matrix, PlanEntry]]:
    """Return the matrices whose shared decoder is not in the work folder yet."""
    done = {name for name in job.plan.shared_decoders if finished_file(work, f"{PREFIX}.{name}").is_file()}
    return [pair for pair in job.compressed_matrices if set(pair[1].fmt.shared_decoders()) - done]


def train_shared_decoders(job: Job, work: Path, objectives: Mapping[str, Objective]) -> dict[str, Tensors]:
    """Return the shared decoders of a job by name; train those that are not in the work folder and save them there.

    `objectives` by matrix; a matrix without one is weighted by the energy of its columns.
    """
    users: dict[str, list[tuple[Matrix, PlanEntry]]] = defaultdict(list)
    for matrix, planned in matrices_missing_decoder(job, work):
        for name in planned.fmt.shared_decoders():
            users[name].append((matrix, planned))
    for name, pairs in users.items():
        _train(job, work, name, pairs, objectives)
    found: dict[str, Tensors] = {}
    for name, decoder in job.plan.shared_decoders.items():
        path = finished_file(work, f"{PREFIX}.{name}")
        check_finished(path, decoder.layout)
        with safe_open(path, framework="pt") as file:
            found[name] = {local: file.get_tensor(local) for local in decoder.layout}
    return found


def _train(
    job: Job, work: Path, name: str, pairs: list[tuple[Matrix, PlanEntry]], objectives: Mapping[str, Objective]
) -> None:
    fit_inputs = []
    with torch.no_grad():
        for matrix, planned in pairs:
            weight = load_weight(job, matrix)
            objective = objectives.get(matrix.name)
            objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
            fit_inputs.append(capture_fit_input(planned.fmt, weight, objective, matrix_seed(job, matrix.name)))
        fmt = fit_inputs[0].fmt
        stored = train_shared_decoder(fmt, fit_inputs, job.settings.device, matrix_seed(job, f"{PREFIX}.{name}"))
        save_tensors(fmt.pack_decoder(stored), finished_file(work, f"{PREFIX}.{name}"))
