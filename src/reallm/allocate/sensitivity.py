"""How much an error in a matrix hurts the model, by its role and by where it stands.

The figures in `sensitivity.json` are written by `benchmarks/sensitivity.py --update` from one measured model:
KL divergence to the original per unit of relative squared error, one role alone compressed. They are a prior
for models that nobody has measured. Vector codes are kept apart from scalar ones, because at equal squared
error they hurt differently: a scalar code errs less on small weights than on large ones.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from reallm.allocate.format_plan import MatrixInfo
from reallm.formats import WeightFormat

# A fused or renamed matrix suffers as the most delicate of the parts it plays.
_ALIKE = {"qkv": "v", "gate_up": "up", "fc1": "up", "fc2": "down"}


@functools.cache
def load_table() -> dict[str, Any]:
    """`roles`: figure by family of codes and role; `first_block`, `last_block`: factors against a middle one."""
    file = resources.files("reallm.allocate") / "sensitivity.json"
    return json.loads(file.read_text(encoding="utf-8"))


def sensitivity(matrix: MatrixInfo, fmt: WeightFormat, depth: int) -> float:
    """Predicted KL (nats per token) per unit of relative error if all of the matrix's role were compressed so.

    `depth` is the number of decoder blocks.
    """
    roles = load_table()["roles"]["vector" if fmt.codes_vectors() else "scalar"]
    role = _ALIKE.get(matrix.role, matrix.role)
    figure = roles.get(role, sum(roles.values()) / len(roles))
    if matrix.block == depth - 1:
        return figure * load_table()["last_block"]
    return figure * (load_table()["first_block"] if matrix.block == 0 else 1.0)
