"""What a job will cost, before any work: bytes, seconds, memory, disk."""

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
from reallm.pipeline.compress_settings import Settings, for_analysis
from reallm.pipeline.fit_job import calibration_dtype
from reallm.pipeline.job import Job
from reallm.pipeline.teacher_outputs import teacher_layouts
from reallm.source.model_source import Source
from reallm.source.walk import Walk, block_index

# Beside the largest matrix in float32 a fit holds its decoding, the error and a few chunks.
COPIES_WHILE_FITTING = 6
# From 32,768 vectors on k-means works on a sample: both sizes lie there, so that the slope is the right one.
_SMALL, _LARGE = (64, 1024), (96, 1024)
# Of all samples together, about; then formats that fit in the same way count as one. A plan may hold 24 rates of
# entropy-coded ones, and each takes 6 to 12 s with a residual.
_SAMPLE_SECONDS = 4.0
# Sizes on the way to the samples: a format that takes this long (trellis codes of 16 bits: 1 ms a weight on a CPU) is
# not tried on larger ones.
_FIRST, _LONG = ((16, 16), (16, 64), (16, 256)), 0.3
# Fields in which formats that fit in the same way may differ.
_NOT_IN_TIMING_KEY = ("bits", "largest", "group_size", "scales", "sides", "seed")
# Fits of the base beside a residual of rank 1: 3 to 5 on SmolLM2's embedding. Samples are noise, which has no mean to
# be found at once and takes 7 to 10.
_RANK_ONE_ROUNDS = 4
# With calibration scales and codebooks are refitted in float64 (18 copies of 3,072 x 8,192 weights were seen), or a
# hessian is factored in it.
_COPIES_WHILE_REFITTING = 20
_COPIES_OF_HESSIAN = 9
# Numbers of the widest input a token that a pass through a block holds, in the stream's dtype and in float32.
_ACTIVATIONS = 4
# Of a run with a size: all that were tried and what they took, a new file of them beside the old one.
_MAX_PLANS = 24
# Formats of all matrices stand in the state, twice while it is written, in the plan and, with shapes, in the config.
_TEXTS, _CONFIG_BYTES = 6, 8_192
# Of gradients: attention, norms, the softmax over the vocabulary and squares take as long as products of matrices.
_NOT_PRODUCTS = 2.5
_OF_FACTORS = 20  # products of a cube of a matrix's inputs in its numbers: three factorisations and what they are for
_LIBRARY_BYTES = 600_000_000  # Python, torch and transformers once imported


@dataclass(frozen=True)
class Estimate:
    """What a job will cost, before any work: exact bytes of tensors, the rest by measurement on samples."""

    compressed_bytes: int
    unquantized_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


def estimate(job: Job) -> Estimate:
    """Cost of a job: timed on small samples of the formats in the plan, some seconds in all."""
    compressed = job.plan.nbytes
    shapes = job.source.shapes()
    unquantized = sum(math.prod(shapes[name]) for name in job.unquantized) * job.source.dtype.itemsize
    return Estimate(
        compressed_bytes=compressed,
        unquantized_bytes=unquantized,
        bits_per_weight=job.plan.block_bits,
        seconds=_predicted_seconds(job) + _calibration_seconds(job) + _generation_seconds(job) + analysis_seconds(job),
        peak_memory_bytes=_LIBRARY_BYTES + job.source.loaded_nbytes + _working_bytes(job),
        disk_bytes=work_bytes(job),
    )


