"""Latents of patches: the linear map that keeps most, and the latents fitted in their own format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import fit, matrix_shape
from reallm.fit.joint_training import FitInput, record_fit_input, train_shared_decoder
from reallm.fit.objective import Objective
from reallm.fit.training import quantize_parameters
from reallm.formats import Unpacked, parameters
from reallm.formats.linear_latents import LinearLatents, UnpackedLinearLatents
from reallm.kernels import average, one_thread

# Share of the mean diagonal that keeps the latents' hessian invertible where columns are dead.
_DAMPING = 1e-6


@fit.register
def fit_linear_latents(
    fmt: LinearLatents, weight: Tensor, objective: Objective | None = None, seed: int = 0, start: Unpacked | None = None
) -> UnpackedLinearLatents:
    """A learned basis are the leading directions of all patches by importance; latents are the best ones for the basis.

    With patches of one row and a hessian H the error of latents Z is tr((W - Z B) H (W - Z B)ᵀ), which is that of the
    best Z and tr((Z - best) B H Bᵀ (Z - best)ᵀ): the base is fitted by that, with feedback. Patches of several rows
    know only importance.
    """
    objective = objective or Objective.plain(weight)
    if fmt.shared:
        record_fit_input(fmt, weight, objective)
        decoder = fmt.decoder({}, weight.device)
    elif isinstance(start, UnpackedLinearLatents):
        decoder = start.decoder
    else:
        decoder = _learn_basis(fmt, [(weight, objective)]) if fmt.transform == "learned" else None
    basis = fmt.basis(decoder, weight)
    if objective.hessian is not None and fmt.patch_rows == 1:
        latents, inner = _latents_by_hessian(fmt, weight, objective, basis)
    else:
        latents, inner = _latents_by_importance(fmt, weight, objective, basis)
    before = start.base if isinstance(start, UnpackedLinearLatents) else None
    return UnpackedLinearLatents(decoder, fit(fmt.base, latents.contiguous(), inner, seed, before))


@train_shared_decoder.register
def train_linear_latents(
    fmt: LinearLatents, fit_inputs: Sequence[FitInput], device: str, seed: int = 0
) -> parameters.UnpackedParameters:
    """The leading directions of the patches of all matrices, each matrix counted alike."""
    pairs = [(fit_input.weight.to(device), fit_input.objective.to(torch.device(device))) for fit_input in fit_inputs]
    return _learn_basis(fmt, pairs)


@one_thread()
def _learn_basis(fmt: LinearLatents, pairs: Sequence[tuple[Tensor, Objective]]) -> parameters.UnpackedParameters:
    covariance = torch.zeros(fmt.patch, fmt.patch, dtype=torch.float64, device=pairs[0][0].device)
    for weight, objective in pairs:
        largest = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        roots = (objective.importance / average(objective.importance)).sqrt().expand_as(weight)
        patches = fmt.patches(weight / largest * roots).flatten(0, 1).double()
        moment = patches.T @ patches
        covariance += moment / moment.diagonal().sum().clamp(min=torch.finfo(torch.float32).tiny)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : fmt.kept].T
    # A direction and its negative are the same; its largest number is positive, so that every machine finds one.
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return quantize_parameters(fmt.decoder_bits, (directions * signs).float().reshape(-1))


def _latents_by_hessian(
    fmt: LinearLatents, weight: Tensor, objective: Objective, basis: Float[Tensor, "kept patch"]
) -> tuple[Tensor, Objective]:
    """(the best latents, the objective of errors in them) for patches of one row."""
    assert objective.hessian is not None
    missing = -weight.shape[1] % fmt.patch_columns
    hessian = torch.nn.functional.pad(objective.hessian, (0, missing, 0, missing)).double()
    count = len(hessian) // fmt.patch_columns
    spread = torch.block_diag(*[basis.double()] * count)  # (latents, in)
    with one_thread():
        left = spread @ hessian
        inner = left @ spread.T
        inner = (inner + inner.T) / 2
        damped = inner.clone()
        damped.diagonal().add_(_DAMPING * inner.diagonal().mean())
        filled = torch.nn.functional.pad(weight, (0, missing)).double()
        latents = torch.linalg.solve(damped, left @ filled.T).T
    return latents.float(), Objective(inner.diagonal()[None].float(), inner.float())


def _latents_by_importance(
    fmt: LinearLatents, weight: Tensor, objective: Objective, basis: Float[Tensor, "kept patch"]
) -> tuple[Tensor, Objective]:
    """(least-squares latents, what errors in them cost if the weights' errors are independent)."""
    inverse = torch.linalg.pinv(basis.double().cpu()).to(basis)
    latents = fmt.patches(weight) @ inverse
    importance = fmt.patches(objective.importance.expand(matrix_shape(weight)))
    costs = importance @ basis.square().T
    if len(objective.importance) == 1 and fmt.patch_rows == 1:
        costs = costs[:1]  # one row for all, for methods that treat rows alike
    return latents.flatten(1), Objective(costs.flatten(1))
