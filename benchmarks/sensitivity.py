"""How much each role, and each block, suffers: one of them alone compressed, the rest as it was.

    python benchmarks/sensitivity.py --model MODEL --data-dir DATA [--update]

Writes results/sensitivity.json; with --update also `src/reallm/allocate/sensitivity.json`, from which a
budget predicts. Validation text.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab import Lab, arguments, save

from reallm.formats import from_spec

FORMATS = {
    "vector": {"format": "codebook", "index_bits": 6, "vector_dim": 2},
    "scalar": {"format": "normal_float", "bits": 3},
}
TABLE = Path(__file__).parents[1] / "src" / "reallm" / "allocate" / "sensitivity.json"


def main() -> None:
    args = arguments(__doc__, "wiki.valid.raw", "results/sensitivity.json", update=True)
    lab = Lab(args.model, args.text, args.device, args.windows or 10)
    original = lab.evaluate(kl=False)
    rows = []
    for label, spec in FORMATS.items():
        fmt = from_spec(spec)
        for role in dict.fromkeys(info.role for info in lab.blocks):
            arm = lab.arm(f"{label} role {role}", lambda m, r=role, f=fmt: f if m.role == r else None)
            rows.append({"format": label, "role": role, "block": None, **asdict(arm)})
        for number in dict.fromkeys(info.block for info in lab.blocks):
            arm = lab.arm(f"{label} block {number}", lambda m, n=number, f=fmt: f if m.block == n else None)
            rows.append({"format": label, "role": None, "block": number, **asdict(arm)})
    command = "python benchmarks/sensitivity.py --model MODEL --data-dir DATA --update"
    save(args.output, lab, command, original, formats=FORMATS, rows=rows)
    if args.update:
        TABLE.write_text(json.dumps(condensed(rows), indent=1) + "\n", encoding="utf-8")


def condensed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table that `allocate/sensitivity.py` reads."""
    roles: dict[str, dict[str, float]] = {label: {} for label in FORMATS}
    for row in rows:
        if row["role"] is not None:
            roles[row["format"]][row["role"]] = round(row["kl"] / row["relative_error"], 3)
    by_block: dict[int, float] = {}
    for row in rows:
        if row["block"] is not None:
            by_block[row["block"]] = by_block.get(row["block"], 0.0) + row["kl"]
    last = max(by_block)
    middle = statistics.median(kl for number, kl in by_block.items() if 0 < number < last)
    return {
        "roles": roles,
        "first_block": round(by_block[0] / middle, 2),
        "last_block": round(by_block[last] / middle, 2),
    }


if __name__ == "__main__":
    main()