def work_bytes(job: Job) -> int:
    """Bytes of the work folder at its fullest: finished matrices, the artifact that is put together of them, and more.

    More is what the original was asked: text that it wrote, and gradients, 4 bytes per token and matrix. No tensor counts
    as entropy-coded: what coding saves is what a size gives to other matrices on the way.
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
    except OSError:  # it is written somewhere to be measured; where nothing can be, the run says so in a moment
        tokenizer = 0
    return files + predict_nbytes(artifact_tensors(job)) + tokenizer + _TEXTS * len(specs) + _CONFIG_BYTES + notes


def _predicted_seconds(job: Job) -> float:
    """Time the formats on samples, take a fixed and a per-weight cost from them, sum over the plan."""
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
    """(seconds per matrix, seconds per weight) by format, each with the largest matrix that gets it.

    The largest first, while `_SAMPLE_SECONDS` last; one of those that fit in the same way is timed whatever it takes.
    """
    costs: dict[WeightFormat, tuple[float, float]] = {}
    alike: dict[str, tuple[float, float]] = {}
    begun = time.perf_counter()
    for fmt, planned in sorted(largest.items(), key=lambda row: -row[1].matrix.weights):
        timing_key = json.dumps(_timing_key(to_spec(fmt)))
        if timing_key not in alike or time.perf_counter() - begun < _SAMPLE_SECONDS:
            alike[timing_key] = _measure_cost(fmt, planned, device)
        costs[fmt] = alike[timing_key]
    return costs


def _timing_key(spec: Any) -> Any:
    return (
        {key: _timing_key(value) for key, value in spec.items() if key not in _NOT_IN_TIMING_KEY}
        if isinstance(spec, dict)
        else spec
    )


def _measure_cost(fmt: WeightFormat, largest: PlanEntry, device: str) -> tuple[float, float]:
    """Of a sample no larger than the largest matrix, so that no estimate takes longer than the job."""
    if largest.matrix.weights > math.prod(_LARGE):
        return fitting_cost(fmt, device)
    return 0.0, _timed_fit(largest.fmt, largest.matrix.shape, device) / largest.matrix.weights


def _sample_decoders(formats: Iterable[WeightFormat], device: str) -> tuple[dict[str, Tensors], float]:
    """(a decoder for every name that formats share, seconds of their training), trained on the larger sample."""
    shared_decoders: dict[str, Tensors] = {}
    begun = time.perf_counter()
    for fmt in formats:
        for name in set(fmt.shared_decoders()) - set(shared_decoders):
            sample = _sample(_LARGE, device)
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
    """Memory of the fits, and with calibration of what surrounds them: the most of any moment of a run."""
    alone = (
        4 * COPIES_WHILE_FITTING * max((math.prod(matrix.shape) for matrix, _ in job.compressed_matrices), default=0)
    )
    if not job.settings.calibration:
        return alone
    whole = job.source.total_parameters * calibration_dtype(job).itemsize if _requires_full_load(job) else 0
    return max(
        alone + _end_loss_bytes(job), whole + _end_loss_bytes(job), _end_loss_bytes(job) + _calibration_bytes(job)
    )


def _requires_full_load(job: Job) -> bool:
    """Whether the whole original is in memory once: for text of its own, gradients, or a budget's analysis."""
    uses_analysis = job.forecast is not None and (job.forecast.calibrated or job.forecast.to_analyse)
    return uses_analysis or job.settings.objective != OUTPUTS or SELF in job.settings.calibration


def _end_loss_bytes(job: Job) -> int:
    """Return the bytes of the weights of tokens that guided fits keep: one float32 per token and matrix of a block."""
    in_blocks = sum(matrix.block is not None for matrix, _ in job.compressed_matrices)
    return 4 * _calibration_tokens(job) * in_blocks if job.guided else 0


