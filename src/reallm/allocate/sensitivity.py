"""Sensitivity of the model to an error in a matrix, by role and position of its block.

`benchmarks/sensitivity.py --update` writes the figures in `sensitivity.json` from one measured model: KL divergence to
the original per unit of relative squared error, with a single role compressed. They are a prior for models that have
not been measured. Vector and scalar codes have separate figures, because at equal squared error they raise the loss by
different amounts: the error of a scalar code is smaller on small weights than on large ones.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from reallm.allocate.format_plan import MatrixInfo
from reallm.formats import WeightFormat

# A fused or renamed matrix has the sensitivity of its most sensitive part.
_SAME_SENSITIVITY = {"qkv": "v", "gate_up": "up", "fc1": "up", "fc2": "down"}


@functools.cache
def load_table() -> dict[str, Any]:
    """Return the table: `roles` by family of codes and role; `first_block`, `last_block`: factors for these blocks."""
    file = resources.files("reallm.allocate") / "sensitivity.json"
    return json.loads(file.read_text(encoding="utf-8"))


def sensitivity(matrix: MatrixInfo, fmt: WeightFormat, depth: int) -> float:
    """Return the predicted KL (nats per token) per unit of relative error if the matrix's whole role had this format.

    `depth` is the number of decoder blocks.
    """
    roles = load_table()["roles"]["vector" if fmt.codes_vectors() else "scalar"]
    role = _SAME_SENSITIVITY.get(matrix.role, matrix.role)
    figure = roles.get(role, sum(roles.values()) / len(roles))
    if matrix.block == depth - 1:
        return figure * load_table()["last_block"]
    return figure * (load_table()["first_block"] if matrix.block == 0 else 1.0)
