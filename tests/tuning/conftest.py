"""A tiny compressed model with several formats, its original model, and a text to tune on."""

import random

import pytest

import reallm

WORDS = "the a of and to in river stone light house green old small walks sees holds under over".split()
RECIPE = """
rules:
- {role: [v], format: {format: low_rank_plus, rank: 2, base: {format: normal_float, bits: 2}}}
- {role: [o], format: {format: low_rank_plus, rank: 2, factors: int8, base: {format: uniform, bits: 2}}}
- {role: [q, up], format: {format: gain, base: {format: rotated, base: {format: trellis, bits: 2, state_bits: 8}}}}
- {match: "*", format: {format: codebook, index_bits: 6, vector_dim: 4}}
"""


@pytest.fixture(scope="session")
def tuning_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tuning.txt"
    rng = random.Random(3)
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(300))
    path.write_text("".join(f"{line}.\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def compressed(tiny_llama, tmp_path_factory):
    """Read-only."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "mine.yaml").write_text(RECIPE)
    reallm.compress(tiny_llama, folder / "out", recipe=str(folder / "mine.yaml"))
    return folder / "out"
