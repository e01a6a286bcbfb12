"""A model and what will become of it."""

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

# Bytes of a size that are left for notes of tuning: one takes 190 to 390, and later ones make room for themselves.
RESERVED_FOR_TUNING = 600


@dataclass(frozen=True)
class Forecast:
    """What a budget chose from: options by matrix, bytes that the whole artifact may take, and what was expected.

    `size` is None under --bits. `loss` is the predicted KL to the original in nats per token; `calibrated` says whether
    it comes from this model's end-to-end loss or from the table of roles. `to_analyse`: from the table for now, as in a dry
    run, and a run measures first.
    """

    options: Options
    size: int | None
    nbytes: int | None
    loss: float
    calibrated: bool
    to_analyse: bool = False


@dataclass(frozen=True)
class Job:
    """A model and what will become of it; nothing is computed or written yet."""

    source: Source
    walk: Walk
    plan: Plan
    settings: Settings
    coding: bool = False  # stored tensors are entropy-coded where that makes them smaller
    forecast: Forecast | None = None  # where a budget chose: what it chose from

    @property
    def size(self) -> int | None:
        """Bytes that the whole artifact may take, now and tuned; None without a budget of bytes."""
        return None if self.forecast is None else self.forecast.size

    @property
    def reserved_for_tuning(self) -> int:
        """Bytes of the size that are not filled."""
        return 0 if self.size is None else RESERVED_FOR_TUNING

    @property
    def compressed_matrices(self) -> list[tuple[Matrix, PlanEntry]]:
        """The matrices to compress, in model order, with their formats."""
        planned = {entry.matrix.name: entry for entry in self.plan.entries}
        return [(matrix, planned[matrix.name]) for matrix in self.walk.matrices if matrix.name in planned]

    @property
    def unquantized(self) -> dict[str, str]:
        """Tensors that stay as they are, with the reason."""
        reasons = {unquantized.name: unquantized.reason for unquantized in self.walk.unquantized}
        planned = {entry.matrix.name for entry in self.plan.entries}
        left_out = {m.parameter: EXCLUDED_BY_PLAN for m in self.walk.matrices if m.name not in planned}
        return reasons | left_out

    @property
    def objective(self) -> str | None:
        """What fits minimise on the calibration text; None without one."""
        return self.settings.objective if self.settings.calibration else None

    @property
    def guided(self) -> bool:
        """Whether fits weigh tokens by the gradient of the end-to-end loss."""
        return self.objective == GUIDED

    def manifest(self, fingerprint: str, coded: Mapping[str, tuple[str, ...]] | None = None) -> Manifest:
        """What the loader must know. `coded`: local names of entropy-coded tensors by matrix."""
        names = coded or {}
        matrices = tuple(
            StoredMatrix(m.name, p.fmt, m.shape, m.kind, names.get(m.name, ())) for m, p in self.compressed_matrices
        )
        return Manifest(matrices, provenance(self, fingerprint))


def provenance(job: Job, fingerprint: str) -> dict[str, Any]:
    """Where the artifact comes from; no time and no path, so that equal runs give equal bytes."""
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
    return MatrixInfo(matrix.name, matrix.shape, matrix.role, matrix.kind, matrix.block)
