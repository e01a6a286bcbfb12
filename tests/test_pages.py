"""Commands and snippets that README.md and docs/ show, run on a tiny model, so that they cannot rot.

Commands in `bash` blocks are run in the order of their page; those in `sh` blocks are only parsed, as they need a GPU,
a package or minutes. Both suppose MODEL, text.txt and such; OUT and ADAPTER are there where a page does not make them.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from reallm.cli import app, main
from reallm.formats import known_formats

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]
# Appended to the options of a page: the tiny model reads 512 tokens and its text has few windows.
FOR_A_TINY_MODEL = {
    "eval": ["--context", "128", "--windows", "2"],
    "generate": ["--max-new-tokens", "4"],
    "tune": "--context 64 --batch 4 --tokens 256 --block-epochs 1".split(),
    "analyze": ["--role", "v"],
}
SIZES = {"60MB": "75KB"}  # a size of a page: one for the tiny model
TASKS = '{"instruction": "Name a river.", "context": "", "response": "The old river runs to the sea."}\n' * 40
# Snippets that do not use the library: the byte specification, a new format, the interface.
OF_OTHER_TESTS = ("artifact.md", "add_a_format.md", "layout.md")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path, language: str) -> list[list[str]]:
    """The arguments of every `reallm` command of a page, also of one that torchrun starts."""
    lines = [line for block in code_blocks(page, language) for line in block.splitlines()]
    split = (shlex.split(line.partition(" -- ")[2] or line, comments=True) for line in lines)
    return [words[1:] for words in split if words and words[0] == "reallm"]


def snippets(page: Path) -> list[str]:
    return [] if page.name in OF_OTHER_TESTS else code_blocks(page, "python")


@pytest.fixture(scope="module")
def prepared(tiny_llama, text_file, tmp_path_factory) -> Path:
    """What pages suppose: a model, texts, recipes, and an artifact with an adapter."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "MODEL").symlink_to(tiny_llama, target_is_directory=True)
    for name in ("text.txt", "wiki.test.raw"):
        (folder / name).write_bytes(text_file.read_bytes())
    (folder / "recipe.yaml").write_text(code_blocks(DOCS / "recipes.md", "yaml")[0], encoding="utf-8")
    (folder / "corrections.yaml").write_text(code_blocks(DOCS / "guides" / "budgets.md", "yaml")[0], encoding="utf-8")
    (folder / "dolly.jsonl").write_text(TASKS, encoding="utf-8")
    save_file({"weight": torch.randn(48, 64, generator=torch.Generator().manual_seed(0))}, folder / "state.safetensors")
    for line in (
        "compress {0}/MODEL -o {0}/OUT --recipe rtn4",
        "tune {0}/OUT -o {0}/ADAPTER --adapter 2 --text {0}/text.txt --loss ce --context 64 --batch 4 --tokens 256",
        "pack {0}/state.safetensors -o {0}/packed.bin --max-bytes 20000",
    ):
        assert main(line.format(folder).split()) == 0
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, which fills with links to what is prepared as a page asks for it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bring(prepared: Path, folder: Path, words: list[str]) -> None:
    """Link what is named and not made by the page."""
    made = [after for before, after in zip(words, words[1:], strict=False) if before == "-o"]
    for name in {word.partition("/")[0] for word in words if word not in made}:
        if (prepared / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(prepared / name)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "bash")], ids=name_of)
def test_the_commands_of_a_page_work_in_their_order(page, prepared, place, capsys):
    for words in commands(page, "bash"):
        bring(prepared, place, words)
        arguments = [*(SIZES.get(word, word) for word in words), *FOR_A_TINY_MODEL.get(words[0], [])]
        assert main(arguments) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), f"{shlex.join(words)} printed nothing"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "sh")], ids=name_of)
def test_commands_that_are_not_run_have_arguments_that_exist(page):
    for name, *arguments in commands(page, "sh"):
        typer.main.get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_the_snippets_of_a_page_work(page, prepared, place):
    for source in snippets(page):
        if "peft" in source and importlib.util.find_spec("peft") is None:
            continue
        made = re.findall(r'(?:compress|tune)\("\w+", "(\w+)"', source)
        bring(prepared, place, [word for word in re.findall(r'"([\w.]+)"', source) if word not in made])
        namespace: dict = {}
        exec(compile(source, str(page), "exec"), namespace)
        if "model" in namespace:
            ids = namespace["tokenizer"]("The old river", return_tensors="pt")["input_ids"]
            assert namespace["model"](ids).logits.isfinite().all()


def test_the_readme_is_short_and_shows_six_commands():
    assert len(README.read_bytes()) <= 10_000
    assert len(commands(README, "bash")) == 6


@pytest.mark.parametrize("page", [README, DOCS / "formats.md"], ids=name_of)
def test_every_format_is_in_the_table(page):
    text = page.read_text(encoding="utf-8")
    assert [name for name in known_formats() if f"\n| `{name}` |" not in text] == []


def test_every_page_is_in_the_navigation_or_an_index():
    shown = [ROOT / "mkdocs.yml", DOCS / "experiments" / "index.md"]
    listed = "".join(page.read_text(encoding="utf-8") for page in shown)
    pages = [page for page in DOCS.rglob("*.md") if page != shown[1]]
    assert [page for page in pages if f"{page.name}" not in listed] == []


def test_llms_txt_links_to_pages_that_exist():
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / "llms.txt").read_text(encoding="utf-8"))
    assert len(links) > 15 and [link for link in links if not (DOCS / link).is_file()] == []


def test_every_experiment_has_its_verdict_and_its_row_in_the_index():
    index = (DOCS / "experiments" / "index.md").read_text(encoding="utf-8")
    for page in sorted((DOCS / "experiments").glob("*.md")):
        if page.name == "index.md":
            continue
        title, _, line, *_ = page.read_text(encoding="utf-8").splitlines()
        date, verdict = re.match(r"([\d-]{10}) · verdict: \*\*(\w+)\*\*", line).groups()
        assert f"| {date} | [{title.removeprefix('# ')}]({page.name}) | {verdict} |" in index


def test_the_chart_is_drawn_from_the_results():
    spec = importlib.util.spec_from_file_location("chart", ROOT / "tools" / "chart.py")
    chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chart)
    assert chart.PICTURE.read_text(encoding="utf-8") == chart.picture(), "run: make docs"
