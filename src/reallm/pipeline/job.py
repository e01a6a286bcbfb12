"""A compression job: the source model, its plan and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reallm.allocate import MatrixInfo, Plan, PlanEntry
from reallm.allocate.options import Options
from reallm.checkpoint import Manifest, StoredMatrix
from reallm.fit.objective import GUIDED
from reallm.pipeline.compress_settings import Settings, calibration_record
from reallm.source import Matrix, Source, Walk
from reallm.source.walk import EXCLUDED_BY_PLAN

# Bytes of a size that are reserved for tuning records: one takes 190 to 390; later ones free the bytes they need.
RESERVED_FOR_TUNING = 600


@dataclass(frozen=True)
class Forecast:
    """The options of a budget by matrix, the maximum bytes of the artifact, and the predicted bytes and loss.

    `size` is None with --bits. `loss` is the predicted KL divergence from the original model in nats per token;
    `calibrated`: predicted from the end-to-end loss of this model, otherwise from the table of roles. `to_analyse`:
    predicted from the table, as in a dry run, but a run starts with an analysis.
    """

    options: Options
    size: int | None
    nbytes: int | None
    loss: float
    calibrated: bool
    to_analyse: bool = False


@dataclass(frozen=True)
class Job:
    """A model, its plan and its settings; nothing is computed or written yet."""

    source: Source
    walk: Walk
    plan: Plan
    settings: Settings
    coding: bool = False  # entropy-code stored tensors if that makes them smaller
    forecast: Forecast | None = None  # only for budgets

    @property
    def size(self) -> int | None:
        """Return the maximum bytes of the artifact, including after tuning; None without a byte budget."""
        return None if self.forecast is None else self.forecast.size

    @property
    def reserved_for_tuning(self) -> int:
        """Return the bytes of the size that the artifact leaves unused."""
        return 0 if self.size is None else RESERVED_FOR_TUNING

    @property
    def compressed_matrices(self) -> list[tuple[Matrix, PlanEntry]]:
        """Return the matrices to compress, in model order, with their formats."""
        planned = {entry.matrix.name: entry for entry in self.plan.entries}
        return [(matrix, planned[matrix.name]) for matrix in self.walk.matrices if matrix.name in planned]

    @property
    def unquantized_tensors(self) -> dict[str, str]:
        """Return the unquantized tensors by name, with the reason."""
        reasons = {unquantized.name: unquantized.reason for unquantized in self.walk.unquantized}
        planned = {entry.matrix.name for entry in self.plan.entries}
        excluded = {m.parameter: EXCLUDED_BY_PLAN for m in self.walk.matrices if m.name not in planned}
        return reasons | excluded

    @property
    def objective(self) -> str | None:
        """Return the objective of fits on the calibration text; None without calibration."""
        return self.settings.objective if self.settings.calibration else None

    @property
    def is_guided(self) -> bool:
        """Return whether fits weight tokens by the gradient of the end-to-end loss."""
        return self.objective == GUIDED

    def manifest(self, fingerprint: str, coded: Mapping[str, tuple[str, ...]] | None = None) -> Manifest:
        """Return the manifest for the loader. `coded`: local names of entropy-coded tensors, by matrix."""
        names = coded or {}
        matrices = tuple(
            StoredMatrix(m.name, p.fmt, m.shape, m.kind, names.get(m.name, ())) for m, p in self.compressed_matrices
        )
        return Manifest(matrices, provenance(self, fingerprint))


def provenance(job: Job, fingerprint: str) -> dict[str, Any]:
    """Return the provenance of the artifact, without times and paths, so that equal runs give equal bytes."""
    import reallm

    unused = [one.to_dict() for one in job.source.unused]
    return {
        **({} if job.size is None else {"size": job.size}),
        **({"unused": unused} if unused else {}),
        "reallm": reallm.__version__,
        "source": Path(job.source.label).name,
        "source_sha256": fingerprint,
        "recipe": job.plan.recipe,
        "seed": job.settings.seed,
        "device": torch.device(job.settings.device).type,
        "calibration": calibration_record(job.settings),
        "torch": torch.__version__,
    }


def matrix_info(matrix: Matrix) -> MatrixInfo:
    """Return the facts about a matrix that allocation uses."""
    return MatrixInfo(matrix.name, matrix.shape, matrix.role, matrix.kind, matrix.block)
