"""The decoder of artifact.md and the format of add_a_format.md are run; tables of all pages are up to date."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import reallm
from reallm.checkpoint import VERSION, decode_tensor, read_manifest
from reallm.formats import known_formats
from reallm.formats.base import strip_prefix
from result_tables import update_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Every setting that changes a stored byte of the three formats that the decoder knows.
RECIPE = """
rules:
  - {match: "*.1.*.q_proj", format: {format: e8, bits: 2}}
  - {match: "*.1.*.k_proj", format: {format: e8, bits: 3}}
  - {match: "*.1.*.v_proj", format: {format: e8, bits: 4}}
  - {role: q, format: {format: normal_float, bits: 3, group_size: 24}}
  - {role: k, format: {format: normal_float, bits: 6, group_size: 0, scales: float16}}
  - {role: v, format: {format: normal_float, bits: 1}}
  - {role: o, format: {format: uniform, bits: 5, symmetric: true, scales: two_level}}
  - {role: gate, format: {format: uniform, bits: 1, symmetric: true, group_size: 10}}
  - {role: up, format: {format: uniform, bits: 2, symmetric: true, group_size: 0}}
  - {match: "*", format: {format: normal_float, bits: 2, group_size: 16}}
embedding: {format: uniform, bits: 8, symmetric: true}
"""


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "entropy-coded"])
def artifact(request, tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    reallm.compress(tiny_llama, folder / "out", recipe=str(folder / "recipe.yaml"), coding=request.param)
    return folder / "out"


def test_the_decoder_of_the_byte_specification_agrees_with_the_library(artifact):
    (source,) = code_blocks(DOCS / "artifact.md", "python")
    namespace: dict = {}
    exec(compile(source, "docs/artifact.md", "exec"), namespace)
    stored = load_file(artifact / "model.safetensors")
    matrices = read_manifest(artifact).matrices
    assert len({matrix.fmt for matrix in matrices}) == 11
    for matrix in matrices:
        layout = matrix.fmt.layout(matrix.shape)
        tensors = {
            local: decode_tensor(tensor, layout[local]) if local in matrix.coded else tensor
            for local, tensor in strip_prefix(matrix.name, stored).items()
        }
        wanted = matrix.fmt.decode(matrix.fmt.unpack(tensors, matrix.shape), matrix.shape).numpy()
        np.testing.assert_allclose(namespace["decode"](artifact, matrix.name), wanted, rtol=1e-6, atol=0)


def test_the_byte_specification_knows_every_format_and_every_role():
    page = (DOCS / "artifact.md").read_text(encoding="utf-8")
    for name, cls in known_formats().items():
        assert f"\n| `{name}`" in page, f"docs/artifact.md: no row for the format {name}"
        assert all(f"`{role}`" in page for role in cls.roles.values())


def test_the_byte_specification_is_of_this_version():
    assert (DOCS / "artifact.md").read_text(encoding="utf-8").startswith(f"# The artifact, version {VERSION}\n")


@pytest.mark.slow
def test_the_example_format_of_the_guide_passes_the_contract(tmp_path):
    page = DOCS / "add_a_format.md"
    stored, found, example = code_blocks(page, "python")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "reallm", tmp_path / "reallm", ignore=ignored)
    (tmp_path / "reallm" / "formats" / "sign.py").write_text(stored, encoding="utf-8")
    (tmp_path / "reallm" / "fit" / "sign.py").write_text(found, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    contract = (ROOT / "tests" / "formats" / "test_contract.py").read_text(encoding="utf-8")
    (tmp_path / "test_contract.py").write_text(contract.replace("EXAMPLES = [\n", f"EXAMPLES = [\n{example}", 1))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "sign or every_registered", "test_contract.py"]
        + ["-p", "no:cacheprovider", "--jaxtyping-packages=reallm,beartype.beartype"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_of_results_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert update_page(text, ROOT / "results") == text, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_layout_names_every_room():
    page = (DOCS / "layout.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "reallm"
    rooms = [f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()]
    rooms += [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert [room for room in rooms if f"| `{room}` |" not in page] == []


def test_every_test_that_the_guarantees_name_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / "guarantees.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    tests = ROOT / "tests"
    missing = [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in (tests / file).read_text("utf-8")]
    assert missing == []


def test_every_promise_names_a_test():
    page = (DOCS / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| promise"))]
    assert len(rows) > 25 and all("::test_" in row for row in rows)
