"""Killed by SIGKILL wherever it is, and started again with --resume: the artifact is the same to the byte."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 60
RECIPE = """
rules:
- {role: [q, up], format: {format: codebook, index_bits: 4, vector_dim: 2}}
- {match: "*", format: {format: uniform, bits: 3}}
"""


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


RUNS = {
    "by weights alone": {"recipe": RECIPE},
    "with calibration": {"recipe": RECIPE, "calibration_windows": 6, "calibration_context": 48},
    "to a size, coded": {"size": 74_000, "coding": True, "calibration_windows": 6, "calibration_context": 48},
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_sixty_random_points_and_resumed_the_bytes_are_the_same(tiny_llama, text_file, tmp_path, kind):
    settings = dict(RUNS[kind])
    if "recipe" in settings:
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        settings["recipe"] = str(tmp_path / "recipe.yaml")
    if "calibration_windows" in settings:
        settings["calibration"] = [str(text_file)]
    server = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
    arguments = [str(tiny_llama), str(tmp_path), str(KILLS), "0", json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*server, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(run["killed"] for run in runs) >= KILLS
    whole = tmp_path / "whole"
    for run in runs:
        out = tmp_path / run["out"]
        assert files(out) == files(whole)
        assert not any(filecmp.cmpfiles(out, whole, files(whole), shallow=False)[1:])
        assert not out.with_name(f"{out.name}.work").exists()
    # Kills met runs at different places: before the first matrix, among them, and after the last.
    met = {number for run in runs for number in run["finished_matrices"]}
    assert len(met) > 5 and 15 in met
