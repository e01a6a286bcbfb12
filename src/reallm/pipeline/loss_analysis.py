"""Compute the numbers that predict losses, in one pass of the original model over the calibration windows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.allocate.format_plan import PER_LAYER
from reallm.allocate.loss_prediction import PLUS_RANK_ONE, ROTATED_WIDTHS, VERSION, Analysis, Measured, spec_key
from reallm.calibrate.loss_gradients import Curvature, EmbeddingHeadCurvature, curvatures
from reallm.checkpoint import encode_untrained_tensors
from reallm.fit import Objective, fit, relative_error
from reallm.fit.feedback import costs_in_feedback
from reallm.fit.low_rank import low_rank
from reallm.fit.scaled import balancing_scales, moving_gain
from reallm.formats import WeightFormat
from reallm.formats.rotated import Rotated
from reallm.formats.scaled import BOTH, INPUTS, OUTPUTS
from reallm.kernels import one_thread
from reallm.kernels.hadamard import rotate_by_products
from reallm.pipeline.calibration_inputs import Progress, phase_callback
from reallm.source import Matrix, Source, Walk, read_matrix

ANALYSIS = "analysis: gradients"  # a phase, counted in windows; the analysis of matrices follows
# Assumed group size of `grouped` losses: consecutive weights of a row that share a scale.
_GROUP = 64
# Rows of an embedding on which scalar codes are measured; spread evenly, because BPE orders tokens by frequency.
_SAMPLE_ROWS = 1024
# Rows of an embedding for the rank-1 term without calibration; by chance it explains 0.3 % with 576 columns.
_RANK_ONE_ROWS = 4096
# Bins per standard deviation in the histogram for `entropy_factor`.
_BINS = 8


def compute_analysis(
    source: Source,
    walk: Walk,
    model: torch.nn.Module,
    windows: Tensor,
    device: str,
    seed: int,
    embedding_candidates: Sequence[WeightFormat] = (),
    origin: dict[str, Any] | None = None,
    guided: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Return the losses of every calibrated matrix at relative error 1, and measured formats of embedding and lm_head.

    `embedding_candidates` are the formats to measure, on a sample of rows. `windows` are token ids (windows, context);
    `origin` is saved with the analysis; `guided`: fits will weight tokens by gradients of the end-to-end loss.
    """
    matrices = {matrix.name: matrix for matrix in walk.matrices}
    blocks = [matrix for matrix in walk.matrices if matrix.kind == "block" and matrix.expert is None]
    numbers: dict[str, dict[str, float]] = {}

    def add_block(name: str, curvature: Curvature) -> None:
        with torch.no_grad():
            weight = read_matrix(source, matrices[name]).to(device, torch.float32)
            numbers[name] = block_losses(weight, curvature, guided)
        if progress:
            progress(f"analysis of {name}", len(numbers), len(blocks))

    passes = phase_callback(progress, ANALYSIS, len(windows))
    embedding_head = curvatures(model, windows, blocks, device, add_block, seed, guided, passes)
    tied = bool(walk.tied_heads)
    measured: dict[str, dict[str, Measured]] = {}
    with torch.no_grad():
        for matrix in walk.matrices:
            if matrix.kind != "block" and matrix.role != PER_LAYER:  # curvatures exclude per-layer embeddings
                weight = read_matrix(source, matrix).to(device, torch.float32)
                residual = rank_one_residual(weight)
                residual_losses = embedding_losses(residual, matrix.kind, embedding_head, tied)
                numbers[matrix.name] = embedding_losses(weight, matrix.kind, embedding_head, tied) | {
                    PLUS_RANK_ONE + kind: number for kind, number in residual_losses.items()
                }
                measured[matrix.name] = {
                    spec_key(fmt): _measure_embedding_format(fmt, weight, residual, seed)
                    for fmt in embedding_candidates
                }
    return Analysis(dict(sorted(numbers.items())), measured, origin or {})


def block_losses(weight: Float[Tensor, "out in"], curvature: Curvature, guided: bool) -> dict[str, float]:
    """Return losses at relative error 1 of a matrix fitted with error feedback; see `allocate.loss_prediction`.

    Feedback as one half of the windows asks for it, its cost on the other half: on its own half a matrix would look
    several times more robust than it is
    (docs/experiments/predicted-loss-and-entropy-coding.md). Scales of rows likewise: of `guided` fits, chosen by
    one half, tried on the other.
    """
    hessians = (curvature.feedback_hessian, curvature.hessian)
    fitted, tested = (Objective.output_error(hessian.to(weight.device)) for hessian in hessians)
    mean = (curvature.hessian.diagonal().mean() / 2).item()
    outputs = curvature.outputs.to(weight.device)
    columns = costs_in_feedback(fitted.hessian, tested.hessian, (1,))[1]
    spread = outputs.sum().item() * weight.square().mean().item() * mean
    numbers = {
        "grouped": mean * _grouped_loss(weight, outputs, columns),
        "stepped": spread * columns.sum().item() * entropy_factor(weight),
    }
    known, cost = curvature.halves.to(weight.device)
    known = known if guided else torch.ones_like(known)
    input_scales = balancing_scales(weight, both=False)[1]
    for scales, prefix, with_rows in ((None, "", OUTPUTS), (input_scales, INPUTS, BOTH)):
        scaled, objectives = weight, (fitted, tested)
        if scales is not None:
            scaled, objectives = weight / scales, tuple(each.divide_columns(scales[0]) for each in objectives)
        costs = costs_in_feedback(*(each.rotate(_rotate).hessian for each in objectives), ROTATED_WIDTHS)
        energy, gain = scaled.square().mean().item(), moving_gain(scaled, known, cost)
        for width, column_costs in costs.items():
            number = outputs.sum().item() * energy * mean * column_costs.sum().item()
            numbers |= {f"{prefix}_rotated_{width}".lstrip("_"): number, f"{with_rows}_rotated_{width}": number * gain}
    return numbers


