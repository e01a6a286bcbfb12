"""Which matrices of a model are looked at, and the look at all of them, one after the other."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.analyze.control import DEFAULT_CODECS
from reallm.analyze.matrix import Structure, analyze_matrix
from reallm.analyze.orders import View
from reallm.errors import FormatError, RecipeError
from reallm.fit.quality import gaussian
from reallm.formats import Shape, WeightFormat, to_spec
from reallm.pipeline.cost import fitting_cost
from reallm.pipeline.load_weight import check_finite
from reallm.source import Matrix, Source, open_source, read_matrix, walk
from reallm.source.devices import check_device

Progress = Callable[[str, int, int], None]  # name of the matrix that is done, weights so far, in all

# Rows of a larger matrix are taken in so many runs: nearly all neighbours in the sample are neighbours in the matrix.
_RUNS = 16
_TIMED = 512
_COPIES = 3  # of every matrix that a codec is fitted to


@dataclass(frozen=True)
class Scope:
    """What of a model is looked at, and how.

    `matrices` are name patterns, `blocks` numbers of decoder blocks (-1 is the last), `roles` as in recipes. Without
    patterns and blocks: the blocks 0, 1, the middle one and the last, embedding and head. `sample`: at most so many
    rows and columns of a matrix.
    """

    matrices: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    every_block: bool = False
    sample: int = 2048
    codecs: tuple[WeightFormat, ...] = DEFAULT_CODECS
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class AnalysisJob:
    """A model and the matrices of it that will be looked at; nothing is read yet."""

    source: Source
    scope: Scope
    matrices: tuple[Matrix, ...]
    of: int  # matrices in the whole model

    @property
    def weights(self) -> int:
        """Weights that will be looked at."""
        return sum(math.prod(self.shape(matrix)) for matrix in self.matrices)

    def shape(self, matrix: Matrix) -> Shape:
        """Shape of what is looked at of a matrix."""
        return sampled_shape(matrix.shape, self.scope.sample)


def prepare(model: str | Path, scope: Scope) -> AnalysisJob:
    """Open a model and choose its matrices.

    Errors: SourceError for a model that cannot be read; RecipeError for a scope that fits nothing; FormatError naming a
    codec that cannot store one of the matrices.
    """
    check_device(scope.device)
    if scope.sample < 2:
        raise RecipeError(f"--sample {scope.sample} is below 2: a matrix needs neighbours")
    source = open_source(model)
    found = walk(source.skeleton).matrices
    work = AnalysisJob(source, scope, tuple(_select_matrices(found, scope)), len(found))
    for matrix in work.matrices:
        for fmt in scope.codecs:
            try:
                fmt.check(work.shape(matrix))
            except FormatError as error:
                raise FormatError(f"{matrix.name}: {error}") from error
    return work


def estimate_seconds(work: AnalysisJob) -> float:
    """About how long `analyze` will take, by timing codecs on samples and one look on noise; some seconds itself."""
    cost = {fmt: fitting_cost(fmt, work.scope.device) for fmt in work.scope.codecs}
    noise = gaussian((_TIMED, _TIMED)).to(work.scope.device)
    begun = time.perf_counter()
    with torch.no_grad():
        analyze_matrix(noise)
    look = (time.perf_counter() - begun) / (2 * _TIMED**3)
    estimated = 0.0
    for shape in map(work.shape, work.matrices):
        estimated += look * sum(side**3 for side in shape)  # eigenvectors for the spectral orders take most of it
        estimated += _COPIES * sum(fixed + slope * math.prod(shape) for fixed, slope in cost.values())
    return estimated


def analyze(work: AnalysisJob, progress: Progress | None = None) -> dict[str, Any]:
    """Look at every matrix of the work; JSON values.

    Errors: SourceError for weights that are not finite.
    """
    rows, done = [], 0
    for matrix in work.matrices:
        row = {"name": matrix.name, "role": matrix.role, "block": matrix.block, "full_shape": list(matrix.shape)}
        weight = sample_matrix(read_matrix(work.source, matrix), work.scope.sample).to(work.scope.device, torch.float32)
        check_finite(matrix.parameter, weight)
        # Every matrix has its own seed, so that none depends on which were looked at before it.
        seed = (work.scope.seed + zlib.crc32(matrix.name.encode())) % (1 << 32)
        if weight.any():  # of nothing there is nothing to say
            with torch.no_grad():
                rows.append(row | structure_to_json(analyze_matrix(weight, work.scope.codecs, seed)))
        done += weight.numel()
        if progress:
            progress(matrix.name, done, work.weights)
    return {
        "model": {"name": Path(work.source.label).name, "sha256": work.source.fingerprint()},
        "scope": dataclasses.asdict(work.scope) | {"codecs": [to_spec(fmt) for fmt in work.scope.codecs]},
        "matrices_in_model": work.of,
        "weights": work.weights,
        "matrices": rows,
    }


def structure_to_json(structure: Structure) -> dict[str, Any]:
    """A structure as JSON values, with what follows from its fields."""
    weights = math.prod(structure.shape)
    views = functools.partial(_views, weights=weights)
    return dataclasses.asdict(structure) | {
        "shape": list(structure.shape),
        "orders": views(structure.orders),
        "noise_orders": views(structure.noise_orders),
        "codecs": [dataclasses.asdict(found) | {"order_bits": found.order_bits} for found in structure.codecs],
    }


def sampled_shape(shape: Shape, most: int) -> Shape:
    """Shape of `sample_matrix`."""
    return min(shape[0], most), min(shape[1], most)


def sample_matrix(weight: Float[Tensor, "out in"], most: int) -> Float[Tensor, "rows columns"]:
    """At most `most` rows and columns, in runs of neighbours spread over the matrix."""
    rows, columns = (_places(size, most) for size in weight.shape)
    return weight[rows][:, columns].contiguous()


def _places(size: int, most: int) -> Tensor:
    if size <= most:
        return torch.arange(size)
    runs = min(_RUNS, most)
    lengths = [most // runs + (run < most % runs) for run in range(runs)]
    starts = [run * (size - lengths[run]) // max(1, runs - 1) for run in range(runs)]
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])


def _views(views: Sequence[View], weights: int) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(view) | {"nbytes": view.nbytes, "net_bits": view.net_bits(views[0], weights)}
        for view in views
    ]


def _select_matrices(matrices: Sequence[Matrix], scope: Scope) -> list[Matrix]:
    """The matrices of a scope; those narrower than 2 are left out, and of experts all but the first if none is named.

    Errors: RecipeError for a pattern, block or role that fits nothing.
    """
    _check(matrices, scope)
    depth = 1 + max((matrix.block for matrix in matrices if matrix.block is not None), default=0)
    if scope.blocks:
        blocks = {number % depth for number in scope.blocks}
    elif scope.every_block or scope.matrices:
        blocks = set(range(depth))
    else:
        blocks = {0, min(1, depth - 1), depth // 2, depth - 1}

    def is_selected(matrix: Matrix) -> bool:
        named = any(fnmatch.fnmatchcase(matrix.name, pattern) for pattern in scope.matrices)
        if (scope.matrices and not named) or (scope.roles and matrix.role not in scope.roles):
            return False
        if matrix.block is None:
            return bool(named or scope.roles or not scope.blocks)
        return matrix.block in blocks and (named or not matrix.expert)

    found = [matrix for matrix in matrices if is_selected(matrix) and min(matrix.shape) > 1]
    if not found:
        raise RecipeError("no matrix has the block, role and name asked for together; ask for less")
    return found


def _check(matrices: Sequence[Matrix], scope: Scope) -> None:
    names = [matrix.name for matrix in matrices]
    for pattern in scope.matrices:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(f"--matrix {pattern!r} fits no matrix (one is {names[0] if names else 'none'})")
    numbers = {matrix.block for matrix in matrices if matrix.block is not None}
    for number in scope.blocks:
        if not -len(numbers) <= number < len(numbers):
            raise RecipeError(f"--block {number} is not in the model, which has {len(numbers)} blocks from 0 on")
    roles = dict.fromkeys(matrix.role for matrix in matrices)
    for role in scope.roles:
        if role not in roles:
            raise RecipeError(f"--role {role!r} is not in the model; its roles: {', '.join(roles)}")
