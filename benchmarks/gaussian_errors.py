"""Measure the table that a budget predicts from: the error of every candidate format on Gaussian weights,
and what entropy coding of the stored tensors leaves of their bytes.

    python benchmarks/gaussian_errors.py

Writes src/reallm/fit/gaussian_errors.json. To be run when a fit or the list of candidates has changed: rows that
the table has already stay, so that those of a fit that has changed are to be taken out before. Codewords of 16 index
bits take 2 minutes each on one core.
"""

from __future__ import annotations

import json
from pathlib import Path

from reallm.allocate.candidates import calibrated_candidates, data_free_candidates, neural_candidates
from reallm.artifact import code
from reallm.fit import fit
from reallm.fit.quality import gaussian, measured_gaussian_error
from reallm.formats import WeightFormat, to_spec
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.scaled import Scaled
from reallm.formats.shared import shared_as

TABLE = Path(__file__).parents[1] / "src" / "reallm" / "fit" / "gaussian_errors.json"
STATE_BITS = (10, 12, 16)
# Codes that use all their bits: nothing is left to be coded.
FULL = ("trellis", "entropy_coded", "e8", "codeword")


def main() -> None:
    formats = dict.fromkeys(data_free_candidates())
    for kind in ("block", "embedding"):
        for bits in STATE_BITS:
            found = calibrated_candidates(kind, bits)
            # Scaled ones and those beside a residual are as good as what is inside.
            formats |= dict.fromkeys(fmt for fmt in found if not isinstance(fmt, Scaled | LowRankPlus))
    formats |= dict.fromkeys(shared_as(fmt, "x") for fmt in neural_candidates("block") if not isinstance(fmt, Scaled))
    known = {json.dumps(row["format"]): row for row in json.loads(TABLE.read_text(encoding="utf-8"))}
    rows = []
    for fmt in formats:
        spec = to_spec(fmt)
        row = known.get(json.dumps(spec))
        if row is None:
            row = {"format": spec, "error": measured_gaussian_error(fmt)}
            if (share := _share(fmt)) < 1:
                row["share"] = round(share, 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _share(fmt: WeightFormat) -> float:
    if any(name in json.dumps(to_spec(fmt)) for name in FULL):
        return 1.0
    shape = (256, 1024)
    tensors, _ = code(fmt.pack(fit(fmt, gaussian(shape)), shape))
    return sum(tensor.nbytes for tensor in tensors.values()) / fmt.nbytes(shape)


if __name__ == "__main__":
    main()