def embedding_losses(
    weight: Float[Tensor, "out in"], kind: str, embedding_head: EmbeddingHeadCurvature, tied: bool
) -> dict[str, float]:
    """Return losses at relative error 1 of an embedding, an lm_head or a tied matrix, fitted without feedback."""
    factors = []
    if kind == "embedding":
        factors.append((embedding_head.frequencies, embedding_head.inputs))
    if kind == "head" or tied:
        factors.append((embedding_head.outputs, embedding_head.states))
    factors = [(rows.to(weight.device), columns.to(weight.device)) for rows, columns in factors]
    energy = weight.square().mean().item() / 2
    flat = energy * sum((rows.sum() * columns.sum()).item() for rows, columns in factors)
    grouped = sum(_grouped_loss(weight, rows, columns) for rows, columns in factors) / 2
    axes = ("", f"{INPUTS}_", f"{OUTPUTS}_", f"{BOTH}_")  # scales without data have no known gain
    rotated = {f"{axis}rotated_{width}": flat for axis in axes for width in ROTATED_WIDTHS}
    return {"grouped": grouped, "stepped": flat * entropy_factor(weight), **rotated}


def rank_one_residual(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Return the matrix minus its best rank-1 approximation."""
    with one_thread():
        left, right = low_rank(weight, 1)
        return torch.addmm(weight, left, right.T, alpha=-1)


def rank_one_residual_share(source: Source, matrix: Matrix) -> float:
    """Return the share of energy in the rank-1 residual of a matrix, from at most `_RANK_ONE_ROWS` of its rows."""
    sample = _spread_rows(read_matrix(source, matrix), _RANK_ONE_ROWS).to(torch.float32)
    energy = sample.square().sum()
    return (rank_one_residual(sample).square().sum() / energy).item() if energy > 0 else 1.0


def _measure_embedding_format(fmt: WeightFormat, weight: Tensor, left: Tensor, seed: int) -> Measured:
    """`low_rank_plus` by its base on what is `left` beside rank 1: a fit of both would take several of the base."""
    return measure_format(fmt.without_residual(), left if fmt.residual_rank() else weight, seed)


def measure_format(
    fmt: WeightFormat, weight: Float[Tensor, "out in"], seed: int, max_rows: int = _SAMPLE_ROWS
) -> Measured:
    """Fit at most `max_rows` rows without calibration; return their relative error and share after entropy coding."""
    sample = _spread_rows(weight, max_rows)
    shape = (sample.shape[0], sample.shape[1])
    unpacked = fit(fmt, sample, Objective.relative_columns(sample), seed)
    stored, _ = encode_untrained_tensors(fmt, fmt.pack(unpacked, shape))
    share = sum(tensor.nbytes for tensor in stored.values()) / fmt.nbytes(shape)
    return Measured(relative_error(sample, fmt.decode(unpacked, shape)), min(share, 1.0))


def _spread_rows(weight: Float[Tensor, "out in"], max_rows: int) -> Float[Tensor, "rows in"]:
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), max_rows), device=weight.device).round().long()
    return weight[rows].contiguous()


def entropy_factor(weight: Float[Tensor, "out in"]) -> float:
    """Return the variance of Gaussian weights with the same entropy, divided by the variance of these: at most about 1.

    It is 2^(2 (h - h_Gauss)), with the entropy of a histogram of `_BINS` bins per standard deviation.
    """
    size = weight.square().mean().sqrt()
    if size == 0:
        return 1.0
    bins = (weight / size * _BINS).round().clamp(-20 * _BINS, 20 * _BINS).long() + 20 * _BINS
    share = torch.bincount(bins.reshape(-1)).double() / weight.numel()
    share = share[share > 0]
    entropy = -(share * share.log2()).sum().item()
    return 2 ** (2 * (entropy - math.log2(_BINS) - math.log2(2 * math.pi * math.e) / 2))


def _grouped_loss(weight: Tensor, rows: Float[Tensor, " out"], columns: Float[Tensor, " in"]) -> float:
    """Return Σ_ij rows_i · columns_j · variance of the group of weight ij."""
    width = weight.shape[1]
    filled = torch.nn.functional.pad(weight.square(), (0, -width % _GROUP)).view(len(weight), -1, _GROUP)
    sizes = torch.full((filled.shape[1],), float(_GROUP), device=weight.device)
    sizes[-1] = width - _GROUP * (filled.shape[1] - 1)
    variances = filled.sum(2) / sizes
    weights = torch.nn.functional.pad(columns, (0, -width % _GROUP)).view(-1, _GROUP).sum(1)
    return (rows @ (variances @ weights)).item()


def _rotate(rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
    """Rotate rows over the inputs like `rotated`, by matrix products: a quarter of the time of its sums on a CPU."""
    from reallm.formats.uniform import Uniform

    seed = Rotated(Uniform(bits=8)).seed  # equal for every base
    return rotate_by_products(rows, seed)


FILES = "analysis-*.json"


def analysis_file(folder: Path, fingerprint: str, calibration: dict[str, Any] | None, seed: int) -> Path:
    """Return the file for the analysis of a model and a calibration; it does not depend on the budget."""
    key = json.dumps([VERSION, fingerprint, calibration, seed], sort_keys=True)
    return folder / FILES.replace("*", hashlib.sha256(key.encode()).hexdigest()[:16])