def _calibration_bytes(job: Job) -> int:
    """Memory on the way through the blocks: hidden states, other arguments of blocks that are made of the tokens, what
    lies outside the blocks, and the largest block.

    With a block go the second moments of its inputs, and a pass of tokens or one fit. Nothing of it is ever on disk.
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
    return 4 * max(_COPIES_WHILE_REFITTING * weights, _COPIES_OF_HESSIAN * hessian + COPIES_WHILE_FITTING * weights)


def _calibration_tokens(job: Job) -> int:
    return job.settings.calibration_windows * job.settings.calibration_context if job.settings.calibration else 0


def _calibration_seconds(job: Job) -> float:
    """Two passes of all tokens through every block and the sums of their inputs, at the speed of one product.

    The end-to-end loss takes three more through the whole model: one forward and, twice as long, one back.
    """
    if not job.settings.calibration:
        return 0.0
    device = job.settings.device
    per_operation = _seconds_an_operation(calibration_dtype(job), device)
    in_blocks = sum(math.prod(matrix.shape) for matrix in job.walk.matrices if matrix.block is not None)
    sums = sum(matrix.shape[1] ** 2 for matrix, _ in job.compressed_matrices if matrix.block is not None)
    seconds = 2 * (2 * in_blocks + sums) * per_operation
    if job.settings.objective != OUTPUTS:
        seconds += _gradient_seconds(job.source, device)
    return _calibration_tokens(job) * seconds


def _gradient_seconds(source: Source, device: str) -> float:
    """Of a token on its way through the whole model and back to the inputs of every matrix."""
    an_operation = _seconds_an_operation(gradient_dtype(source, device), device, fast=True)
    return _NOT_PRODUCTS * 4 * source.total_parameters * an_operation


def analysis_seconds(job: Job) -> float:
    """What a run takes to measure losses first; 0 where it need not."""
    if job.forecast is None or not job.forecast.to_analyse:
        return 0.0
    return seconds_of_analysis(job.source, job.walk, job.settings)


def seconds_of_analysis(source: Source, walked: Walk, settings: Settings) -> float:
    """Gradients of a few windows, second moments of what every matrix is fed, and their factors."""
    few, device = for_analysis(settings), settings.device
    tokens = few.calibration_windows * few.calibration_context
    columns = [matrix.shape[1] for matrix in walked.matrices if matrix.block is not None and matrix.expert is None]
    second_moments = sum(2 * tokens * width**2 for width in columns) * _seconds_an_operation(
        torch.float32, device, True
    )
    factors = sum(_OF_FACTORS * width**3 for width in columns) * _seconds_an_operation(torch.float32, "cpu")
    return tokens * _gradient_seconds(source, device) + second_moments + factors


def _seconds_an_operation(dtype: torch.dtype, device: str, fast: bool = False) -> float:
    """Of a product of two matrices; `fast`: as gradients are computed. On a CPU by its own time: it may be busy."""
    clock, shared = time.perf_counter, 1
    if torch.device(device).type == "cpu":
        clock, shared = time.process_time, torch.get_num_threads()
    sample, seconds = torch.randn(1024, 1024, dtype=dtype).to(device), []
    with fast_products(device) if fast else contextlib.nullcontext():
        for _ in range(3):  # the first loads what it needs
            begun = clock()
            (sample @ sample).sum().item()
            seconds.append((clock() - begun) / shared)
    return min(seconds) / (2 * 1024**3)


def _generation_seconds(job: Job) -> float:
    """Text that the model writes itself: a step for every token of a window, all windows of a batch at once.

    A step takes what the blocks of a sample net of 64 numbers take, all of it overhead, and a product with every
    weight and, on average, with half the numbers that a window's cache holds in the end (there and back).
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
    a_weight = (time.perf_counter() - begun) / weights.numel()
    overhead = one + (three - one) / 2 * (config.num_hidden_layers - 1)
    steps = math.ceil(job.settings.calibration_windows / GENERATION_BATCH) * job.settings.calibration_context
    return steps * (max(one, overhead) + a_weight * (job.source.total_parameters + 2 * cache))


def fitting_cost(fmt: WeightFormat, device: str) -> tuple[float, float]:
    """(seconds per matrix, seconds per weight) of fitting."""
    before = None
    for shape in _FIRST:
        try:
            fmt.check(shape)
        except FormatError:  # a residual of more ranks, a group of more columns
            continue
        seconds = _timed_fit(fmt, shape, device)
        if before is not None and seconds > _LONG and seconds > 2 * before[0]:  # not what every fit takes to begin
            slope = (seconds - before[0]) / (math.prod(shape) - before[1])
            return max(0.0, seconds - slope * math.prod(shape)), slope
        before = seconds, math.prod(shape)
    times = [_timed_fit(fmt, shape, device) for shape in (_SMALL, _LARGE)]
    slope = max(0.0, (times[1] - times[0]) / (math.prod(_LARGE) - math.prod(_SMALL)))
    return max(0.0, times[0] - slope * math.prod(_SMALL)), slope


def _timed_fit(fmt: WeightFormat, shape: tuple[int, int], device: str) -> float:
    weight = _sample(shape, device)
    start = time.perf_counter()
    fmt.pack(fit(fmt, weight), shape)
    return time.perf_counter() - start


def _sample(shape: tuple[int, int], device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
