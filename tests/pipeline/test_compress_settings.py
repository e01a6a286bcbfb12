"""What may be given in Python in place of the command line's words."""

from pathlib import Path

import pytest

import reallm
from reallm.errors import RecipeError, TextError
from reallm.pipeline.compress_settings import make_settings


@pytest.mark.parametrize("size", ["75KB", "75000", 75_000])
def test_a_size_may_be_text_as_on_the_command_line(size):
    assert make_settings(size=size).size == 75_000


@pytest.mark.parametrize("given", ["text.txt", Path("text.txt"), ["text.txt"], (Path("text.txt"),)])
def test_one_text_or_pattern_is_as_good_as_a_list_of_one(given):
    for name in ("calibration", "include", "exclude"):
        assert getattr(make_settings(**{name: given}), name) == ("text.txt",)


def test_recipes_and_folders_may_be_paths():
    assert make_settings(recipe=Path("a.yaml"), analysis=Path("b")).recipe == "a.yaml"
    assert make_settings(recipe=None, calibration=None).calibration == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 7.5e4}, "size=75000.0 is of type float; give bytes as an int, or text such as '60MB'"),
        ({"size": True}, "size=True is of type bool"),
        ({"size": "many"}, "'many' is not a size"),
        ({"calibration": 3}, "calibration=3 is of type int; give text, or a list of texts"),
        ({"include": [1]}, "include=1 is of type int"),
        ({"recipe": 4}, "recipe=4 is of type int"),
        ({"bits": "3"}, "bits='3' is of type str; give a number"),
    ],
)
def test_what_is_of_another_type_is_named_with_it(values, message):
    with pytest.raises(RecipeError) as caught:
        make_settings(**values)
    assert message in str(caught.value)


def test_compress_reads_one_text_as_one_file(tiny_llama, tmp_path):
    with pytest.raises(TextError, match=r"missing\.txt: no such file"):
        reallm.compress(tiny_llama, tmp_path / "out", size="75KB", calibration=str(tmp_path / "missing.txt"))
