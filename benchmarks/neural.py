"""Does a neural decoder ever win? Rate and distortion on single matrices and groups, and perplexity of whole models.

    python benchmarks/neural.py --model MODEL --data-dir DATA --jobs N --first
    python benchmarks/neural.py --model MODEL --data-dir DATA --jobs N --end-to-end

Matrices of some roles and depths, fitted without data by their plain squared error, each as it is; those of the first
depth also with rows and columns shuffled, and as Gaussian noise of the same size; `smooth` is an image of waves, where
a decoder that knows neighbours must win. Bits are stored ones, a shared decoder divided among its matrices. `vq_bits`
are the bits that plain vector quantisation of the same matrix (the lower hull of its arms, straight between them in log
error) needs for an arm's error: above the arm's own bits, the arm wins. With --end-to-end the arms are recipes, run
through `reallm.compress` and the artifact, and scored on WikiText-2 raw test. Writes results/neural.json after every
arm; --resume keeps what is there.

--first are the arms for a GPU, cheap ones first, and the vector quantisation that they are held against: all matrices
as they are, then the controls. Reckoned from launches (10 µs each) and multiply-adds, not measured: 900 s of an H100
for the former, of which all but shared nets of more than 10⁶ parameters take 600, and 1,000 s for the latter. An arm on
a matrix is 1 to 2 s for a codeword net, and for a convolution 2 ms a step and 0.1 ns for 1,000 multiply-adds. Small
arms wait for launches, so that several --jobs a GPU should pay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from data_free import normal, vectors
from lab import Workers, arguments, asked_for, commit, earlier_runs, machine
from torch import Tensor

import reallm
from reallm.allocate.candidates import neural_candidates
from reallm.checkpoint import read_ledger, read_manifest
from reallm.cli.tables.names import short_name
from reallm.evaluate.measure import measure, versions
from reallm.fit import Objective, capture_fit_input, fit, relative_error, train_shared_decoder
from reallm.formats import Tensors, WeightFormat, from_spec, to_spec, use_shared_decoders
from reallm.formats.scaled import Scaled
from reallm.source import Matrix, Source, open_source, read_matrix, walk

ORIGINAL, SHUFFLED, NOISE, SMOOTH = "original", "shuffled", "noise", "smooth"
VQ = "vq"
Spec = dict[str, Any]


def codeword(index_bits: int, vector_dim: int = 8, **more: Any) -> Spec:
    return {"format": "codeword", "index_bits": index_bits, "vector_dim": vector_dim, **more}


def table(index_bits: int, vector_dim: int) -> Spec:
    """Plain vector quantisation whose float16 table can be shared."""
    return codeword(index_bits, vector_dim, digit_bits=index_bits, hidden=0, decoder_bits=16)


def linear(transform: str, kept: int, base: Spec, rows: int = 1, columns: int = 8) -> Spec:
    patch = {"patch_rows": rows, "patch_columns": columns, "kept": kept}
    return {"format": "linear_latents", "transform": transform, **patch, "base": base}


def conv(channels: int, width: int, stages: int, base: Spec, **more: Any) -> Spec:
    return {
        "format": "conv_latents", "channels": channels, "width": width, "stages": stages, "base": base, **more,
    }  # fmt: skip


def turned(base: Spec) -> Spec:
    return {"format": "rotated", "base": base}


def low_rank(rank: int, base: Spec) -> Spec:
    return {"format": "low_rank_plus", "rank": rank, "factors": "int8", "base": base}


def ordered(method: str, base: Spec) -> Spec:
    """Rows and columns both in an order that puts alike ones beside each other; the orders are stored."""
    return {"format": "permuted", "method": method, "rows": True, "base": base}


@dataclass(frozen=True)
class Arm:
    """A format, and how many matrices share its decoder."""

    group: str
    name: str
    spec: Spec
    share: int = 1
    gpu: bool = False  # too slow for a processor
    training_steps: int | None = None  # of a shared decoder, where those of `spec` are for the fit of each matrix to it


VQ_ARMS = [
    Arm(VQ, f"codebook d={dim}, {bits} bits", vectors(dim, bits))
    for dim, bits in ((1, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (4, 4), (4, 6), (4, 8), (4, 10), (8, 8), (8, 10))
]
VQ_ARMS += [
    Arm(VQ, f"{turn}one book d={dim}, {bits} bits", wrap({**additive, "vector_dim": dim, "index_bits": bits}))
    for additive in ({"format": "additive", "books": 1},)
    for turn, wrap in (("", dict), ("rotated ", turned))
    for dim, bits in ((4, 8), (8, 8), (8, 10), (8, 12), (16, 10))
]
VQ_ARMS += [
    Arm(VQ, f"one book d={dim}, {bits} bits", {**table_of_rows, "vector_dim": dim, "index_bits": bits})
    for table_of_rows in ({"format": "additive", "books": 1},)
    for dim, bits in ((16, 4), (16, 8), (8, 4), (8, 6), (4, 4), (4, 5), (4, 6), (4, 7))
]
A_ARMS = [
    Arm("a", "codeword d=8, 12 bits", codeword(12)),
    Arm("a", "codeword d=8, 12 bits, linear", codeword(12, hidden=0)),
    Arm("a", "codeword d=4, 8 bits", codeword(8, 4)),
    Arm("a", "rotated codeword d=8, 12 bits", turned(codeword(12))),
    *(Arm("a", f"codeword d=8, 12 bits, {n} matrices", codeword(12, shared="x"), n) for n in (4, 30)),
    *(Arm("a", f"codeword d=8, 12 bits, b_φ = {b}", codeword(12, decoder_bits=b)) for b in (3, 4, 6)),
    *(Arm(VQ + " shared", f"table d=8, 12 bits, {n} matrices", {**table(12, 8), "shared": "x"}, n) for n in (1, 4, 30)),
    Arm("a", "codeword d=16, 12 bits", codeword(12, 16)),
    Arm("a", "codeword d=16, 16 bits, hidden 128", codeword(16, 16, hidden=128), gpu=True),
    Arm("a", "codeword d=16, 16 bits, hidden 128, 30 matrices", codeword(16, 16, hidden=128, shared="x"), 30, gpu=True),
    Arm("a", "codeword d=8, 16 bits, hidden 128, 30 matrices", codeword(16, hidden=128, shared="x"), 30, gpu=True),
    *(
        Arm("a", f"{turn}codeword d=8, 16 bits, {n} matrices", spec, n, gpu=True)
        for n, own in ((1, {}), (30, {"shared": "x"}))
        for turn, spec in (("", codeword(16, **own)), ("rotated ", turned(codeword(16, **own))))
    ),
]
_TWO = vectors(2, 4)
B_ARMS = [
    Arm("b", "dct 1×8, 8 of 8", linear("dct", 8, _TWO)),
    Arm("b", "dct 1×8, 4 of 8", linear("dct", 4, vectors(2, 8))),
    Arm("b", "hadamard 4×4, 16 of 16", linear("hadamard", 16, _TWO, 4, 4)),
    Arm("b", "hadamard 4×4, 8 of 16", linear("hadamard", 8, vectors(2, 8), 4, 4)),
    Arm("b", "learned 1×8, 8 of 8", linear("learned", 8, _TWO)),
    Arm("b", "learned 8×8, 32 of 64", linear("learned", 32, vectors(2, 8), 8, 8)),
]
# (channels, width, stages) and steps for 1, 4 and 30 matrices: 1e4, 7e4, 3e5, 1.2e6, 1.8e6 and 4.7e6 parameters. A step
# of the last takes 500,000 multiply-adds per weight.
NETS: dict[tuple[int, int, int], dict[int, int]] = {
    (4, 16, 1): {1: 1000, 4: 150, 30: 60},
    (16, 32, 2): {1: 1000, 4: 150, 30: 60},
    (16, 64, 2): {1: 500},
    (4, 128, 2): {1: 500},
    (64, 128, 3): {1: 500, 4: 150, 30: 60},
    (16, 208, 3): {1: 300, 30: 30},
}
_EIGHT = {"format": "uniform", "bits": 8, "symmetric": True, "scales": "two_level"}
LOW_ARMS = [
    Arm("b", "dct 8×8, 6 of 64", linear("dct", 6, _EIGHT, 8, 8)),
    Arm("c", "conv 4×4, 1 channel, width 8", conv(1, 8, 2, {**_EIGHT, "bits": 6}, decoder_bits=6)),
]
_ENTROPY = {"format": "entropy_coded"}
C_ARMS = [
    Arm("c", "conv 2×2, 4 channels, width 8", conv(4, 8, 1, _TWO)),
    Arm("c", "conv 2×2, 4 channels, width 16, b_φ = 3", conv(4, 16, 1, _TWO, decoder_bits=3)),
    Arm("c", "conv 2×2, 1 channel, width 16", conv(1, 16, 1, vectors(2, 8))),
    Arm("c", "conv 4×4, 8 channels, width 8", conv(8, 8, 2, _TWO)),
    Arm("c", "conv 2×2, 4 channels, width 16, encoder", conv(4, 16, 1, _TWO, method="encoder")),
    Arm("c", "conv 2×2, 4 channels, width 8, 4 matrices", conv(4, 8, 1, _TWO, shared="x"), 4),
    *(
        Arm("c", f"conv, latents entropy-coded{classes}{rated}", conv(4, 8, 1, {**own, "bits": 2.0}, **more))
        for classes, own in (("", _ENTROPY), (" in 4 classes", {**_ENTROPY, "classes": 4}))
        for rated, more in (("", {}), (", rate in the loss", {"rate": 1.0}))
    ),
    *(
        Arm(
            "c", f"conv {2**s}×{2**s}, {c} channels, width {w}, {n} matrices",
            conv(c, w, s, _TWO, steps=steps[n], **({"shared": "x"} if n > 1 else {})), n, gpu=True,
        )
        for n in (1, 30, 4) for (c, w, s), steps in NETS.items() if n in steps
    ),
]  # fmt: skip
# A convolution lives by neighbours, which an order makes: steps that a processor can do, and the same vectors in the
# same order without a net, to tell what the order alone gives: `sort` puts alike scales into one group and knows no
# neighbours. Vectors of 4 are the four latents of one patch.
_FOUR = vectors(4, 8)
_TO_TRAIN = {1: None, 4: 40, 30: 10}
ORDERS = ("greedy", "spectral")
ORDER_ARMS = [
    *(
        Arm("order", f"{order} codebook d={base['vector_dim']}, {base['index_bits']} bits", ordered(order, base))
        for order in ("sort", *ORDERS) for base in (_TWO, _FOUR)
    ),
    *(
        Arm(
            "order",
            f"{order} conv 2×2, width 8, codebook d={base['vector_dim']}, {n} matrices",
            spec if order == "raw" else ordered(order, spec), n, training_steps=_TO_TRAIN[n],
        )
        for base in (_TWO, _FOUR) for n in (1, 4, 30) for order in ("raw", *ORDERS)
        for spec in [conv(4, 8, 1, base, steps=100, **({"shared": "x"} if n > 1 else {}))]
    ),
    Arm("order", "sort conv 2×2, width 8, codebook d=2, 1 matrices", ordered("sort", conv(4, 8, 1, _TWO, steps=100))),
    *(Arm("order", f"{order} codeword d=8, 12 bits", ordered(order, codeword(12))) for order in ORDERS),
    *(
        Arm("order", f"rank {rank}, codebook d=4, 8 bits", low_rank(rank, _FOUR)) for rank in (1, 8)
    ),
    *(
        Arm("order", f"rank 8, {order} codebook d=4, 8 bits", low_rank(8, ordered(order, _FOUR))) for order in ORDERS
    ),
]  # fmt: skip
BEST_ARMS = [
    Arm("best", "rotated e8, 2 bits", turned({"format": "e8", "bits": 2})),
    Arm("best", "additive, 2 books of 8 bits", {"format": "additive", "scales": "two_level"}),
    Arm("best", "entropy_coded, 2 bits", {"format": "entropy_coded", "bits": 2.0}),
    Arm("best", "rotated trellis, 2 bits", turned({"format": "trellis", "bits": 2, "state_bits": 16}), gpu=True),
    Arm("best", "rotated trellis, 1 bit", turned({"format": "trellis", "bits": 1, "state_bits": 16}), gpu=True),
]
ARMS = [*VQ_ARMS, BEST_ARMS[0], *A_ARMS[:6], *B_ARMS, *C_ARMS[:2], LOW_ARMS[0]]
ARMS += [*A_ARMS[6:9], *BEST_ARMS[1:], LOW_ARMS[1], *A_ARMS[9:], *C_ARMS[2:], *ORDER_ARMS]
# For a GPU, in this order. Of plain vector quantisation those on the lower hull of some size of matrix.
FIRST = (
    "rotated trellis, 2 bits",
    "rotated trellis, 1 bit",
    "rotated e8, 2 bits",
    "codeword d=8, 16 bits, 1 matrices",
    "codeword d=8, 16 bits, 30 matrices",
    "codeword d=16, 16 bits, hidden 128",
    "codeword d=16, 16 bits, hidden 128, 30 matrices",
    *(f"one book d=16, {bits} bits" for bits in (4, 8)),
    *(f"one book d=8, {bits} bits" for bits in (4, 6, 8, 10, 12)),
    "rotated one book d=4, 8 bits",
    "codebook d=4, 10 bits",
    "codebook d=2, 6 bits",
    "rotated codeword d=8, 16 bits, 1 matrices",
    "rotated codeword d=8, 16 bits, 30 matrices",
    *(arm.name for arm in sorted(C_ARMS, key=lambda arm: arm.spec["width"] >= 128) if arm.gpu),
)


@dataclass(frozen=True)
class Task:
    """An arm on one matrix (role, block) of a source, or a recipe for the whole model."""

    role: str
    block: int
    source: str
    arm: Arm

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.role, self.block, self.source, self.arm.name


@dataclass(frozen=True)
class Bench:
    """The block matrices of a model by (role, block), on a device; and the shared decoder that was trained last."""

    matrices: dict[tuple[str, int], Tensor]
    device: torch.device
    _trained: dict[Any, tuple[Tensors, float]] = field(default_factory=dict)

    def weight(self, role: str, block: int, source: str) -> Tensor:
        """A matrix as a source has it; whatever is drawn depends on the name alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{role}.{block}.{source}".encode()))
        if source == SMOOTH:
            return waves(generator).to(self.device)
        weight = self.matrices[role, block]
        if source == SHUFFLED:
            rows, columns = (torch.randperm(n, generator=generator) for n in weight.shape)
            weight = weight[rows][:, columns]
        if source == NOISE:
            weight = torch.randn(weight.shape, generator=generator) * weight.square().mean().sqrt()
        return weight.to(self.device)

    def neighbours(self, role: str, block: int, count: int) -> tuple[int, ...]:
        """The block and those that are nearest in depth, in their order."""
        blocks = sorted((b for r, b in self.matrices if r == role), key=lambda b: (abs(b - block), b))
        return tuple(sorted(blocks[:count]))

    def together(self, task: Task) -> Any:
        """What tasks have in common whose matrices share one decoder; itself for a decoder of its own."""
        if not from_spec(task.arm.spec).shared_decoders() or task.source == SMOOTH:
            return task.key
        return task.role, task.source, task.arm.name, self.neighbours(task.role, task.block, task.arm.share)

    def decoder(self, task: Task, fmt: WeightFormat) -> tuple[Tensors, float]:
        """The tensors of a shared decoder, and the seconds that its training took: once for tasks in a row."""
        key = self.together(task)
        if key not in self._trained:
            self._trained.clear()
            begun = self.now()
            fit_inputs = []
            for block in self.neighbours(task.role, task.block, task.arm.share):
                other = self.weight(task.role, block, task.source)
                fit_inputs.append(capture_fit_input(fmt, other, Objective.plain(other), 0))
            inside = fit_inputs[0].fmt
            if task.arm.training_steps is not None:
                inside = replace(inside, steps=task.arm.training_steps)
            tensors = inside.pack_decoder(train_shared_decoder(inside, fit_inputs, str(self.device)))
            self._trained[key] = tensors, self.now() - begun
        return self._trained[key]

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def run(self, task: Task) -> dict[str, Any]:
        """Fit, store, decode."""
        fmt, arm = from_spec(task.arm.spec), task.arm
        weight = self.weight(task.role, task.block, task.source)
        shape = (weight.shape[0], weight.shape[1])
        shared_decoders, training = {}, 0.0
        with torch.no_grad():
            if fmt.shared_decoders():
                shared_decoders["x"], training = self.decoder(task, fmt)
            with use_shared_decoders(shared_decoders):
                begun = self.now()
                tensors = fmt.pack(fit(fmt, weight), shape)
                fitted = self.now()
                error = relative_error(weight, fmt.decode(fmt.unpack(tensors, shape), shape))
        nbytes = fmt.nbytes(shape) + sum(t.nbytes for t in shared_decoders.get("x", {}).values()) / arm.share
        row = {
            "role": task.role, "block": task.block, "source": task.source, "group": arm.group, "name": arm.name,
            "format": arm.spec, "share": arm.share, "shape": list(shape), "bits": 8 * nbytes / weight.numel(),
            "relative_error": error, "multiply_adds": fmt.multiply_adds(shape) / weight.numel(),
            "decoder_parameters": parameters_of(fmt), "fit_seconds": training + fitted - begun,
            "decode_seconds": self.now() - fitted,
        }  # fmt: skip
        if arm.training_steps is not None:
            row["training_steps"] = arm.training_steps
        place = f"{task.role}.{task.block:<3} {task.source:9s}"
        print(f"{place} {arm.name:52s} {row['bits']:7.4f} b  {error:.4f}  {row['fit_seconds']:6.1f} s", flush=True)
        return row


