"""Measure the table that a budget predicts from: the error of every candidate format on Gaussian weights.

    python benchmarks/gaussian_errors.py

Writes src/reallm/fit/gaussian_errors.json. To be run when a fit or the list of candidates has changed.
"""

from __future__ import annotations

import json
from pathlib import Path

from reallm.allocate.budget import candidate_formats
from reallm.fit.quality import measured_gaussian_error
from reallm.formats import to_spec

TABLE = Path(__file__).parents[1] / "src" / "reallm" / "fit" / "gaussian_errors.json"


def main() -> None:
    rows = [{"format": to_spec(fmt), "error": measured_gaussian_error(fmt)} for fmt in candidate_formats()]
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
