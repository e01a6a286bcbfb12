"""Artifacts written by older versions still load and compute what they computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reallm
from reallm.artifact import read_ledger, read_manifest
from reallm.formats import known_formats
from reallm.model import MODES

DATA = Path(__file__).parents[1] / "data"
V1 = DATA / "artifact_v1"


@pytest.mark.parametrize("mode", MODES)
def test_an_artifact_of_version_1_still_gives_its_logits(mode):
    expected = load_file(DATA / "artifact_v1_logits.safetensors")
    with torch.no_grad():
        logits = reallm.load(V1, mode)(expected["ids"]).logits
    # Other processors and versions of torch sum in another order.
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_the_ledger_of_version_1_still_covers_its_files():
    total = sum(path.stat().st_size for path in V1.rglob("*") if path.is_file())
    assert read_ledger(V1).total_bytes == total < 200_000


def test_the_artifact_of_version_1_has_every_format_of_its_time():
    def names(fmt):
        inner = getattr(fmt, "base", None)
        return {fmt.name} | (names(inner) if inner is not None else set())

    held = set().union(*(names(matrix.fmt) for matrix in read_manifest(V1).matrices))
    of_version_1 = {"codebook", "dense", "gain", "low_rank_plus", "normal_float", "permuted", "uniform"}
    assert held == of_version_1 <= set(known_formats())