def parameters_of(fmt: WeightFormat) -> int:
    """Numbers of all decoder nets in a format."""
    net, base = getattr(fmt, "net", None), getattr(fmt, "base", None)
    own = net.parameters if net else fmt.kept * fmt.patch if getattr(fmt, "transform", "") == "learned" else 0
    return own + (parameters_of(base) if base else 0)


def waves(generator: torch.Generator, size: int = 576) -> Tensor:
    """An image of 24 plane waves with 5 % of noise: what a decoder that knows neighbours is for."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    image = 0.05 * torch.randn(size, size, generator=generator) * math.sqrt(12)
    for a, b, phase in torch.randn(24, 3, generator=generator).tolist():
        image += torch.sin(40 * (a * x + b * y) + 7 * phase)
    return image


def named_matrices(source: Source, roles: Sequence[str]) -> dict[tuple[str, int], Matrix]:
    """The block matrices of the roles by (role, block)."""
    return {(m.role, m.block): m for m in walk(source.skeleton).matrices if m.kind == "block" and m.role in roles}


def bench_of(model: str, roles: Sequence[str], device: str) -> Bench:
    """All matrices of the roles, on the CPU until they are asked for."""
    source = open_source(model)
    matrices = {key: read_matrix(source, m).float() for key, m in named_matrices(source, roles).items()}
    return Bench(matrices, torch.device(device))


def _run(tasks: Sequence[Task], latest: float | None) -> list[dict[str, Any]]:
    """In a worker process: tasks that have a decoder in common."""
    return [Workers.state.run(task) for task in tasks if latest is None or time.time() < latest]


def vq_bits(error: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Bits that the lower hull of (bits, error) points needs for an error; None beyond its ends."""
    hull: list[tuple[float, float]] = []
    for bits, loss in sorted((bits, math.log2(max(loss, 1e-12))) for bits, loss in curve):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (bits, loss)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((bits, loss))
    wanted = math.log2(max(error, 1e-12))
    for (b0, l0), (b1, l1) in zip(hull, hull[1:], strict=False):
        if l1 <= wanted <= l0:
            return b0 + (b1 - b0) * (l0 - wanted) / (l0 - l1)
    return None


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def with_vq_bits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the bits that plain vector quantisation of the same matrix needs for their error."""
    curves: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row["group"] == VQ:
            place = (row["role"], row["block"], row["source"])
            curves.setdefault(place, []).append((row["bits"], row["relative_error"]))
    return [
        {**row, "vq_bits": vq_bits(row["relative_error"], curves.get((row["role"], row["block"], row["source"]), []))}
        for row in rows
    ]


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Arm by arm on every matrix as it is, then on the controls: a run that is cut short has whole comparisons."""
    gpu = args.device.startswith("cuda")
    known = {arm.name: arm for arm in ARMS}
    arms = [known[name] for name in FIRST] if args.first else [arm for arm in ARMS if gpu or not arm.gpu]
    arms = [arm for arm in arms if asked_for(args, arm.group, arm.name)]
    controlled = args.depths[:1] if args.control_depths is None else args.control_depths
    plain = [(role, block, ORIGINAL) for role in args.roles for block in args.depths if ORIGINAL in args.sources]
    kinds = [source for source in args.sources if source not in (ORIGINAL, SMOOTH)]
    controls = [(role, block, source) for role in args.roles for block in controlled for source in kinds]
    if SMOOTH in args.sources:
        controls.append((args.roles[0], args.depths[0], SMOOTH))
    return [Task(*place, arm) for places in (plain, controls) for arm in arms for place in places]


