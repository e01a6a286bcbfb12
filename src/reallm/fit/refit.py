"""Float parts of a format refitted while its codes stay, and codes and float parts in turn.

With the codes fixed the decoded matrix of most formats is linear in a codebook, a table or the scales, so that the best
ones are a least-squares problem. Its normal equations need nothing but the decoder and its transpose, which autograd
has for every format. Refitting all codewords at once after each assignment is AQLM's (Egiazarian et al.,
arXiv:2401.06118); entries that move while codes stay are the codebook of ClusComp (arXiv:2503.13089).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.fit.dispatch import decode_unpacked, matrix_shape
from reallm.fit.feedback import Coder, coordinate_descent_pass, sum_code_rows
from reallm.fit.objective import Objective
from reallm.formats import Unpacked, WeightFormat, map_tensors
from reallm.kernels import average, total

_STEPS = 30
# Steps end when the squared gradient, in units of the preconditioner, has fallen by this factor.
_SOLVED = 1e-8
# A round that gains less does not pay for the next one.
_LEAST_GAIN = 5e-3


def refit(
    fmt: WeightFormat,
    unpacked: Unpacked,
    weight: Float[Tensor, "out in"],
    objective: Objective,
    names: Sequence[str],
    steps: int = _STEPS,
) -> Unpacked:
    """`unpacked` with the float parts `names` at their best for the codes, as stored; never worse by the objective.

    `names` are fields of the parts, those of an inner format as "base.codebook". The decoded matrix must be linear
    in them together (or affine, beside a residual). At most `steps` of conjugate gradients from the present
    values, in float64: sums of gradients by code come out the same in every run then. Parts are returned as they are
    where what the file would keep of the solution has no smaller error.
    """
    with torch.enable_grad():
        moved = _solve(fmt, unpacked, weight, objective, names, steps)
    shape = matrix_shape(weight)
    stored = fmt.unpack(fmt.pack(moved, shape), shape)
    kept = _replace_tensors(unpacked, {name: _get_tensor(stored, name) for name in names})
    errors = [objective.error(weight, decode_unpacked(fmt, some, weight)) for some in (kept, unpacked)]
    return kept if errors[0] < errors[1] else unpacked


def alternate(
    fmt: WeightFormat,
    unpacked: Unpacked,
    weight: Float[Tensor, "out in"],
    objective: Objective,
    names: Sequence[Sequence[str]],
    make_coder: Callable[[Unpacked], Coder],
    rounds: int,
) -> Unpacked:
    """Refits of each group of `names` and new codes in turn, from codes that are there; the error never rises.

    New codes come from a sweep over the blocks if the objective has a hessian, else from rounding, and each row takes
    those that serve it better. Ends with a refit, after `rounds` or when one gains little. Sweeps do more than
    codes found again by feedback, which are often worse than the refitted old ones
    (docs/experiments/codebook-refits.md).
    """
    error = None
    for number in range(rounds + 1):
        for group in names:
            unpacked = refit(fmt, unpacked, weight, objective, group)
        approximation = decode_unpacked(fmt, unpacked, weight)
        before, error = error, objective.error(weight, approximation)
        if number == rounds or (before is not None and error > before * (1 - _LEAST_GAIN)):
            break
        if objective.hessian is None:
            codes = make_coder(unpacked).encode(weight, 0, objective.importance)[0]
            unpacked = _better_rows(fmt, weight, objective, unpacked, dataclasses.replace(unpacked, codes=codes))
        else:
            codes, _ = coordinate_descent_pass(
                weight, make_coder(unpacked), objective.hessian, unpacked.codes, approximation
            )
            unpacked = dataclasses.replace(unpacked, codes=codes)
    return unpacked


def _better_rows(
    fmt: WeightFormat, weight: Float[Tensor, "out in"], objective: Objective, one: Unpacked, other: Unpacked
) -> Unpacked:
    """`one` with the codes of `other` in those rows of codes where they have the smaller error."""
    errors = [objective.row_errors(weight, decode_unpacked(fmt, unpacked, weight)) for unpacked in (one, other)]
    better = sum_code_rows(errors[0] - errors[1], len(one.codes)) > 0
    return dataclasses.replace(one, codes=torch.where(better[:, None], other.codes, one.codes))


def _solve(
    fmt: WeightFormat, unpacked: Unpacked, weight: Tensor, objective: Objective, names: Sequence[str], steps: int
) -> Unpacked:
    """Preconditioned conjugate gradients on Lᵀ H L x = Lᵀ H (weight - decoded), L the decoder's linear part."""
    shape = matrix_shape(weight)
    exact = map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, unpacked)
    leaves = [_get_tensor(exact, name).requires_grad_() for name in names]
    image = fmt.decode(exact, shape)
    seed = torch.zeros_like(image, requires_grad=True)
    pulled = torch.autograd.grad(image, leaves, seed, create_graph=True)

    def forward(values: list[Tensor]) -> Tensor:
        return torch.autograd.grad(pulled, seed, values, retain_graph=True)[0]

    def backward(errors: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(image, leaves, errors, retain_graph=True))

    importance = objective.importance.double()
    weighted = (lambda d: d * importance) if objective.hessian is None else _hessian_product(objective.hessian)
    scale = [_positive(d) for d in backward(importance * forward([torch.ones_like(leaf) for leaf in leaves]))]
    residual = backward(weighted(weight - image.detach()))
    found = [torch.zeros_like(leaf) for leaf in leaves]
    direction = preconditioned = [r / s for r, s in zip(residual, scale, strict=True)]
    size = first = _dot(residual, preconditioned)
    for _ in range(steps):
        if not size > first * _SOLVED:
            break
        step = backward(weighted(forward(direction)))
        length = size / _dot(direction, step).clamp(min=torch.finfo(torch.float64).tiny)
        found = [f + length * d for f, d in zip(found, direction, strict=True)]
        residual = [r - length * s for r, s in zip(residual, step, strict=True)]
        preconditioned = [r / s for r, s in zip(residual, scale, strict=True)]
        before, size = size, _dot(residual, preconditioned)
        direction = [p + size / before * d for p, d in zip(preconditioned, direction, strict=True)]
    moved = {n: (leaf.detach() + f).float() for n, leaf, f in zip(names, leaves, found, strict=True)}
    return _replace_tensors(unpacked, moved)


def _hessian_product(hessian: Tensor) -> Callable[[Tensor], Tensor]:
    """D -> D H in float32: an error of 1e-7 only slows the steps, and many GPUs are slow in float64."""
    return lambda errors: (errors.float() @ hessian).double()


def _positive(diagonal: Tensor) -> Tensor:
    """Row sums of the normal matrix as its diagonal: the same up to a factor where all terms have one sign.

    Entries that no code uses have 0 there, and no gradient either.
    """
    return torch.where(diagonal > average(diagonal.abs()) * 1e-6, diagonal, average(diagonal.abs()).clamp(min=1e-30))


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([total(a * b) for a, b in zip(one, other, strict=True)]).sum()


def _get_tensor(unpacked: Unpacked, name: str) -> Tensor:
    """A part by its name, "base.codebook" for one of an inner format."""
    for step in name.split("."):
        unpacked = getattr(unpacked, step)
    return unpacked


def _replace_tensors(unpacked: Unpacked, values: dict[str, Tensor]) -> Unpacked:
    """Parts with some replaced, by the names of `_get_tensor`."""
    for name, value in values.items():
        head, _, rest = name.partition(".")
        unpacked = dataclasses.replace(
            unpacked, **{head: _replace_tensors(getattr(unpacked, head), {rest: value}) if rest else value}
        )
    return unpacked
