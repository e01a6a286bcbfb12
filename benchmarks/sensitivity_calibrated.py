"""What the end-to-end loss says of each matrix: one role, one block, one matrix alone compressed with calibration data.

    python benchmarks/sensitivity_calibrated.py --model MODEL --data-dir DATA --jobs N

Every matrix is fitted once for each format, by the inputs that the original model gives it (c4/c4-train-sample.jsonl,
128 windows of 2,048 tokens); then the model gets some of the fitted matrices and the KL divergence to the original
is measured. Validation text. Writes results/sensitivity_calibrated.json.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from calibrated import Bench, bench_of, trellis, turned
from lab import Workers, arguments, save
from torch import Tensor

from reallm.calibrate.hidden_states import HiddenStateCache
from reallm.fit import fit, squared_error
from reallm.formats import from_spec
from reallm.source import Matrix

FORMATS = {f"trellis {bits}": turned(trellis(bits)) for bits in (1, 2, 3)}
DETAILED = "trellis 2"  # the format of the rows by block and by matrix


@dataclass(frozen=True)
class Fitted:
    """A matrix decoded, its squared error, and the error of its outputs relative to the outputs."""

    matrix: Matrix
    decoded: Tensor
    relative_error: float
    output_error: float


def fitted(bench: Bench, spec: dict[str, Any]) -> dict[str, Fitted]:
    """Every block matrix in a format, fitted on the original stream."""
    fmt, found = from_spec(spec), {}
    stream = HiddenStateCache(bench.lab.model, bench.windows, bench.lab.device)
    with torch.no_grad():
        for number in range(len(stream.blocks)):
            matrices = [matrix for matrix in bench.matrices if matrix.block == number]
            for name, objective in bench.objectives(stream, matrices, "outputs").items():
                matrix = next(matrix for matrix in matrices if matrix.name == name)
                weight = bench.original(matrix)
                decoded = fmt.decode(fit(fmt, weight, objective), matrix.shape)
                error = objective.error(weight, decoded) / objective.error(weight, torch.zeros_like(weight))
                relative = squared_error(weight, decoded) / squared_error(weight, torch.zeros_like(weight))
                found[name] = Fitted(matrix, decoded, relative, error)
            stream.advance()
    return found


def rows_of(label: str, windows: int) -> list[dict[str, Any]]:
    """In a worker: KL with each role (and block, and matrix) alone compressed."""
    bench: Bench = Workers.state
    of_format = fitted(bench, FORMATS[label])
    roles = dict.fromkeys(f.matrix.role for f in of_format.values())
    groups: list[tuple[dict[str, Any], Callable[[Matrix], bool]]] = [({}, lambda m: True)]
    groups += [({"role": role}, lambda m, r=role: m.role == r) for role in roles]
    if label == DETAILED:
        numbers = dict.fromkeys(f.matrix.block for f in of_format.values())
        groups += [({"block": number}, lambda m, n=number: m.block == n) for number in numbers]
        groups += [({"matrix": name}, lambda m, n=name: m.name == n) for name in of_format]
    return [_row(bench, label, keys, [f for f in of_format.values() if of(f.matrix)], windows) for keys, of in groups]


def _row(bench: Bench, label: str, keys: dict[str, Any], chosen: list[Fitted], windows: int) -> dict[str, Any]:
    for one in chosen:
        bench.target(one.matrix).copy_(one.decoded)
    result = bench.lab.evaluate(windows)
    for one in chosen:
        bench.target(one.matrix).copy_(bench.original(one.matrix))
    weights = sum(math.prod(one.matrix.shape) for one in chosen)

    def mean(value: Callable[[Fitted], float]) -> float:
        return sum(value(one) * math.prod(one.matrix.shape) for one in chosen) / weights

    return {
        "format": label,
        **{key: keys.get(key) for key in ("role", "block", "matrix")},
        "kl": result.kl,
        "perplexity": result.perplexity,
        "relative_error": mean(lambda one: one.relative_error),
        "output_error": mean(lambda one: one.output_error),
    }


def main() -> None:
    args = arguments(__doc__, "wiki.valid.raw", "results/sensitivity_calibrated.json", jobs=True, calibration=True)
    text = args.data_dir / "c4" / "c4-train-sample.jsonl"
    sizes, windows = (args.calibration_windows, args.calibration_context), args.windows or 8
    make = functools.partial(bench_of, args.model, args.text, text, sizes, windows)
    with Workers(args.jobs, args.device, make) as pool:
        # The long one first, so that the others fill the second GPU.
        labels = sorted(FORMATS, key=lambda label: label != DETAILED)
        rows = [row for found in pool.map(functools.partial(rows_of, windows=windows), labels) for row in found]
    bench = make(args.device)
    original = bench.lab.evaluate(windows, kl=False)
    command = "python benchmarks/sensitivity_calibrated.py --model MODEL --data-dir DATA --jobs N"
    calibration = {"text": text.name, "windows": sizes[0], "context": sizes[1]}
    save(args.output, bench.lab, command, original, calibration=calibration, formats=FORMATS, rows=rows)


if __name__ == "__main__":
    main()
