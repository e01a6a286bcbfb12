import re
from pathlib import Path

import pytest

from reallm.cli import COMMANDS, main
from reallm.cli.reference import reference

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
def test_every_option_has_a_help_text(name):
    section = reference().split(f"## reallm {name}\n")[1].split("\n## ")[0]
    assert "None |" not in section


def test_torchrun_leaves_all_options_of_tune_to_it_as_the_help_starts_it():
    from torch.distributed.run import parse_args

    words = re.search(r"torchrun (.*?reallm tune) …", reference()).group(1).split()
    ours = ["OUT", "--log", "log.jsonl", "--text", "text.txt", "--tokens", "9"]
    assert parse_args([*words, *ours]).training_script_args == ["tune", *ours]
