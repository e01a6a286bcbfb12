"""Formats of other packages: found by their entry point, chosen by budgets, loaded by from_pretrained."""

import sys

import pytest
import torch
import yaml

import reallm
from reallm.checkpoint import read_manifest
from reallm.errors import FormatError
from reallm.formats import base, from_spec, known_formats
from reallm.pipeline import Settings, prepare

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from reallm.fit import fit
from reallm.formats import WeightFormat, register


@dataclass(frozen=True)
class UnpackedTernary:
    codes: torch.Tensor
    scales: torch.Tensor


@register
@dataclass(frozen=True)
class Ternary(WeightFormat):
    name: ClassVar[str] = "ternary_of_a_plugin"
    roles: ClassVar[dict[str, str]] = {"codes": "codes", "scales": "scales"}

    def check(self, shape):
        pass

    def layout(self, shape):
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return {"codes": codes, "scales": torch.empty(shape[0], dtype=torch.float16, device="meta")}

    def pack(self, unpacked, shape):
        return {"codes": unpacked.codes.to(torch.int8), "scales": unpacked.scales.to(torch.float16)}

    def unpack(self, tensors, shape):
        return UnpackedTernary(tensors["codes"], tensors["scales"].float())

    def decode(self, unpacked, shape):
        return unpacked.codes * unpacked.scales[:, None]

    @classmethod
    def candidates(cls, kind, device):
        return (cls(),) if kind == "block" else ()


@fit.register
def fit_ternary(fmt: Ternary, weight, objective=None, seed=0, start=None):
    scales = weight.abs().mean(1).to(torch.float16).float()
    return UnpackedTernary((weight / scales[:, None].clamp(min=1e-30)).round().clamp(-1, 1), scales)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(source): a package with an entry point, as pip leaves it; gone after the test."""

    def write(source):
        (tmp_path / "ternary_plugin.py").write_text(source)
        info = tmp_path / "ternary_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ternary-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[reallm.formats]\nternary = ternary_plugin\n")
        monkeypatch.syspath_prepend(tmp_path)
        base._load_plugins.cache_clear()

    yield write
    sys.modules.pop("ternary_plugin", None)
    base._REGISTRY.pop("ternary_of_a_plugin", None)
    base._load_plugins.cache_clear()


def test_a_format_of_another_package_is_chosen_by_a_budget_and_loads(install, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    install(PLUGIN)
    spec = {"format": "ternary_of_a_plugin"}
    # At eight bits and no loss nothing is better, and the budget has room for it.
    free = {"losses": [{"match": "*q_proj", "format": spec, "loss": 0.0}]}
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(free))
    job = prepare(tiny_llama, Settings(bits=8.3, corrections=str(tmp_path / "free.yaml")))
    assert {e.fmt.name for e in job.plan.entries if e.matrix.role == "q"} == {"ternary_of_a_plugin"}
    reallm.compress(tiny_llama, tmp_path / "out", bits=8.3, corrections=str(tmp_path / "free.yaml"))
    stored = {m.name: m.fmt.name for m in read_manifest(tmp_path / "out").matrices}
    assert stored["model.layers.1.self_attn.q_proj"] == "ternary_of_a_plugin"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert all(len(row.abs().unique()) <= 2 for row in weight) and model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_plugin_that_cannot_be_imported_is_named_in_a_warning_and_others_go_on(install):
    install("raise RuntimeError('no such GPU')")
    with pytest.warns(UserWarning, match="formats of ternary-plugin cannot be loaded .RuntimeError: no such GPU"):
        assert "uniform" in known_formats()


def test_the_format_of_a_package_that_is_not_installed_is_unknown():
    with pytest.raises(FormatError, match="unknown format 'ternary_of_a_plugin'; known formats: additive"):
        from_spec({"format": "ternary_of_a_plugin"})