def jobs_of(bench: Bench, tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that share a decoder together, where the first of them stands."""
    found: dict[Any, list[Task]] = {}
    for task in tasks:
        found.setdefault(bench.together(task), []).append(task)
    return list(found.values())


# End to end, in the order of their worth: one format everywhere, or what the solver chooses within a budget.
EVERYWHERE: dict[str, Spec] = {
    "rotated codeword d=8, 16 bits, one decoder": turned(codeword(16, shared="all")),
    "rotated trellis, 2 bits": turned({"format": "trellis", "bits": 2, "state_bits": 16}),
    "rotated e8, 2 bits": turned({"format": "e8", "bits": 2}),
    "codeword d=8, 16 bits, one decoder": codeword(16, shared="all"),
    "table d=8, 16 bits, one table": {**table(16, 8), "shared": "all"},
    "learned 1×8, one basis, 2 bits": {**linear("learned", 8, _TWO), "shared": "all"},
    "conv 2×2, width 16, one decoder, 2 bits": conv(4, 16, 1, _TWO, shared="all", steps=100),
}
CHOICES = [
    *(turned({"format": "trellis", "bits": b, "state_bits": 16}) for b in (1, 2, 3, 4)),
    *(vectors(2, b) for b in (4, 6, 8)),
    *(normal(b) for b in (4, 5, 6)),
]
NEURAL_CHOICES = [to_spec(fmt) for fmt in neural_candidates("block") if not isinstance(fmt, Scaled)] + [
    conv(4, 8, 1, _TWO), linear("learned", 8, _TWO)
]  # fmt: skip
SOLVED = {
    f"{word} neural formats, {bits} bits": (bits, [*CHOICES, *more])
    for bits in (2.0, 2.5)
    for word, more in (("without", ()), ("with", NEURAL_CHOICES))
}
_PLAIN, _CHOSEN = list(EVERYWHERE), list(SOLVED)
END_TO_END = [*_PLAIN[:2], *_CHOSEN[:2], *_PLAIN[2:5], *_CHOSEN[2:], *_PLAIN[5:]]


def end_to_end(name: str, args: argparse.Namespace, run: int) -> dict[str, Any]:
    """One artifact written, loaded and scored. `name` is one of EVERYWHERE or of SOLVED."""
    calibration = {} if args.data_free else {
        "calibration": (str(args.data_dir / "c4" / "c4-train-sample.jsonl"),),
        "calibration_windows": args.calibration_windows, "calibration_context": args.calibration_context,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place) / "out", Path(place) / "recipe.yaml"
        how = {"device": args.device, "dtype": "float32", "context": args.context}
        begun = time.perf_counter()
        if name in EVERYWHERE:
            file.write_text(yaml.safe_dump({"rules": [{"match": "*", "format": EVERYWHERE[name]}]}))
            goal: dict[str, Any] = {"recipe": str(file)}
        else:
            bits, choices = SOLVED[name]
            file.write_text(json.dumps({"candidates": {"block": choices}}))
            goal = {"bits": bits, "corrections": str(file), "analysis": args.analysis and str(args.analysis)}
        ends = {"embedding": "keep", "head": "keep"}
        reallm.compress(args.model, folder, device=args.device, **goal, **ends, **calibration)
        seconds = time.perf_counter() - begun
        ledger = read_ledger(folder)
        formats = Counter(short_name(m.fmt) for m in read_manifest(folder).matrices if m.kind == "block")
        found = measure(str(folder), args.text, max_windows=args.windows, **how)
    row = {
        "name": name, "format": EVERYWHERE.get(name), "bits": ledger.bits_per_weight,
        "decoder_bytes": ledger.sum_bytes("role").get("decoders", 0), "perplexity": found["perplexity"],
        "formats": dict(formats.most_common()), "seconds": seconds, "calibrated": not args.data_free, "run": run,
    }  # fmt: skip
    print(f"{name:52s} {row['bits']:7.4f} b  ppl {row['perplexity']:10.3f}  {seconds:6.1f} s", flush=True)
    return row


def _end_to_end(name: str, args: argparse.Namespace, run: int, latest: float | None) -> list[dict[str, Any]]:
    """In a worker process, which holds the device and no model."""
    if latest is not None and time.time() > latest:
        return []
    args.device = Workers.state
    return [end_to_end(name, args, run)]


def _device(device: str) -> str:
    return device


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--roles", nargs="*", default=["q", "v", "down", "up"])
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 15, 29])
    parser.add_argument("--sources", nargs="*", default=[ORIGINAL, SHUFFLED, NOISE, SMOOTH])
    parser.add_argument("--control-depths", nargs="*", type=int, help="of shuffled and noise; default: the first depth")
    parser.add_argument("--first", action="store_true", help="only the arms for a GPU, most worth first")
    parser.add_argument("--end-to-end", action="store_true", help="perplexity of whole models in place of matrices")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window that is scored")
    parser.add_argument("--data-free", action="store_true", help="end to end without calibration")
    parser.add_argument("--analysis", type=Path, help="folder that keeps what losses are predicted from")


def main() -> None:
    begun = time.time()
    args = arguments(__doc__, "wiki.test.raw", "results/neural.json", jobs=True, calibration=True, more=options)
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.resume and args.output.is_file() else {}
    earlier = earlier_runs(args.output, args.resume)
    rows: list[dict[str, Any]] = before.get("matrices", [])
    arms: list[dict[str, Any]] = before.get("end_to_end", [])
    now = {
        "commit": commit(), "machine": machine(torch.device(args.device)), "versions": versions(),
        "command": "python benchmarks/neural.py --model MODEL --data-dir DATA" + " --end-to-end" * args.end_to_end,
    }  # fmt: skip

    def keep() -> None:
        content = {"model": Path(args.model).name, "runs": [*earlier, now]}
        content |= {"matrices": with_vq_bits(rows), "end_to_end": arms}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    latest = args.deadline and begun + args.deadline
    if args.end_to_end:
        done = {(row["name"], row["calibrated"]) for row in arms}
        names = [name for name in END_TO_END if (name, not args.data_free) not in done]
        names = [name for name in names if asked_for(args, "end to end", name)]
        make: Any = _device
        work = [functools.partial(_end_to_end, name, args, len(earlier), latest) for name in names]
        kept = arms
    else:
        known = {(row["role"], row["block"], row["source"], row["name"]) for row in rows}
        make = functools.partial(bench_of, args.model, args.roles)
        names = dict.fromkeys(named_matrices(open_source(args.model), args.roles), torch.empty(0))
        tasks = [task for task in tasks_of(args) if task.key not in known]
        jobs = jobs_of(Bench(names, torch.device("cpu")), tasks)
        work = [functools.partial(_run, job, latest) for job in jobs]
        kept = rows
    with Workers(args.jobs, args.device, make) as pool:
        for future in concurrent.futures.as_completed([pool.submit(job) for job in work]):
            if found := future.result():
                kept += [{**row, "run": len(earlier)} for row in found]
                keep()
    keep()


if __name__ == "__main__":
    main()
