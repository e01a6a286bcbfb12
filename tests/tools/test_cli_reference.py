import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

from cli_reference import declared_names, reference
from reallm.cli import COMMANDS, main

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_command_reference_is_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == reference(), "run: make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_in_help_is_in_the_reference(name, capsys):
    main([name, "--help"])
    options = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    section = reference().split(f"## reallm {name}\n")[1].split("\n## ")[0]
    assert all(option in section for option in options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_states_its_name(name):
    command = importlib.import_module(f"reallm.cli.{name}").command
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters:
        info = hints[parameter].__metadata__[0]
        if type(info).__name__ == "OptionInfo":
            assert any(word.startswith("--") for word in declared_names(info)), f"reallm {name}: {parameter}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_the_reference_is_in_help(name, capsys):
    main([name, "--help"])
    helped = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    section = reference().split(f"## reallm {name}\n")[1].split("\n## ")[0]
    rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `-")]
    assert {option for row in rows for option in re.findall(r"--[a-z][a-z0-9-]+", row)} <= helped


def test_compress_and_plan_take_a_size(capsys):
    for name in ("compress", "plan"):
        main([name, "--help"])
        assert "--size" in capsys.readouterr().out.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    section = reference().split(f"## reallm {name}\n")[1].split("\n## ")[0]
    assert "None |" not in section


def test_torchrun_leaves_all_options_of_tune_to_it_as_the_help_starts_it():
    from torch.distributed.run import parse_args

    words = re.search(r"torchrun (.*?reallm tune) …", reference()).group(1).split()
    ours = ["OUT", "--log", "log.jsonl", "--text", "text.txt", "--tokens", "9"]
    assert parse_args([*words, *ours]).training_script_args == ["tune", *ours]
