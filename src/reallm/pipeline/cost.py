"""Estimate the cost of a job before any work: bytes, seconds, memory, disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reallm.allocate import PlanEntry
from reallm.calibrate.hidden_states import TOKENS_PER_PASS, nbytes_per_token
from reallm.calibrate.loss_gradients import fast_products
from reallm.calibrate.windows import GENERATION_BATCH, SELF, seconds_per_step
from reallm.checkpoint import predict_nbytes
from reallm.errors import FormatError
from reallm.fit import Objective, capture_fit_input, fit, train_shared_decoder
from reallm.fit.objective import OUTPUTS
from reallm.formats import Tensors, WeightFormat, to_spec, use_shared_decoders
from reallm.formats.base import add_prefix
from reallm.pipeline.artifact_size import artifact_tensors
from reallm.pipeline.calibration_inputs import gradient_dtype
from reallm.pipeline.compress_settings import Settings, analysis_settings
from reallm.pipeline.fit_job import calibration_dtype
from reallm.pipeline.job import Job
from reallm.pipeline.teacher_outputs import teacher_layouts
from reallm.source.model_source import Source
from reallm.source.walk import Walk, block_index

# A fit holds the matrix in float32, its decoded weights, the error and a few chunks.
COPIES_WHILE_FITTING = 6
# From 32,768 vectors, k-means works on a sample. Both sizes are above that, so the slope between them is valid.
_SMALL_SAMPLE, _LARGE_SAMPLE = (64, 1024), (96, 1024)
# Approximate limit for all samples together; after it, formats with the same fitting method share one measurement. A
# plan may have 24 rates of `entropy_coded`, and each takes 6 to 12 s with a residual.
_SAMPLE_SECONDS = 4.0
# Smaller shapes are timed first; a format that takes longer than this many seconds (16-bit trellis codes: 1 ms per
# weight on a CPU) is not timed on the samples.
_FIRST_SHAPES, _SLOW_SECONDS = ((16, 16), (16, 64), (16, 256)), 0.3
# Fields that do not change the fitting method of a format.
_NOT_IN_TIMING_KEY = ("bits", "largest", "group_size", "scales", "sides", "seed")
# Fits of the base with a rank-1 residual: 3 to 5 on SmolLM2's embedding. Samples are noise without a mean that the
# first fit could find, and take 7 to 10.
_RANK_ONE_ROUNDS = 4
# With calibration, scales and codebooks are refitted in float64 (18 copies of 3,072 x 8,192 weights were observed), or
# a Hessian is factored in float64.
_COPIES_WHILE_REFITTING = 20
_HESSIAN_COPIES = 9
# Copies of the widest input per token during a pass through a block, in the dtype of the hidden states and in float32.
_ACTIVATIONS = 4
# Plans noted by a run with a size: all that were tried, with their bytes, while a new file replaces the old one.
_MAX_PLANS = 24
# Copies of the format specs of all matrices: state (twice while it is written), plan and, with shapes, config.json.
_SPEC_COPIES, _CONFIG_BYTES = 6, 8_192
# Gradients take this many times as long as their matrix products: attention, norms, the softmax over the vocabulary and
# squares take the rest.
_GRADIENT_OVERHEAD = 2.5
_FACTOR_OPERATIONS = 20  # per cube of a matrix's inputs, for its analysis: three factorisations and their use
_LIBRARY_BYTES = 600_000_000  # Python, torch and transformers once imported


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a job: bytes of tensors are exact, the rest is extrapolated from timed samples."""

    compressed_bytes: int
    unquantized_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


def estimate(job: Job) -> Estimate:
    """Return the cost of a job. Times small samples of the formats in the plan, which takes some seconds."""
    compressed = job.plan.nbytes
    shapes = job.source.shapes()
    unquantized = sum(math.prod(shapes[name]) for name in job.unquantized_tensors) * job.source.dtype.itemsize
    return Estimate(
        compressed_bytes=compressed,
        unquantized_bytes=unquantized,
        bits_per_weight=job.plan.block_bits,
        seconds=_predicted_seconds(job) + _calibration_seconds(job) + _generation_seconds(job) + analysis_seconds(job),
        peak_memory_bytes=_LIBRARY_BYTES + job.source.loaded_nbytes + _working_bytes(job),
        disk_bytes=work_bytes(job),
    )


