"""Artifacts written by older versions still load and compute the same logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reallm
from reallm.checkpoint import VERSION, read_ledger, read_manifest
from reallm.formats import known_formats
from reallm.hf import MODES

DATA = Path(__file__).parents[1] / "data"
V1 = DATA / "artifact_v1"
VERSIONS = (1, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_artifact_of_every_version_still_gives_its_logits(version, mode):
    expected = load_file(DATA / f"artifact_v{version}_logits.safetensors")
    with torch.no_grad():
        logits = reallm.load(DATA / f"artifact_v{version}", mode)(expected["ids"]).logits
    # Other processors and versions of torch sum in another order.
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ledger_of_every_version_still_covers_its_files(version):
    folder = DATA / f"artifact_v{version}"
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert read_ledger(folder).total_bytes == total < 200_000


def test_there_is_an_artifact_of_every_version():
    assert VERSIONS[-1] == VERSION


def test_the_artifact_of_version_2_has_tensors_of_both_codecs():
    stored = load_file(DATA / "artifact_v2" / "model.safetensors")
    widths = {int(stored[row.name][0]) for row in read_ledger(DATA / "artifact_v2").entropy_coded_rows}
    assert 0 in widths and len(widths) > 2


def test_the_artifact_of_version_1_has_every_format_of_its_time():
    def names(fmt):
        inner = getattr(fmt, "base", None)
        return {fmt.name} | (names(inner) if inner is not None else set())

    held = set().union(*(names(matrix.fmt) for matrix in read_manifest(V1).matrices))
    of_version_1 = {"codebook", "dense", "gain", "low_rank_plus", "normal_float", "permuted", "uniform"}
    assert held == of_version_1 <= set(known_formats())
