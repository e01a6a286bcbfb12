"""Fitted matrices that other runs take over."""

import dataclasses
import json

import pytest
import torch

import reallm
from reallm.checkpoint import read_ledger
from reallm.errors import RecipeError
from reallm.fit import Objective
from reallm.formats import from_spec
from reallm.pipeline import fit_job as fitting
from reallm.pipeline.fit_cache import fit_key

MATRICES = 15  # of the tiny Llama: 14 in blocks and the embedding


@pytest.fixture
def fitted(monkeypatch):
    """The shapes of matrices that were really fitted, as they come."""
    found, fit = [], fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda fmt, w, *more: found.append(w.shape) or fit(fmt, w, *more))
    return found


def recipe(tmp_path, **bits):
    """Uniform codes: of 4 bits, or as said for a role."""
    rules = [
        {"role": [role], "format": {"format": "uniform", "bits": b, "group_size": 32}}
        for role, b in bits.items()
        if role != "embedding"
    ]
    path = tmp_path / f"{json.dumps(bits)}.yaml"
    end = {"format": "uniform", "bits": bits.get("embedding", 8), "symmetric": True}
    rules.append({"match": "*", "format": {"format": "uniform", "bits": 4, "group_size": 32}})
    path.write_text(json.dumps({"rules": rules, "embedding": end}))
    return str(path)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_without_calibration_only_matrices_in_another_format_are_fitted_anew(tiny_llama, tmp_path, fitted):
    fits = str(tmp_path / "fits")
    reallm.compress(tiny_llama, tmp_path / "first", recipe=recipe(tmp_path), fits=fits)
    assert len(fitted) == MATRICES
    fitted.clear()
    reallm.compress(tiny_llama, tmp_path / "second", recipe=recipe(tmp_path, q=3), fits=fits)
    assert len(fitted) == 2
    reallm.compress(tiny_llama, tmp_path / "alone", recipe=recipe(tmp_path, q=3))
    assert files(tmp_path / "second") == files(tmp_path / "alone")


def test_a_second_size_fits_few_matrices(tiny_llama, tmp_path, fitted):
    fits = str(tmp_path / "fits")
    reallm.compress(tiny_llama, tmp_path / "first", size=100_000, fits=fits)
    fitted.clear()
    reallm.compress(tiny_llama, tmp_path / "second", size=104_000, fits=fits)
    formats = [
        {m.name: m.fmt for m in read_ledger(tmp_path / name).compressed_matrices} for name in ("first", "second")
    ]
    changed = sum(formats[0][name] != formats[1][name] for name in formats[0])
    assert 0 < len(fitted) <= changed + 4 < MATRICES


def test_along_the_stream_all_is_taken_up_to_the_first_change(tiny_llama, text_file, tmp_path, fitted):
    calibrated = {"calibration": (str(text_file),), "calibration_windows": 4, "calibration_context": 64}
    fits = str(tmp_path / "fits")
    reallm.compress(tiny_llama, tmp_path / "first", recipe=recipe(tmp_path), fits=fits, **calibrated)
    fitted.clear()
    reallm.compress(tiny_llama, tmp_path / "same", recipe=recipe(tmp_path), fits=fits, **calibrated)
    assert not fitted and files(tmp_path / "same") == files(tmp_path / "first")
    # down is the last of its block: both of them, and all else of the second block, which has other inputs now.
    reallm.compress(tiny_llama, tmp_path / "second", recipe=recipe(tmp_path, down=3), fits=fits, **calibrated)
    assert len(fitted) == 1 + 7
    fitted.clear()
    reallm.compress(tiny_llama, tmp_path / "third", recipe=recipe(tmp_path, embedding=4), fits=fits, **calibrated)
    assert len(fitted) == MATRICES


def test_a_fit_that_was_damaged_is_made_anew(tiny_llama, tmp_path, fitted):
    settings = {"recipe": recipe(tmp_path), "fits": str(tmp_path / "fits")}
    reallm.compress(tiny_llama, tmp_path / "first", **settings)
    one, two, three, *_ = sorted((tmp_path / "fits").iterdir())
    one.write_bytes(b"nothing")
    two.write_bytes(two.read_bytes()[:-1] + bytes([two.read_bytes()[-1] ^ 1]))
    three.unlink()
    fitted.clear()
    reallm.compress(tiny_llama, tmp_path / "second", **settings)
    assert len(fitted) == 3 and files(tmp_path / "second") == files(tmp_path / "first")


def test_whatever_a_fit_depends_on_is_in_its_key():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    moments = weight.T @ weight
    first = {
        "fmt": from_spec({"format": "uniform", "bits": 4}),
        "weight": weight,
        "objective": Objective.output_error(moments, torch.ones(6)),
        "seed": 0,
    }
    others = {
        "fmt": [from_spec({"format": "uniform", "bits": 3})],
        "weight": [weight + 1e-6, weight.view(8, 6)],
        "objective": [
            Objective.output_error(moments),
            Objective.output_error(moments + torch.eye(8), torch.ones(6)),
            dataclasses.replace(first["objective"], rows=torch.arange(6.0)),
            Objective.relative_columns(weight),
        ],
        "seed": [1],
    }
    keys = [fit_key(**first), *(fit_key(**{**first, name: value}) for name in others for value in others[name])]
    assert len(set(keys)) == len(keys) and fit_key(**first) == keys[0]


def test_a_file_in_place_of_the_folder_is_one_line(tiny_llama, tmp_path):
    (tmp_path / "fits").write_text("")
    with pytest.raises(RecipeError, match="--fits .*fits: is a file; give a folder"):
        reallm.compress(tiny_llama, tmp_path / "out", bits=4.0, fits=str(tmp_path / "fits"))