def work_bytes(job: Job) -> int:
    """Return the maximum bytes of the work folder: finished matrices, the staged artifact, and teacher outputs.

    Teacher outputs are text written by the original model, and gradients with 4 bytes per token and matrix. Entropy
    coding is not included: a job with a size spends the bytes that it saves on other matrices.
    """
    finished = [
        add_prefix(matrix.name, planned.fmt.layout(matrix.shape)) for matrix, planned in job.compressed_matrices
    ]
    finished += [dict(table.layout) for table in job.plan.shared_decoders.values()]
    specs = json.dumps({matrix.name: to_spec(planned.fmt) for matrix, planned in job.compressed_matrices})
    notes = _MAX_PLANS * len(specs) if job.size is not None else 0
    files = sum(predict_nbytes(tensors.items()) for tensors in finished + teacher_layouts(job))
    try:
        tokenizer = sum(job.source.auxiliary_file_bytes.values())
    except OSError:  # it is measured by writing it to a temporary folder; if that fails, the run reports it
        tokenizer = 0
    return files + predict_nbytes(artifact_tensors(job)) + tokenizer + _SPEC_COPIES * len(specs) + _CONFIG_BYTES + notes


def _predicted_seconds(job: Job) -> float:
    """Time the formats on samples, derive a fixed and a per-weight cost, and sum over the plan."""
    largest: dict[WeightFormat, PlanEntry] = {}
    for _, planned in sorted(job.compressed_matrices, key=lambda row: row[1].matrix.weights):
        largest[_timing_format(planned.fmt)] = dataclasses.replace(planned, fmt=_rank_one_base(planned.fmt)[0])
    shared_decoders, training = _sample_decoders(largest, job.settings.device)
    with use_shared_decoders(shared_decoders):
        costs = _costs(largest, job.settings.device)
    seconds = training
    for _, planned in job.compressed_matrices:
        fixed, slope = costs[_timing_format(planned.fmt)]
        seconds += _rank_one_base(planned.fmt)[1] * (fixed + slope * planned.matrix.weights)
    return seconds


def _costs(largest: Mapping[WeightFormat, PlanEntry], device: str) -> dict[WeightFormat, tuple[float, float]]:
    """Return (seconds per matrix, seconds per weight) by format; `largest` has the largest matrix of each format.

    Formats of the largest matrices are timed first, up to `_SAMPLE_SECONDS`. After that, only the first format of each
    fitting method is timed.
    """
    costs: dict[WeightFormat, tuple[float, float]] = {}
    by_timing_key: dict[str, tuple[float, float]] = {}
    begun = time.perf_counter()
    for fmt, planned in sorted(largest.items(), key=lambda row: -row[1].matrix.weights):
        timing_key = json.dumps(_timing_key(to_spec(fmt)))
        if timing_key not in by_timing_key or time.perf_counter() - begun < _SAMPLE_SECONDS:
            by_timing_key[timing_key] = _measure_cost(fmt, planned, device)
        costs[fmt] = by_timing_key[timing_key]
    return costs


def _timing_key(spec: Any) -> Any:
    return (
        {key: _timing_key(value) for key, value in spec.items() if key not in _NOT_IN_TIMING_KEY}
        if isinstance(spec, dict)
        else spec
    )


def _measure_cost(fmt: WeightFormat, largest: PlanEntry, device: str) -> tuple[float, float]:
    """Time a sample no larger than the largest matrix, so that the estimate does not take longer than the job."""
    if largest.matrix.weights > math.prod(_LARGE_SAMPLE):
        return fitting_cost(fmt, device)
    return 0.0, _timed_fit(largest.fmt, largest.matrix.shape, device) / largest.matrix.weights


def _sample_decoders(formats: Iterable[WeightFormat], device: str) -> tuple[dict[str, Tensors], float]:
    """Return (shared decoders by name, seconds of their training), trained on the larger sample."""
    shared_decoders: dict[str, Tensors] = {}
    begun = time.perf_counter()
    for fmt in formats:
        for name in set(fmt.shared_decoders()) - set(shared_decoders):
            sample = _sample(_LARGE_SAMPLE, device)
            fit_input = capture_fit_input(fmt, sample, Objective.plain(sample), 0)
            with torch.no_grad():
                shared_decoders[name] = fit_input.fmt.pack_decoder(
                    train_shared_decoder(fit_input.fmt, [fit_input], device)
                )
    return shared_decoders, time.perf_counter() - begun


def _timing_format(fmt: WeightFormat) -> WeightFormat:
    """The format that is timed in place of one that differs in the size of its groups or in a residual of rank 1."""
    return fmt.timing_format()


