"""Map a codeword index to its codeword: one embedding table per digit of the index, and a small MLP on their sum.

index ── digits ──▶ Σ_j table_j[digit_j] + bias ──┬── first `vector_dim` values ────────────────┬──▶ codeword
                                                  └── other `hidden` values: GELU ── linear ────┘

With `hidden=0` the codeword is linear in the digits (additive codebooks as in AQLM, arXiv:2401.06118); with one digit
as wide as the index it is a plain codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reallm.decoders.flat_vector import Shapes, count, split


@dataclass(frozen=True)
class CodebookNet:
    """2^index_bits codewords of `vector_dim` values; digits have `digit_bits` bits, the last one the remaining bits."""

    index_bits: int
    vector_dim: int
    digit_bits: int
    hidden: int

    @property
    def digits(self) -> list[int]:
        """Bits of each digit, most significant digit first."""
        full, remainder = divmod(self.index_bits, self.digit_bits)
        return [self.digit_bits] * full + [remainder] * (remainder > 0)

    @property
    def shapes(self) -> Shapes:
        """Shapes of the tables (one per digit; row 0 is zero and not stored), the bias and the output matrix."""
        width = self.vector_dim + self.hidden
        tables = {f"digit{j}": (2**bits - 1, width) for j, bits in enumerate(self.digits)}
        return {**tables, "bias": (width,), "out": (self.hidden, self.vector_dim)}

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return count(self.shapes)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds to compute the whole codebook, which happens once per matrix."""
        return 2**self.index_bits * self.hidden * self.vector_dim

    def codebook(self, flat: Float[Tensor, " parameters"]) -> Float[Tensor, "codewords vector_dim"]:
        """Return all codewords in index order.

        Tables are added digit by digit, so that gradients are sums along an axis and deterministic.
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
