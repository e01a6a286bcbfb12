"""A matrix in other orders and bases: how alike neighbours are there, and what storing the order takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.analyze.locality import Autocorrelation, autocorrelation, magnitudes, predictable_bits
from reallm.analyze.scale_statistics import kurtosis, scale_bits
from reallm.errors import FormatError
from reallm.fit.permutation import find_column_orders, find_row_order
from reallm.formats.dense import Dense
from reallm.formats.low_rank_plus import INT8, LowRankPlus
from reallm.formats.permuted import METHODS, Permuted, order_nbytes
from reallm.formats.rotated import Rotated
from reallm.kernels import one_thread

RAW, SINGULAR, HADAMARD = "raw", "singular", "hadamard"
ORDERS = (RAW, *METHODS, SINGULAR, HADAMARD)


@dataclass(frozen=True)
class Neighbours:
    """How alike neighbours along the rows are (an order of the columns), or along the columns (an order of the rows).

    `sizes` is the autocorrelation of magnitudes, `saves` what linear prediction saves at most in bits per weight, and
    `nbytes` what the order of this side takes in the file.
    """

    alike: Autocorrelation
    sizes: Autocorrelation
    saves: float
    nbytes: int


@dataclass(frozen=True)
class View:
    """A matrix in one order or basis; `basis_nbytes` is what the basis takes beside the orders of the two sides."""

    name: str
    along_rows: Neighbours
    along_columns: Neighbours
    kurtosis: float
    scale_bits: float
    basis_nbytes: int

    @property
    def nbytes(self) -> int:
        """Everything that would be stored."""
        return self.along_rows.nbytes + self.along_columns.nbytes + self.basis_nbytes

    def net_bits(self, raw: View, weights: int) -> float:
        """Bits per weight that the view saves at most over the matrix as it lies, its bytes taken off.

        Scales of rows and columns and prediction along both sides count. An order of one side that does not earn its
        bytes is left out.
        """
        saved = self.scale_bits - raw.scale_bits - 8 * self.basis_nbytes / weights
        for own, before in ((self.along_rows, raw.along_rows), (self.along_columns, raw.along_columns)):
            gain = own.saves - before.saves - 8 * own.nbytes / weights
            saved += max(0.0, gain) if own.nbytes else gain
        return saved


def views(weight: Float[Tensor, "out in"]) -> Iterator[View]:
    """The matrix as it lies; rows and columns sorted by norm, in greedy chains, in the spectral order; in its singular
    basis; and after a Hadamard transform, whose seed is in the format and takes no byte.

    The transform is left out where a side's odd part is too large for it, an order where too many rows would be
    compared.
    """
    rows, columns = weight.shape
    yield describe_view(RAW, weight)
    for method in METHODS:
        fmt = Permuted(base=Dense(), method=method, rows=True)
        try:
            moved = fmt.gather(weight[find_row_order(fmt, weight).long()], find_column_orders(fmt, weight))
        except FormatError:
            continue
        yield describe_view(method, moved, (order_nbytes(columns), order_nbytes(rows)))
    yield describe_view(SINGULAR, rotate_to_singular_basis(weight), basis_nbytes=basis_nbytes(min(rows, columns)))
    turn = Rotated(base=Dense())
    try:
        turn.check((rows, columns))
    except FormatError:
        return
    yield describe_view(HADAMARD, turn.rotate_weight(weight))


def describe_view(
    name: str, weight: Float[Tensor, "out in"], order_bytes: tuple[int, int] = (0, 0), basis_nbytes: int = 0
) -> View:
    """What a matrix that is already in its order looks like; `order_bytes`: of the columns' order and of the rows'."""
    return View(
        name=name,
        along_rows=_neighbours(weight, order_bytes[0]),
        along_columns=_neighbours(weight.T.contiguous(), order_bytes[1]),
        kurtosis=kurtosis(weight),
        scale_bits=scale_bits(weight).both,
        basis_nbytes=basis_nbytes,
    )


def rotate_to_singular_basis(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W V, or Uᵀ W where there are fewer rows than columns: the smaller side in the singular basis, largest first.

    In both bases at once nothing but the diagonal is left, and their factors are larger than the matrix.
    """
    if weight.shape[0] < weight.shape[1]:
        return rotate_to_singular_basis(weight.T).T.contiguous()
    values = weight.double()
    with one_thread():
        basis = torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)
    return (values @ basis).to(weight)


def basis_nbytes(size: int) -> int:
    """Bytes of `size` basis vectors as the factors of a residual are stored: int8, a float16 scale each."""
    factor = LowRankPlus(base=Dense(), rank=size, factors=INT8).layout((size, size))
    return factor["left"].nbytes + factor["left_scales"].nbytes


def _neighbours(weight: Float[Tensor, "out in"], nbytes: int) -> Neighbours:
    return Neighbours(autocorrelation(weight), autocorrelation(magnitudes(weight)), predictable_bits(weight), nbytes)
