"""From the number of a codeword to the codeword: digits of the index, a table for each, and a small net over their sum.

index ── digits ──▶ Σ_j table_j[digit_j] + bias ──┬── first `vector_dim` numbers ───────────────┬──▶ codeword
                                                  └── the other `hidden`: GELU ── linear map ───┘

Without hidden numbers it is a linear map of the digits (the sum of codebooks of AQLM, arXiv:2401.06118), and with one
digit as wide as the index a plain codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.decoders.flat_vector import Shapes, count, split


@dataclass(frozen=True)
class CodebookNet:
    """2^index_bits codewords of `vector_dim` numbers; digits have `digit_bits` bits, the last one what is left."""

    index_bits: int
    vector_dim: int
    digit_bits: int
    hidden: int

    @property
    def digits(self) -> list[int]:
        """Bits of every digit, the highest of the index first."""
        full, rest = divmod(self.index_bits, self.digit_bits)
        return [self.digit_bits] * full + [rest] * (rest > 0)

    @property
    def shapes(self) -> Shapes:
        """A table for every digit, whose first row is zeros and is left out, the bias, and the linear map."""
        width = self.vector_dim + self.hidden
        tables = {f"digit{j}": (2**bits - 1, width) for j, bits in enumerate(self.digits)}
        return {**tables, "bias": (width,), "out": (self.hidden, self.vector_dim)}

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return count(self.shapes)

    @property
    def multiply_adds(self) -> int:
        """Of the whole table: it is made once."""
        return 2**self.index_bits * self.hidden * self.vector_dim

    def codebook(self, flat: Float[Tensor, " parameters"]) -> Float[Tensor, "codewords vector_dim"]:
        """All codewords in the order of their index.

        Sums of tables go digit by digit, so that gradients are sums along an axis: the same in every run.
        """
        named = split(flat, self.shapes)
        total = named["bias"][None]
        for j in range(len(self.digits)):
            rows = torch.nn.functional.pad(named[f"digit{j}"], (0, 0, 1, 0))
            total = (total[:, None] + rows).flatten(0, 1)
        codewords = total[:, : self.vector_dim]
        if not self.hidden:
            return codewords
        return codewords + torch.nn.functional.gelu(total[:, self.vector_dim :]) @ named["out"]
