"""Decoders that matrices share: trained before any of their matrices is fitted, and frozen from then on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from reallm.allocate import Planned
from reallm.artifact import check_finished, finished_file, save_tensors
from reallm.fit import Objective, demand_of, train_shared
from reallm.formats import Tensors
from reallm.formats.shared import PREFIX
from reallm.model import Matrix
from reallm.pipeline.job import Job
from reallm.pipeline.reading import checked_weight, seed_of


def missing_tables(job: Job, work: Path) -> list[tuple[Matrix, Planned]]:
    """The matrices whose shared decoder is not in the work folder yet."""
    done = {name for name in job.plan.tables if finished_file(work, f"{PREFIX}.{name}").is_file()}
    return [pair for pair in job.compressed if set(pair[1].fmt.tables()) - done]


def trained_tables(job: Job, work: Path, objectives: Mapping[str, Objective]) -> dict[str, Tensors]:
    """The shared decoders of a job by name: from the work folder, or trained now and put there.

    `objectives` by matrix; those without one are weighed by the energy of their columns.
    """
    users: dict[str, list[tuple[Matrix, Planned]]] = defaultdict(list)
    for matrix, planned in missing_tables(job, work):
        for name in planned.fmt.tables():
            users[name].append((matrix, planned))
    for name, pairs in users.items():
        _train(job, work, name, pairs, objectives)
    found: dict[str, Tensors] = {}
    for name, table in job.plan.tables.items():
        path = finished_file(work, f"{PREFIX}.{name}")
        check_finished(path, table.layout)
        with safe_open(path, framework="pt") as file:
            found[name] = {local: file.get_tensor(local) for local in table.layout}
    return found


def _train(
    job: Job, work: Path, name: str, pairs: list[tuple[Matrix, Planned]], objectives: Mapping[str, Objective]
) -> None:
    demands = []
    with torch.no_grad():
        for matrix, planned in pairs:
            weight = checked_weight(job, matrix)
            objective = objectives.get(matrix.name)
            objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
            demands.append(demand_of(planned.fmt, weight, objective, seed_of(job, matrix.name)))
        fmt = demands[0].fmt
        stored = train_shared(fmt, demands, job.settings.device, seed_of(job, f"{PREFIX}.{name}"))
        save_tensors(fmt.pack_table(stored), finished_file(work, f"{PREFIX}.{name}"))
