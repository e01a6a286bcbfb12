"""The pipeline: source → walk → plan → fit → write.

Finished matrices are kept in a work folder beside the output as they come, so that an interrupted run goes
on from there; the output folder appears by one rename when everything is in it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.allocate import MatrixInfo, Plan, Planned, load_recipe, plan_for_bits, plan_from_recipe, recipe_of_plan
from reallm.allocate.recipe import DEFAULT_EMBEDDING, FormatSpec, dump_recipe
from reallm.artifact import (
    Manifest,
    StoredMatrix,
    check_finished,
    check_output,
    finished_file,
    opened,
    save_tensors,
    work_folder,
    write_shards,
)
from reallm.errors import FormatError, RecipeError, SourceError
from reallm.fit import Objective, fit, gaussian_error
from reallm.formats import WeightFormat, to_spec
from reallm.formats.waist import inner, under
from reallm.model import Matrix, Source, Walk, load_tokenizer, open_source, read_matrix, walk
from reallm.model.calibration import SELF, windows_of_files, windows_written
from reallm.model.gradients import fisher, token_weights
from reallm.model.stream import Stream
from reallm.model.text import load_text, text_sha256

OUTPUTS, GUIDED, FISHER = "outputs", "guided", "fisher"
OBJECTIVES = {
    OUTPUTS: "squared error of every matrix's outputs",
    GUIDED: "the same, tokens weighted by the gradient of the end loss",
    FISHER: "squared error of the weights, each weighted by its Fisher information",
}
Progress = Callable[[str, int, int], None]  # (matrix just finished, weights done, weights in all)

PLAN_FILE = "plan.yaml"
# Beside the largest matrix in float32 a fit holds its decoding, the error and a few chunks.
_COPIES_WHILE_FITTING = 6
_SEEDS = 1 << 63  # torch's generators take no larger seed
_LARGEST_WEIGHT = 1e15  # squares of larger ones, summed over a matrix, overflow float32
_STREAM_IN_FLOAT32 = 2_000_000_000  # parameters
_LIBRARY_BYTES = 600_000_000  # Python, torch and transformers once imported


@dataclass(frozen=True)
class Settings:
    """What the user chose. Exactly one of `bits` and `recipe` is given."""

    bits: float | int | None = None
    recipe: str | None = None
    rank: int | None = None
    seed: int = 0
    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embedding: FormatSpec | None = None  # None: the recipe's, or 8 bits
    head: FormatSpec | None = None
    calibration: tuple[str, ...] = ()  # text files, or "self"; without any, fits know the weights alone
    calibration_windows: int = 128
    calibration_context: int = 2048
    objective: str = OUTPUTS  # what calibration makes of its inputs: OBJECTIVES


@dataclass(frozen=True)
class Job:
    """A model and what will become of it; nothing is computed or written yet."""

    source: Source
    walk: Walk
    plan: Plan
    settings: Settings

    @property
    def compressed(self) -> list[tuple[Matrix, Planned]]:
        """The matrices to compress, in model order, with their formats."""
        planned = {entry.matrix.name: entry for entry in self.plan.entries}
        return [(matrix, planned[matrix.name]) for matrix in self.walk.matrices if matrix.name in planned]

    @property
    def kept(self) -> dict[str, str]:
        """Tensors that stay as they are, with the reason."""
        reasons = {kept.name: kept.reason for kept in self.walk.kept}
        planned = {entry.matrix.name for entry in self.plan.entries}
        left_out = {m.parameter: "left out by the plan" for m in self.walk.matrices if m.name not in planned}
        return reasons | left_out

    def manifest(self, fingerprint: str) -> Manifest:
        """What the loader must know."""
        matrices = tuple(StoredMatrix(m.name, p.fmt, m.shape, m.kind) for m, p in self.compressed)
        return Manifest(matrices, provenance(self, fingerprint))


@dataclass(frozen=True)
class Estimate:
    """What a job will cost, before any work: exact bytes of tensors, the rest by measurement on samples."""

    compressed_bytes: int
    kept_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


def prepare(model: str | Path, settings: Settings) -> Job:
    """Open the model and decide every matrix's format.

    Errors: SourceError, RecipeError or FormatError, before anything is written.
    """
    if (settings.bits is None) == (settings.recipe is None):
        raise RecipeError("give either --bits or --recipe" + (", not both" if settings.recipe else ""))
    _check_calibration(settings)
    if settings.rank is not None and settings.rank < 0:
        raise RecipeError(f"--rank {settings.rank} is negative; 0 means no residual")
    _check_device(settings.device)
    source = open_source(model)
    walked = walk(source.skeleton)
    chosen = [_info(matrix) for matrix in _selected(walked.matrices, settings)]
    plan = _plan(chosen, [_info(matrix) for matrix in walked.matrices], settings)
    _check_plan(plan, walked)
    return Job(source, walked, plan, settings)


def estimate(job: Job) -> Estimate:
    """Cost of a job: timed on small samples of every format in the plan, some seconds in all."""
    compressed = sum(planned.nbytes for _, planned in job.compressed)
    shapes = job.source.shapes()
    kept = sum(_numel(shapes[name]) for name in job.kept) * job.source.dtype.itemsize
    largest = max((planned.matrix.weights for _, planned in job.compressed), default=0)
    return Estimate(
        compressed_bytes=compressed,
        kept_bytes=kept,
        bits_per_weight=job.plan.block_bits,
        seconds=_predicted_seconds(job) + _stream_seconds(job),
        peak_memory_bytes=(
            _LIBRARY_BYTES + job.source.loaded_nbytes + _COPIES_WHILE_FITTING * 4 * largest + _stream_bytes(job)
        ),
        # The finished matrices wait in the work folder while the shards are written.
        disk_bytes=2 * compressed + kept,
    )


def run(job: Job, out: Path, resume: bool = False, progress: Progress | None = None) -> None:
    """Compress every matrix of the job and put the artifact at `out`.

    With `resume`, matrices finished by an interrupted run are taken over. The work folder `<out>.work` is
    removed at the end.

    Errors: ArtifactError if `out` exists, or a work folder does and `resume` is not set; RecipeError if the
    interrupted run had another plan; SourceError for weights that are not finite.
    """
    out = Path(out)
    check_output(out, resume)
    fingerprint = job.source.fingerprint()
    work = work_folder(out)
    with opened(work, _state(job, fingerprint)):
        _check_kept(job)
        _fit_all(job, work, progress)
        staging = work / "artifact"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_shards(_tensors(job, work), staging)
        _write_companions(job, fingerprint, staging)
        os.rename(staging, out)
    shutil.rmtree(work, ignore_errors=True)


def compress(model: str | Path, out: str | Path, *, resume: bool = False, **settings: Any) -> None:
    """Compress `model` into the folder `out`: `prepare` and `run` in one call; settings as in `Settings`."""
    run(prepare(model, Settings(**settings)), Path(out), resume)


def provenance(job: Job, fingerprint: str) -> dict[str, Any]:
    """Where the artifact comes from; no time and no path, so that equal runs give equal bytes."""
    import reallm

    return {
        "reallm": reallm.__version__,
        "source": Path(job.source.label).name,
        "source_sha256": fingerprint,
        "recipe": job.plan.recipe,
        "seed": job.settings.seed,
        "device": torch.device(job.settings.device).type,
        "calibration": calibration_of(job.settings),
        "torch": torch.__version__,
    }


def calibration_of(settings: Settings) -> dict[str, Any] | None:
    """Text, windows and context of the calibration as provenance keeps them; None without."""
    if not settings.calibration:
        return None
    texts = [SELF if path == SELF else text_sha256(path) for path in settings.calibration]
    return {
        "texts": texts,
        "windows": settings.calibration_windows,
        "context": settings.calibration_context,
        "objective": settings.objective,
    }


def _plan(infos: Sequence[MatrixInfo], model: Sequence[MatrixInfo], settings: Settings) -> Plan:
    """The plan for `infos`, which are all or some of the model's matrices."""
    ends = {"embedding": settings.embedding, "head": settings.head}
    chosen = {kind: spec for kind, spec in ends.items() if spec is not None}
    if settings.bits is not None:
        specs = dict.fromkeys(ends, DEFAULT_EMBEDDING) | chosen
        return plan_for_bits(float(settings.bits), infos, gaussian_error, settings.rank, **specs)
    assert settings.recipe is not None
    recipe = load_recipe(settings.recipe).model_copy(update=chosen)
    return plan_from_recipe(recipe, infos, settings.rank, model)


