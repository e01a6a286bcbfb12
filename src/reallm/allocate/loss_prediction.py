"""Second-order prediction of a model's loss, per matrix: predicted loss of any format = number · error.

The number of a matrix is the loss (KL to the original, nats per token) at a relative error of 1, to second order. It
depends on how a format distributes its error over the weights, its kind of error:

* `grouped`: in proportion to the variance of each group (group scales, unrotated);
* `stepped`: uniform over the matrix (one step size per matrix, entropy-coded);
* `rotated_1`, `rotated_8`, `rotated_16`: uniform after a rotation, coded 1, 8 or 16 columns at a time;
* `inputs_rotated_1`, `outputs_rotated_8`, `both_rotated_16`, …: the same inside scales of columns, rows or both;
* `beside_rank_1_grouped`, …: for embedding and lm_head, the loss at a relative error of 1 in the remainder of the best
  rank-1 approximation. It predicts `low_rank_plus` from the error of its base.

`reallm.pipeline.loss_analysis` computes the numbers and a file stores them; this module only multiplies.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from reallm.allocate.format_plan import MatrixInfo
from reallm.errors import RecipeError
from reallm.formats import WeightFormat, from_spec, to_spec

ROTATED_WIDTHS = (1, 8, 16)
# Relative squared error of a format on Gaussian weights.
ErrorFn = Callable[[WeightFormat], float]
VERSION = 3
PLUS_RANK_ONE = "beside_rank_1_"


@dataclass(frozen=True)
class Measured:
    """Measurement of a format on (some rows of) a matrix: relative error, stored bytes / bytes before entropy coding.

    For `low_rank_plus` both belong to its base, measured on the remainder of the rank-1 approximation.
    """

    error: float
    share: float = 1.0


@dataclass(frozen=True)
class Analysis:
    """`numbers` by matrix and kind of error; `measured` by matrix and format (its spec as JSON); `origin`."""

    numbers: dict[str, dict[str, float]]
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Return whether calibration reached the matrix."""
        return name in self.numbers

    def loss(self, name: str, fmt: WeightFormat, error_fn: ErrorFn) -> float:
        """Return the predicted KL to the original in nats per token if only this matrix is compressed."""
        measured = self.measured.get(name, {}).get(spec_key(fmt))
        numbers, kind = self.numbers[name], kind_of_error(fmt)
        if fmt.residual_rank() and PLUS_RANK_ONE + kind in numbers:
            fmt, kind = fmt.without_residual(), PLUS_RANK_ONE + kind
        return numbers[kind] * (measured.error if measured else error_fn(fmt))

    def share(self, name: str, fmt: WeightFormat) -> float | None:
        """Return the measured stored bytes / bytes before entropy coding; None for a format that was not measured."""
        measured = self.measured.get(name, {}).get(spec_key(fmt))
        return measured.share if measured else None

    def save(self, path: Path) -> None:
        """Write the analysis to a JSON file."""
        values = {"version": VERSION, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Analysis:
        """Read an analysis from a JSON file. Errors: RecipeError if it is damaged or of another version."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise RecipeError(f"{path}: an analysis of version {values['version']!r}; remove it")
            measured = {n: {k: Measured(**v) for k, v in rows.items()} for n, rows in values["measured"].items()}
            return Analysis(values["numbers"], measured, values["origin"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{path}: damaged ({error}); remove it") from error


@functools.lru_cache(maxsize=1 << 14)
def spec_key(fmt: WeightFormat) -> str:
    """Return a format as a key of JSON objects."""
    return json.dumps(to_spec(fmt))


@functools.lru_cache(maxsize=1 << 14)
def kind_of_error(fmt: WeightFormat) -> str:
    """Which of a matrix's numbers a format's error is multiplied by."""
    kind, _, width = fmt.error_model().rpartition("rotated_")
    if not width.isdigit():
        return fmt.error_model()
    widest = ROTATED_WIDTHS[-1]
    return f"{kind}rotated_{min((w for w in ROTATED_WIDTHS if w >= int(width)), default=widest)}"


class LossRow(BaseModel):
    """Predicted loss of the matrices whose names match `match` in one format."""

    model_config = ConfigDict(extra="forbid")
    match: str
    format: dict[str, Any]
    loss: float


class Corrections(BaseModel):
    """Corrections to predicted losses: a file for `--corrections`.

    factors: {v: 1.4, rotated_16: 0.9, v/rotated_16: 1.2}  # by role, by kind of error, or both; they multiply
    losses:
    - {match: "*.0.self_attn.v_proj", format: {format: uniform, bits: 8}, loss: 0.002}
    candidates:                       # in place of the library's lists
      block: [{format: uniform, bits: 8}, ...]
      embedding: [...]
      head: [...]
    """

    model_config = ConfigDict(extra="forbid")
    factors: dict[str, float] = {}
    losses: list[LossRow] = []
    candidates: dict[str, list[dict[str, Any]]] = {}

    def correct_loss(self, matrix: MatrixInfo, fmt: WeightFormat, loss: float) -> float:
        """Return the loss of a matrix in a format: the first matching row of `losses`, or `loss` times the factors."""
        for row in self.losses:
            if from_spec(row.format) == fmt and fnmatch.fnmatchcase(matrix.name, row.match):
                return row.loss
        kind = kind_of_error(fmt)
        for key in (matrix.role, kind, f"{matrix.role}/{kind}"):
            loss *= self.factors.get(key, 1.0)
        return loss

    def select_candidates(self, kind: str, otherwise: Sequence[WeightFormat]) -> list[WeightFormat]:
        """Return the candidate formats for matrices of a kind; `otherwise` if the file lists none."""
        specs = self.candidates.get(kind)
        return list(otherwise) if specs is None else [from_spec(spec) for spec in specs]


def load_corrections(path: str | Path | None) -> Corrections:
    """Load corrections from a YAML or JSON file; without a path there are none.

    Errors: RecipeError if it cannot be read.
    """
    if path is None:
        return Corrections()
    try:
        return Corrections.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecipeError(f"{path}: {where}: {first['msg'].lower()}") from error