def _rank_one_base(fmt: WeightFormat) -> tuple[WeightFormat, int]:
    """(what is fitted beside a residual of rank 1, how often); another format is itself, once."""
    return (fmt.without_residual(), _RANK_ONE_ROUNDS) if fmt.residual_rank() == 1 else (fmt, 1)


def _working_bytes(job: Job) -> int:
    """Return the peak memory of a run beyond the libraries and the source: of the fits and of calibration."""
    fit_bytes = (
        4 * COPIES_WHILE_FITTING * max((math.prod(matrix.shape) for matrix, _ in job.compressed_matrices), default=0)
    )
    if not job.settings.calibration:
        return fit_bytes
    whole = job.source.total_parameters * calibration_dtype(job).itemsize if _requires_full_load(job) else 0
    return max(
        fit_bytes + _guidance_bytes(job),
        whole + _guidance_bytes(job),
        _guidance_bytes(job) + _calibration_bytes(job),
    )


def _requires_full_load(job: Job) -> bool:
    """Return whether the whole original model must be loaded: to write text, for gradients, or for an analysis."""
    uses_analysis = job.forecast is not None and (job.forecast.calibrated or job.forecast.to_analyse)
    return uses_analysis or job.settings.objective != OUTPUTS or SELF in job.settings.calibration


def _guidance_bytes(job: Job) -> int:
    """Return the bytes of the weights of tokens that guided fits keep: one float32 per token and matrix of a block."""
    in_blocks = sum(matrix.block is not None for matrix, _ in job.compressed_matrices)
    return 4 * _calibration_tokens(job) * in_blocks if job.is_guided else 0


def _calibration_bytes(job: Job) -> int:
    """Return the peak memory of the block-wise forward pass.

    It holds the hidden states and the other per-token arguments of blocks, the weights outside the blocks, and the
    largest block with the Hessians of its inputs and a pass of tokens or one fit. Nothing of it is written to disk.
    """
    dtype = calibration_dtype(job)
    itemsize = dtype.itemsize
    weights: dict[int | None, int] = defaultdict(int)
    heads = {matrix.parameter for matrix in job.walk.matrices if matrix.kind == "head"}
    for name, shape in job.source.shapes().items():
        if name not in heads and name not in job.walk.tied:
            weights[block_index(name)] += math.prod(shape)
    hessian_bytes: dict[int | None, int] = defaultdict(int)
    for matrix, _ in job.compressed_matrices:
        hessian_bytes[matrix.block] += 0 if matrix.expert is not None else 4 * matrix.shape[1] ** 2
    shapes = [matrix.shape for matrix, _ in job.compressed_matrices if matrix.block is not None]
    widest = max((max(shape) for shape in shapes), default=0)
    tokens = min(_calibration_tokens(job), max(TOKENS_PER_PASS, job.settings.calibration_context))
    one_pass = tokens * widest * _ACTIVATIONS * (itemsize + 4)
    one_fit = max((_calibrated_fit_bytes(shape) for shape in shapes), default=0)
    outside = weights.pop(None, 0) * itemsize + _calibration_tokens(job) * nbytes_per_token(job.source.config, dtype)
    largest = max((itemsize * size + hessian_bytes[block] for block, size in weights.items()), default=0)
    return outside + largest + max(one_pass, one_fit)


def _calibrated_fit_bytes(shape: tuple[int, int]) -> int:
    weights, hessian = math.prod(shape), shape[1] ** 2
    return 4 * max(_COPIES_WHILE_REFITTING * weights, _HESSIAN_COPIES * hessian + COPIES_WHILE_FITTING * weights)


def _calibration_tokens(job: Job) -> int:
    return job.settings.calibration_windows * job.settings.calibration_context if job.settings.calibration else 0


def _calibration_seconds(job: Job) -> float:
    """Return the seconds of two passes of all tokens through every block and of the Hessians of their inputs.

    They are predicted from the speed of one matrix product. Gradients of the end-to-end loss take three more passes
    through the whole model: one forward, and one backward that takes twice as long.
    """
    if not job.settings.calibration:
        return 0.0
    device = job.settings.device
    per_operation = _seconds_per_operation(calibration_dtype(job), device)
    in_blocks = sum(math.prod(matrix.shape) for matrix in job.walk.matrices if matrix.block is not None)
    sums = sum(matrix.shape[1] ** 2 for matrix, _ in job.compressed_matrices if matrix.block is not None)
    seconds = 2 * (2 * in_blocks + sums) * per_operation
    if job.settings.objective != OUTPUTS:
        seconds += _gradient_seconds(job.source, device)
    return _calibration_tokens(job) * seconds