def _info(matrix: Matrix) -> MatrixInfo:
    return MatrixInfo(matrix.name, matrix.shape, matrix.role, matrix.kind, matrix.block)


def _selected(matrices: Sequence[Matrix], settings: Settings) -> list[Matrix]:
    """Matrices that --include and --exclude leave.

    Errors: RecipeError for a pattern that fits nothing.
    """
    names = [matrix.name for matrix in matrices]
    for option, patterns in (("--include", settings.include), ("--exclude", settings.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{option} {pattern!r} fits no matrix (one is {names[0] if names else 'none'})")

    def wanted(name: str) -> bool:
        included = not settings.include or any(fnmatch.fnmatchcase(name, p) for p in settings.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in settings.exclude)

    return [matrix for matrix in matrices if wanted(matrix.name)]


def _check_plan(plan: Plan, walked: Walk) -> None:
    """Errors: RecipeError if nothing would be compressed, or only some experts of one tensor."""
    if not plan.entries:
        raise RecipeError("the plan compresses nothing; loosen --include/--exclude, or keep less")
    planned = {entry.matrix.name for entry in plan.entries}
    experts: dict[str, list[bool]] = defaultdict(list)
    for matrix in walked.matrices:
        if matrix.expert is not None:
            experts[matrix.parameter].append(matrix.name in planned)
    for parameter, chosen in experts.items():
        if any(chosen) and not all(chosen):
            raise RecipeError(
                f"{parameter}: {sum(chosen)} of {len(chosen)} experts would be compressed, but they are one tensor; "
                f"take all or none ({parameter}.*)"
            )


def _check_calibration(settings: Settings) -> None:
    """Errors: RecipeError or TextError for a calibration that cannot be."""
    if settings.objective not in OBJECTIVES:
        raise RecipeError(f"--objective {settings.objective!r} is not one of {', '.join(OBJECTIVES)}")
    if settings.objective != OUTPUTS and not settings.calibration:
        raise RecipeError(f"--objective {settings.objective} needs text: give --calibration FILE or self")
    if SELF in settings.calibration and len(settings.calibration) > 1:
        raise RecipeError("--calibration self cannot be mixed with files")
    for option in ("windows", "context"):
        value, least = getattr(settings, f"calibration_{option}"), {"windows": 1, "context": 2}[option]
        if value < least:
            raise RecipeError(f"--calibration-{option} {value} is below {least}")
    for path in settings.calibration:
        if path != SELF:
            load_text(path)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"--device {device!r} is not available ({reason}); use cpu") from error


def _state(job: Job, fingerprint: str) -> dict[str, Any]:
    """What must not change between an interrupted run and its resumption."""
    return {
        "source": fingerprint,
        "seed": job.settings.seed,
        "device": job.settings.device,
        "calibration": calibration_of(job.settings),
        "plan": {m.name: to_spec(p.fmt) for m, p in job.compressed},
    }


def _fit_all(job: Job, work: Path, progress: Progress | None) -> None:
    done = _counted(job, progress)
    if job.settings.calibration:
        _fit_along_the_stream(job, work, done)
    else:
        for matrix, planned in job.compressed:
            _fit_or_keep(job, work, matrix, planned.fmt, None)
            done(matrix)


def _fit_along_the_stream(job: Job, work: Path, done: Callable[[Matrix], None]) -> None:
    """Block by block: sum up its inputs, fit it, and let the compressed block carry the inputs on.

    Embedding and head come first, by their weights alone: the stream begins behind the compressed embedding.
    """
    by_block: dict[int | None, list[tuple[Matrix, Planned]]] = defaultdict(list)
    for matrix, planned in job.compressed:
        by_block[matrix.block].append((matrix, planned))
    with torch.no_grad():
        model = job.source.load(_stream_dtype(job), "cpu").eval()
        windows = _calibration_windows(job, model)
        knowledge = _end_loss(job, model, windows, work)
        for matrix, planned in by_block.pop(None, []):
            _put(model, matrix, planned.fmt, _fit_or_keep(job, work, matrix, planned.fmt, None))
            done(matrix)
        stream = Stream(model, windows, job.settings.device)
        for number in range(len(stream.blocks)):
            of_block = by_block.pop(number, [])
            open_ones = [matrix for matrix, _ in of_block if not finished_file(work, matrix.name).is_file()]
            objectives = knowledge.objectives(stream, open_ones)
            for matrix, planned in of_block:
                objective = objectives.get(matrix.name)
                _put(model, matrix, planned.fmt, _fit_or_keep(job, work, matrix, planned.fmt, objective))
                done(matrix)
            stream.advance()
        assert not by_block, f"blocks {list(by_block)} are not decoder blocks"


def _fit_or_keep(job: Job, work: Path, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> Path:
    """The file of a fitted matrix, made now unless it is there already."""
    path = finished_file(work, matrix.name)
    if path.is_file():
        check_finished(path, under(matrix.name, fmt.layout(matrix.shape)))
    else:
        save_tensors(under(matrix.name, _compressed(job, matrix, fmt, objective)), path)
    return path


def _counted(job: Job, progress: Progress | None) -> Callable[[Matrix], None]:
    """Tells `progress` of each matrix that is done, and of the weights so far."""
    total = sum(_numel(matrix.shape) for matrix, _ in job.compressed)
    so_far = 0

    def done(matrix: Matrix) -> None:
        nonlocal so_far
        so_far += _numel(matrix.shape)
        if progress:
            progress(matrix.name, so_far, total)

    return done


def _calibration_windows(job: Job, model: torch.nn.Module) -> Tensor:
    settings, tokenizer = job.settings, load_tokenizer(job.source.label)
    limit = getattr(job.source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context = min(settings.calibration_context, limit or settings.calibration_context)
    if settings.calibration == (SELF,):
        return windows_written(model, tokenizer, settings.calibration_windows, context, settings.seed, settings.device)
    return windows_of_files(settings.calibration, tokenizer, settings.calibration_windows, context)


def _stream_dtype(job: Job) -> torch.dtype:
    """float32 for all that a workstation holds twice; 16 bits beyond."""
    return torch.float32 if job.source.total_parameters < _STREAM_IN_FLOAT32 else torch.bfloat16


def _put(model: torch.nn.Module, matrix: Matrix, fmt: WeightFormat, file: Path) -> None:
    """Replace a matrix of the dense model by its decoded self."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
    decoded = fmt.decode(fmt.unpack(inner(matrix.name, tensors), matrix.shape), matrix.shape)
    target = model.get_parameter(matrix.parameter)
    target = target if matrix.expert is None else target[matrix.expert]
    target.copy_(decoded.T if matrix.transposed else decoded)


def _compressed(job: Job, matrix: Matrix, fmt: WeightFormat, objective: Objective | None) -> dict[str, Tensor]:
    weight = read_matrix(job.source, matrix).to(job.settings.device, torch.float32)
    _check_finite(matrix.parameter, weight)
    if (largest := weight.abs().max().item()) > _LARGEST_WEIGHT:
        raise SourceError(f"{matrix.parameter}: a weight of {largest:.3g}; the model is damaged")
    # Every matrix has its own seed, so that none depends on which were fitted before it.
    seed = (job.settings.seed + zlib.crc32(matrix.name.encode())) % _SEEDS
    with torch.no_grad():
        objective = objective.to(weight.device) if objective else Objective.relative_columns(weight)
        return fmt.pack(fit(fmt, weight, objective, seed), matrix.shape)


@dataclass(frozen=True)
class _EndLoss:
    """What the end loss says of tokens (guided) or of weights (fisher); nothing for plain outputs."""

    weights: dict[str, Tensor] | None = None
    fisher: dict[str, Tensor] | None = None

    def objectives(self, stream: Stream, matrices: Sequence[Matrix]) -> dict[str, Objective]:
        """By matrix of the present block; those that calibration tells nothing of, experts too, are left out."""
        if not matrices:
            return {}
        if self.fisher is not None:
            return {m.name: Objective(self.fisher[m.name]) for m in matrices if m.name in self.fisher}
        moments = stream.moments(matrices, self.weights)
        found = {}
        for matrix in matrices:
            if (hessian := moments.of(matrix.name)) is not None:
                try:
                    found[matrix.name] = Objective.of_outputs(hessian)
                except FormatError as error:
                    raise SourceError(f"{matrix.name}: {error}") from error
        return found


def _end_loss(job: Job, model: torch.nn.Module, windows: Tensor, work: Path) -> _EndLoss:
    """Asks the original model, unless everything is fitted already."""
    open_ones = [
        matrix
        for matrix, _ in job.compressed
        if matrix.block is not None and not finished_file(work, matrix.name).is_file()
    ]
    if job.settings.objective == OUTPUTS or not open_ones:
        return _EndLoss()
    if job.settings.objective == GUIDED:
        return _EndLoss(weights=token_weights(model, windows, open_ones, job.settings.device))
    return _EndLoss(fisher=fisher(model, windows, open_ones, job.settings.device))


def _check_kept(job: Job) -> None:
    """Tensors that are kept, before hours of fitting the others."""
    for name in job.kept:
        tensor = job.source.read(name)
        if tensor.is_floating_point():
            _check_finite(name, tensor)


def _check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise SourceError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; the model is damaged")


def _tensors(job: Job, work: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact in the order they are written: matrices, kept tensors, markers."""
    from reallm.model import marker_tensors

    for matrix, _ in job.compressed:
        with safe_open(finished_file(work, matrix.name), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                yield name, file.get_tensor(name)
    for name in job.kept:
        yield name, job.source.read(name)
    yield from marker_tensors([matrix for matrix, _ in job.compressed]).items()


def _write_companions(job: Job, fingerprint: str, folder: Path) -> None:
    """Config, tokenizer, generation settings, and the plan as run."""
    from reallm.model import write_config

    write_config(job.source, job.manifest(fingerprint), folder)
    job.source.save_companions(folder)
    recipe = recipe_of_plan(job.plan, [_info(matrix) for matrix in job.walk.matrices])
    (folder / PLAN_FILE).write_text(dump_recipe(recipe), encoding="utf-8")


def _predicted_seconds(job: Job) -> float:
    """Time each format on two sample sizes, take a fixed and a per-weight cost from them, sum over the plan."""
    formats = {_timed_as(planned.fmt) for _, planned in job.compressed}
    costs = {fmt: _fitting_cost(fmt, job.settings.device) for fmt in formats}
    of_each = [(costs[_timed_as(p.fmt)], p.matrix.weights) for _, p in job.compressed]
    return sum(fixed + slope * weights for (fixed, slope), weights in of_each)


def _timed_as(fmt: WeightFormat) -> WeightFormat:
    """The format that is timed in place of one that differs in the size of its groups only."""
    return dataclasses.replace(fmt, group_size=64) if hasattr(fmt, "group_size") else fmt


def _stream_bytes(job: Job) -> int:
    """Memory of the dense model and of the hidden states of all windows. They are never on disk."""
    if not job.settings.calibration:
        return 0
    hidden = job.source.config.get_text_config(decoder=True).hidden_size
    numbers = job.source.total_parameters + _stream_tokens(job) * hidden
    in_blocks = [matrix.shape for matrix, _ in job.compressed if matrix.block is not None]
    of_end_loss = {
        OUTPUTS: 0,
        GUIDED: 4 * _stream_tokens(job) * len(in_blocks),
        FISHER: 4 * sum(_numel(shape) for shape in in_blocks),
    }
    return numbers * _stream_dtype(job).itemsize + of_end_loss[job.settings.objective]


def _stream_tokens(job: Job) -> int:
    return job.settings.calibration_windows * job.settings.calibration_context if job.settings.calibration else 0


def _stream_seconds(job: Job) -> float:
    """Two passes of all tokens through every block and the sums of their inputs, at the speed of one product.

    The end loss takes three more through the whole model: one forward and, twice as long, one back.
    """
    if not job.settings.calibration:
        return 0.0
    sample = torch.randn(1024, 1024, dtype=_stream_dtype(job)).to(job.settings.device)
    begun = time.perf_counter()
    (sample @ sample).sum().item()
    per_operation = (time.perf_counter() - begun) / (2 * 1024**3)
    in_blocks = sum(_numel(matrix.shape) for matrix in job.walk.matrices if matrix.block is not None)
    sums = sum(matrix.shape[1] ** 2 for matrix, _ in job.compressed if matrix.block is not None)
    of_end_loss = 0 if job.settings.objective == OUTPUTS else 3 * job.source.total_parameters
    operations = 2 * (2 * in_blocks + sums + of_end_loss)
    return _stream_tokens(job) * operations * per_operation


def _fitting_cost(fmt: WeightFormat, device: str) -> tuple[float, float]:
    """(seconds a matrix, seconds a weight) of fitting."""
    # From 32,768 vectors on k-means works on a sample: both sizes lie there, so that the slope is the right one.
    small, large = (64, 1024), (96, 1024)
    times = [_timed_fit(fmt, shape, device) for shape in (small, large)]
    slope = max(0.0, (times[1] - times[0]) / (_numel(large) - _numel(small)))
    return max(0.0, times[0] - slope * _numel(small)), slope


def _timed_fit(fmt: WeightFormat, shape: tuple[int, int], device: str) -> float:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    fmt.pack(fit(fmt, weight), shape)
    return time.perf_counter() - start


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
