"""Every codec with calibration data, one format for all block matrices, at about 2, 2.5 and 3 bits.

    python benchmarks/calibrated.py --model MODEL --data-dir DATA

Calibrated on c4/c4-train-sample.jsonl only (128 windows of 2,048 tokens), block by block through the compressed
stream; no tuning. WikiText-2 raw test, all windows. Embedding and head stay as they are. Writes
results/calibrated.json after every arm; --resume keeps the arms that are there.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from data_free import finished, normal, uniform, vectors
from lab import Arm, Lab, arguments, save

from reallm.fit import Objective, fit, squared_error
from reallm.formats import from_spec
from reallm.model import load_tokenizer, walk
from reallm.model.calibration import windows_of_files
from reallm.model.stream import Stream


def turned(base: dict[str, Any]) -> dict[str, Any]:
    return {"format": "rotated", "base": base}


def trellis(bits: int, state_bits: int = 16) -> dict[str, Any]:
    return {"format": "trellis", "bits": bits, "state_bits": state_bits}


def lattice(bits: int) -> dict[str, Any]:
    return {"format": "e8", "bits": bits}


def entropy(bits: float) -> dict[str, Any]:
    return {"format": "entropy_coded", "bits": bits}


ARMS: list[tuple[str, str, dict[str, Any]]] = [
    ("3 bits", "uniform g64 (GPTQ)", uniform(3)),
    ("3 bits", "uniform g128 (GPTQ)", uniform(3, 128)),
    ("3 bits", "normal_float", normal(3)),
    ("3 bits", "codebook d=1", vectors(1, 3)),
    ("3 bits", "codebook d=2", vectors(2, 6)),
    ("3 bits", "rotated codebook d=2", turned(vectors(2, 6))),
    ("3 bits", "entropy_coded", entropy(3.0)),
    ("3 bits", "rotated e8", turned(lattice(3))),
    ("3 bits", "rotated trellis, 16 state bits", turned(trellis(3))),
    ("2.5 bits", "codebook d=2", vectors(2, 5)),
    ("2.5 bits", "codebook d=4", vectors(4, 9)),
    ("2.5 bits", "entropy_coded", entropy(2.5)),
    ("2 bits", "uniform g64 (GPTQ)", uniform(2)),
    ("2 bits", "codebook d=2", vectors(2, 4)),
    ("2 bits", "codebook d=4", vectors(4, 8)),
    ("2 bits", "rotated codebook d=4", turned(vectors(4, 8))),
    ("2 bits", "entropy_coded", entropy(2.0)),
    ("2 bits", "rotated entropy_coded", turned(entropy(2.0))),
    ("2 bits", "rotated e8", turned(lattice(2))),
    ("2 bits", "rotated trellis, 12 state bits", turned(trellis(2, 12))),
    ("2 bits", "rotated trellis, 16 state bits", turned(trellis(2))),
]


def run(lab: Lab, windows: torch.Tensor, name: str, spec: dict[str, Any]) -> Arm:
    """Compress along the stream, as `reallm compress --calibration` does, and score."""
    fmt, blocks = from_spec(spec), walk(lab.model).matrices
    if lab.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun, error, energy = time.perf_counter(), 0.0, 0.0
    for key, weight in lab.original.items():
        lab.weights[key].copy_(weight)
    stream = Stream(lab.model, windows, lab.device)
    with torch.no_grad():
        for number in range(len(stream.blocks)):
            matrices = [matrix for matrix in blocks if matrix.block == number and matrix.kind == "block"]
            moments = stream.moments(matrices)
            for matrix in matrices:
                original, target = (w[f"{matrix.name}.weight"] for w in (lab.original, lab.weights))
                objective = Objective.of_outputs(moments.of(matrix.name))
                target.copy_(fmt.decode(fit(fmt, original, objective), matrix.shape))
                error += squared_error(original, target)
                energy += original.double().square().sum().item()
            stream.advance()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() if lab.device.type == "cuda" else 0
    result = lab.evaluate(kl=False)
    stored = sum(fmt.nbytes(info.shape) for info in lab.blocks)
    bits = 8 * stored / sum(info.weights for info in lab.blocks)
    print(f"{name:40s} {bits:7.4f} b  ppl {result.perplexity:12.3f}  {seconds:6.1f} s", flush=True)
    return Arm(name, bits, result.perplexity, result.kl, result.top1, error / energy, seconds, peak)


def main() -> None:
    args = arguments(__doc__, "wiki.test.raw", "results/calibrated.json", jobs=True, calibration=True)
    lab = Lab(args.model, args.text, args.device, args.windows)
    text = args.data_dir / "c4" / "c4-train-sample.jsonl"
    windows = windows_of_files([text], load_tokenizer(args.model), args.calibration_windows, args.calibration_context)
    original, begun = lab.evaluate(kl=False), time.time()
    arms = finished(args.output) if args.resume else {}
    for group, name, spec in ARMS:
        late = args.deadline is not None and time.time() - begun > args.deadline
        if (group, name) in arms or late or (args.groups and group not in args.groups):
            continue
        arms[group, name] = run(lab, windows, name, spec)
        keep(args.output, lab, original, windows, arms, text)


def keep(
    path: Path, lab: Lab, original: Any, windows: torch.Tensor, arms: dict[tuple[str, str], Arm], text: Path
) -> None:
    rows = [
        {"group": group, "format": spec, **asdict(arms[group, name])}
        for group, name, spec in ARMS
        if (group, name) in arms
    ]
    command = "python benchmarks/calibrated.py --model MODEL --data-dir DATA"
    calibration = {"text": text.name, "windows": windows.shape[0], "context": windows.shape[1]}
    save(path, lab, command, original, calibration=calibration, arms=rows)


if __name__ == "__main__":
    main()
