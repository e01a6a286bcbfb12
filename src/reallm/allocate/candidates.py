"""Candidate formats of bit allocation, with and without calibration."""

from __future__ import annotations

import functools
import importlib.util

from reallm.errors import install_hint
from reallm.formats import WeightFormat, known_formats
from reallm.formats.codebook import Codebook
from reallm.formats.dense import Dense
from reallm.formats.e8 import E8
from reallm.formats.entropy_coded import EntropyCoded
from reallm.formats.low_rank_plus import INT8, LowRankPlus
from reallm.formats.neural_codebook import NeuralCodebook
from reallm.formats.normal_float import NormalFloat
from reallm.formats.rotated import Rotated
from reallm.formats.scaled import BOTH, INPUTS, OUTPUTS, Scaled
from reallm.formats.trellis import Trellis
from reallm.formats.uniform import Uniform

BLOCK, EMBEDDING_AND_HEAD = "block", ("embedding", "head")
# Rates of entropy-coded candidates in bits per weight: a quarter of a bit changes the error by 40 %.
_RATES = tuple(quarters / 4 for quarters in range(4, 25))


@functools.cache
def data_free_candidates() -> tuple[WeightFormat, ...]:
    """Return the block candidates of a budget without calibration: 1 to 8 bits and dense.

    Learned scalar codes in many group sizes, and vector codes of two: steps fine enough to land within 1 %. No
    permutations: sorting helps some roles and harms others
    (docs/experiments/data-free-codes.md), and the prediction cannot tell
    which.
    """
    signs = [NormalFloat(bits=1, group_size=g) for g in (64, 128, 256)]
    scalars = [Codebook(index_bits=b, vector_dim=1, group_size=g) for b in range(2, 9) for g in (16, 32, 64, 128, 256)]
    vectors = [Codebook(index_bits=i, vector_dim=2, group_size=g) for i in range(3, 9) for g in (32, 64, 128)]
    return (*signs, *scalars, *vectors, Dense())


# Values of --candidates: formats added to the lists below.
NEURAL = "neural"
MORE = (NEURAL,)
# (index bits, vector dimension): 0.75 to 3.5 bits per weight.
_NEURAL_CODEBOOKS = ((12, 16), (16, 16), (8, 8), (10, 8), (12, 8), (14, 8), (16, 8), (10, 4), (12, 4), (14, 4))


@functools.cache
def neural_candidates(kind: str, largest: int = 16) -> tuple[WeightFormat, ...]:
    """Return rotated neural codebooks of up to `largest` index bits, for blocks.

    All matrices of one format share a decoder.

    After a rotation all matrices are close to Gaussian, so one decoder serves them all at negligible overhead; a
    decoder per matrix would take 0.2 bits per weight of a matrix of 110,000 weights. Encoding searches all codewords: a
    CPU takes an hour for 10⁷ weights at 16 bits, so 12 bits are the largest there.
    """
    if kind != BLOCK:
        return ()
    found = [
        Rotated(NeuralCodebook(index_bits=bits, vector_dim=dim, shared=f"codeword_{bits}_{dim}"))
        for bits, dim in _NEURAL_CODEBOOKS
        if bits <= largest
    ]
    return (*found, *(Scaled(fmt, sides) for sides in (INPUTS, OUTPUTS, BOTH) for fmt in found))


@functools.cache
def calibrated_candidates(kind: str, state_bits: int, entropy: bool | None = None) -> tuple[WeightFormat, ...]:
    """Return the candidates for matrices of a kind.

    `state_bits` is the trellis state size, 0 for no trellis codes; `entropy` includes entropy-coded formats, by default
    if the package they need is installed.

    Blocks: rotated trellis and E8 codes at whole bits, entropy-coded lattice points at any rate, and scalar codes for
    matrices too small to amortize a codebook. Embedding and lm_head are fitted without calibration and read row by row:
    scalar codes, which the file stores entropy-coded, and lattice points, each also with a residual of rank 1.
    """
    entropy = _has_entropy_coder() if entropy is None else entropy
    if kind == BLOCK:
        return (*_block_candidates(state_bits), *(_entropy_coded() if entropy else ()), Dense())
    lattice = _plain_entropy_coded(_RATES[4::2]) if entropy else []
    return (
        *_embedding_candidates(),
        *lattice,
        *(_add_rank_one(fmt) for fmt in (*_embedding_candidates(groups=(64,)), *lattice)),
        Dense(),
    )


def plugin_candidates(kind: str, device: str) -> tuple[WeightFormat, ...]:
    """Return the formats that say themselves that budgets may choose them: those of other packages do.

    `kind` of matrix: block, embedding or head; `device` that fits.
    """
    return tuple(fmt for cls in known_formats().values() for fmt in cls.candidates(kind, device))


def missing_candidates() -> str | None:
    """Return one line on the candidates left out because a package is missing; None if none are."""
    if _has_entropy_coder():
        return None
    return f"no entropy_coded among the candidates: it needs the package 'constriction': {install_hint('entropy')}"


def _has_entropy_coder() -> bool:
    return importlib.util.find_spec("constriction") is not None


def _block_candidates(state_bits: int) -> list[WeightFormat]:
    trellis = [Rotated(Trellis(bits=b, state_bits=state_bits)) for b in (1, 2, 3, 4)] if state_bits else []
    trellis += [Scaled(fmt, sides) for sides in (INPUTS, OUTPUTS, BOTH) for fmt in trellis]
    lattice = [Rotated(E8(bits=b)) for b in (2, 3, 4)]
    vectors = [Codebook(index_bits=i, vector_dim=2, group_size=g) for i in (4, 5, 6, 7, 8) for g in (64,)]
    scalars = [Uniform(bits=b, group_size=g, symmetric=True) for b in (5, 6, 7, 8) for g in (64, 0)]
    floats = [NormalFloat(bits=b) for b in (4, 5, 6)]
    return [*trellis, *lattice, *vectors, *scalars, *floats]


def _entropy_coded() -> list[WeightFormat]:
    plain = _plain_entropy_coded(_RATES)
    rotated = [Rotated(fmt) for fmt in plain]
    return [*plain, *rotated, *(Scaled(fmt, OUTPUTS) for fmt in rotated)]


def _plain_entropy_coded(rates: tuple[float, ...]) -> list[WeightFormat]:
    # 31 levels are enough below 4 bits, where they save 64 bytes of table.
    return [EntropyCoded(bits=rate, largest=31 if rate < 4 else 127) for rate in rates]


def _add_rank_one(fmt: WeightFormat) -> WeightFormat:
    """Return `fmt` with a residual of rank 1, for embedding and lm_head.

    A rank of 2, 4 or 8 is within 0.02 bits of that (docs/experiments/rank-1-residual-for-embedding.md).
    """
    return LowRankPlus(base=fmt, rank=1, factors=INT8)


def _embedding_candidates(groups: tuple[int, ...] = (32, 64, 0)) -> list[WeightFormat]:
    scalars = [Uniform(bits=b, group_size=g, symmetric=True) for b in (3, 4, 5, 6, 7, 8) for g in groups]
    return [*scalars, *(NormalFloat(bits=b) for b in (2, 3, 4, 5, 6))]
