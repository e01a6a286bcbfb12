"""`entropy_coded`: integer codes on an even grid, really entropy-coded in the file.

The size follows the entropy of the codes and not their largest (WaterSIC, arXiv:2603.04956), so that one step serves
a whole matrix and no weight is clipped. Eight neighbouring rows of a column are a point of the lattice E8, which
loses 0.15 bits per weight to Shannon's bound where separate codes lose 0.25 (a sphere packs space better than a cube).

weight ── E8, rate and distortion (fit) ──▶ codes ── histogram, ANS (pack) ──▶ words, zeros up to the budget
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, WeightFormat, empty, register
from reallm.kernels import pack_bits, packed_nbytes, unpack_bits
from reallm.kernels.ans import AnsReader, AnsWriter
from reallm.kernels.e8_stream import are_lattice_points, frequency_table, largest_code, read_codes, write_codes

_WORD_BYTES = 4


@dataclass(frozen=True)
class UnpackedEntropyCoded:
    """weight = code · step; eight neighbouring rows of a column are all even or all odd and sum to a multiple of 4."""

    codes: Int[Tensor, "out in"]
    step: Float[Tensor, " 1"]


@register
@dataclass(frozen=True)
class EntropyCoded(WeightFormat):
    """`bits` stored bits per weight, tables and step included; the size is exact and known before fitting.

    `fit` chooses the step so that the coded words fill the budget; what they leave is filled with zeros and counted.
    `largest` (1 to 127): codes of smaller magnitude have a frequency of their own, others take 16 bits more.
    `classes`: columns are sorted into so many classes by their magnitude, and each class has its own frequencies.
    """

    bits: int | float
    largest: int = 63
    classes: int = 1

    name: ClassVar[str] = "entropy_coded"
    examples: ClassVar[tuple[dict, ...]] = ({"bits": 2.0}, {"bits": 3.0})
    roles: ClassVar[dict[str, str]] = {
        "codes": "codes",
        "frequencies": "tables",
        "column_classes": "tables",
        "step": "scales",
    }

    def __post_init__(self) -> None:
        # Below 1/8 bit a small file could ask for any amount of memory. The comparison also refuses nan.
        if not 0.125 <= self.bits <= 16:
            raise FormatError(f"entropy_coded: bits={self.bits} is not in 0.125 … 16")
        if not 1 <= self.largest <= 127:
            raise FormatError(f"entropy_coded: largest={self.largest} is not in 1 … 127")
        if not 1 <= self.classes <= 256:
            raise FormatError(f"entropy_coded: classes={self.classes} is not in 1 … 256")

    def words(self, shape: Shape) -> int:
        """32-bit words for codes: what the budget leaves beside tables and step; may be negative."""
        return (math.floor(self.bits * shape[0] * shape[1] / 8) - self._overhead_nbytes(shape)) // _WORD_BYTES

    def error_model(self) -> str:
        """Return `stepped`: one step for the whole matrix."""
        return "stepped"

    def check(self, shape: Shape) -> None:
        """Tables may take half of the bytes."""
        least = 2 * self._overhead_nbytes(shape)
        budget = math.floor(self.bits * shape[0] * shape[1] / 8)
        if budget < least:
            raise FormatError(
                f"entropy_coded: bits={self.bits} is {budget} bytes for a matrix of {shape[0]} x {shape[1]}, and "
                f"tables with largest={self.largest} and classes={self.classes} need at least {least}"
            )

    def layout(self, shape: Shape) -> Tensors:
        """`codes` 32-bit words as bytes, `frequencies` (classes, 2 · largest + 1), `column_classes` packed, `step`."""
        return {
            "codes": empty((max(self.words(shape), 0) * _WORD_BYTES,), torch.uint8),
            "frequencies": empty((self.classes, 2 * self.largest + 1), torch.uint8),
            **self._classes_layout(shape),
            "step": empty((1,), torch.float32),
        }

    def pack(self, unpacked: UnpackedEntropyCoded, shape: Shape) -> Tensors:
        """Code the codes.

        Errors: FormatError if they take more than the budget or are no points of the lattice.
        """
        codes = unpacked.codes.cpu().numpy()
        if not are_lattice_points(codes) or np.abs(codes).max(initial=0) > largest_code(self.largest):
            raise FormatError("entropy_coded: codes are not points of the lattice E8, or too large to be written")
        words, tables, column_classes = self.encode_codes(codes)
        capacity = self.words(shape)
        if len(words) > capacity:
            raise FormatError(f"entropy_coded: codes take {len(words)} words, bits={self.bits} leaves {capacity}")
        stream = np.concatenate([words, np.zeros(capacity - len(words), np.uint32)]).astype("<u4").view(np.uint8)
        tensors = {"codes": torch.from_numpy(stream), "frequencies": torch.from_numpy(tables)}
        if self.classes > 1:
            tensors["column_classes"] = pack_bits(torch.from_numpy(column_classes), self._class_bits)
        device = unpacked.codes.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return tensors | {"step": unpacked.step.detach().to(torch.float32)}

    def unpack(self, tensors: Tensors, shape: Shape) -> UnpackedEntropyCoded:
        """The inverse of `pack`.

        Errors: FormatError if the words do not end where the codes do: the stream is damaged.
        """
        column_classes = np.zeros(shape[1], np.int64)
        if self.classes > 1:
            column_classes = unpack_bits(tensors["column_classes"].cpu(), self._class_bits, shape[1]).numpy()
        tables = tensors["frequencies"].cpu().numpy()
        reader = AnsReader(tensors["codes"].cpu().numpy().view("<u4"))
        codes = np.zeros(shape, np.int32)
        done = 0
        for number, table in enumerate(tables):
            columns = np.flatnonzero(column_classes == number)
            codes[:, columns] = read_codes(reader, shape[0], len(columns), table)
            done += len(columns)
        if not reader.is_empty or done != shape[1]:
            raise FormatError("entropy_coded: the stream of codes is damaged; copy the artifact again")
        return UnpackedEntropyCoded(torch.from_numpy(codes).to(tensors["codes"].device), tensors["step"])

    def decode(self, unpacked: UnpackedEntropyCoded, shape: Shape) -> Float[Tensor, "out in"]:
        """code · step."""
        return unpacked.codes * unpacked.step

    def encode_codes(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(words, uint8 tables (classes, 2 · largest + 1), class of each column) of lattice codes (out, in)."""
        column_classes = self.assign_classes(codes)
        groups = [codes[:, column_classes == number] for number in range(self.classes)]
        tables = [frequency_table(group, self.largest) for group in groups]
        writer = AnsWriter()
        for group, table in zip(groups[::-1], tables[::-1], strict=True):
            write_codes(writer, group, table)
        return writer.words(), np.stack(tables), column_classes

    def assign_classes(self, codes: np.ndarray) -> np.ndarray:
        """Class of each column: columns in order of their mean magnitude, cut into classes of equal number."""
        order = np.abs(codes).sum(0, dtype=np.int64).argsort(kind="stable")
        classes = np.empty(len(order), np.int32)
        classes[order] = np.arange(len(order)) * self.classes // len(order)
        return classes

    @property
    def _class_bits(self) -> int:
        return (self.classes - 1).bit_length()

    def _classes_layout(self, shape: Shape) -> Tensors:
        if self.classes == 1:
            return {}
        return {"column_classes": empty((packed_nbytes(shape[1], self._class_bits),), torch.uint8)}

    def _overhead_nbytes(self, shape: Shape) -> int:
        classes = sum(tensor.nbytes for tensor in self._classes_layout(shape).values())
        return self.classes * (2 * self.largest + 1) + classes + 4