def _gradient_seconds(source: Source, device: str) -> float:
    """Return the seconds per token of a forward and backward pass through the whole model."""
    per_operation = _seconds_per_operation(gradient_dtype(source, device), device, fast=True)
    return _GRADIENT_OVERHEAD * 4 * source.total_parameters * per_operation


def analysis_seconds(job: Job) -> float:
    """Return the seconds of the analysis at the start of a run; 0 if it needs none."""
    if job.forecast is None or not job.forecast.to_analyse:
        return 0.0
    return seconds_of_analysis(job.source, job.walk, job.settings)


def seconds_of_analysis(source: Source, walked: Walk, settings: Settings) -> float:
    """Return the seconds of an analysis: gradients of its windows, Hessians of the inputs, and their factorisations."""
    selected, device = analysis_settings(settings), settings.device
    tokens = selected.calibration_windows * selected.calibration_context
    columns = [matrix.shape[1] for matrix in walked.matrices if matrix.block is not None and matrix.expert is None]
    hessians = sum(2 * tokens * width**2 for width in columns) * _seconds_per_operation(torch.float32, device, True)
    factors = sum(_FACTOR_OPERATIONS * width**3 for width in columns) * _seconds_per_operation(torch.float32, "cpu")
    return tokens * _gradient_seconds(source, device) + hessians + factors


def _seconds_per_operation(dtype: torch.dtype, device: str, fast: bool = False) -> float:
    """Return the seconds per operation of a matrix product; `fast`: with the precision of gradient computation.

    On a CPU it measures process time, because other processes may be running.
    """
    clock, threads = time.perf_counter, 1
    if torch.device(device).type == "cpu":
        clock, threads = time.process_time, torch.get_num_threads()
    sample, seconds = torch.randn(1024, 1024, dtype=dtype).to(device), []
    with fast_products(device) if fast else contextlib.nullcontext():
        for _ in range(3):  # the first one includes loading of libraries
            begun = clock()
            (sample @ sample).sum().item()
            seconds.append((clock() - begun) / threads)
    return min(seconds) / (2 * 1024**3)


def _generation_seconds(job: Job) -> float:
    """Return the seconds to generate the calibration text: one step per token of a window, for a batch of windows.

    A step takes the overhead of its blocks, measured on a sample network of width 64, plus a product with every weight
    and, on average, with half of the final KV cache (read and written).
    """
    if job.settings.calibration != (SELF,):
        return 0.0
    one, three = (seconds_per_step(blocks, job.settings.device) for blocks in (1, 3))
    config = job.source.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    cache = config.num_hidden_layers * width * job.settings.calibration_context * GENERATION_BATCH
    states, weights = (torch.randn(n, 1024, dtype=calibration_dtype(job)).to(job.settings.device) for n in (16, 8192))
    begun = time.perf_counter()
    (states @ weights.T).sum().item()
    per_weight = (time.perf_counter() - begun) / weights.numel()
    overhead = one + (three - one) / 2 * (config.num_hidden_layers - 1)
    steps = math.ceil(job.settings.calibration_windows / GENERATION_BATCH) * job.settings.calibration_context
    return steps * (max(one, overhead) + per_weight * (job.source.total_parameters + 2 * cache))


def fitting_cost(fmt: WeightFormat, device: str) -> tuple[float, float]:
    """Return (seconds per matrix, seconds per weight) of fitting a format."""
    before = None
    for shape in _FIRST_SHAPES:
        try:
            fmt.check(shape)
        except FormatError:  # the residual has more ranks, or the group more columns, than the shape
            continue
        seconds = _timed_fit(fmt, shape, device)
        if (
            before is not None and seconds > _SLOW_SECONDS and seconds > 2 * before[0]
        ):  # more than the fixed cost of any fit
            slope = (seconds - before[0]) / (math.prod(shape) - before[1])
            return max(0.0, seconds - slope * math.prod(shape)), slope
        before = seconds, math.prod(shape)
    times = [_timed_fit(fmt, shape, device) for shape in (_SMALL_SAMPLE, _LARGE_SAMPLE)]
    slope = max(0.0, (times[1] - times[0]) / (math.prod(_LARGE_SAMPLE) - math.prod(_SMALL_SAMPLE)))
    return max(0.0, times[0] - slope * math.prod(_SMALL_SAMPLE)), slope


def _timed_fit(fmt: WeightFormat, shape: tuple[int, int], device: str) -> float:
    weight = _sample(shape, device)
    start = time.perf_counter()
    fmt.pack(fit(fmt, weight), shape)
    return time.perf_counter() - start


def _sample(shape: tuple[int, int], device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
