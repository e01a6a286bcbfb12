import json

import pytest
import torch

from reallm.calibrate.text import json_rows, leading_bos, load_text, text_sha256, tokenize, wikitext_rows
from reallm.errors import TextError


class Letters:
    """A tokenizer of one token per character; <s> is 1, </s> is 2."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(character) for character in text]
        return {"input_ids": [1] * (self.adds_bos and add_special_tokens) + ids}


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_wikitext_lines_become_rows_joined_by_a_blank_line():
    assert wikitext_rows(" \n = Title = \n \n Some text .\n") == "\n\n = Title = \n\n\n\n\n Some text .\n"


def test_wikitext_rows_equal_those_read_line_by_line(tmp_path):
    path = write(tmp_path, "wiki.test.raw", " \n = A = \n\n b \n\x0c c\u2028d \n e")
    with path.open(encoding="utf-8") as file:
        expected = "\n\n".join(line if line.strip() else "" for line in file)
    assert load_text(path) == [expected]


def test_a_plain_text_is_one_document_as_it_is(tmp_path):
    assert load_text(write(tmp_path, "a.txt", "one\n\n two\n")) == ["one\n\n two\n"]


def test_windows_line_ends_and_a_byte_order_mark_do_not_reach_the_model(tmp_path):
    assert load_text(write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_each_line_of_a_json_file_is_a_document(tmp_path, name):
    path = write(tmp_path, name, '{"text": "one"}\n\n{"text": "two\\n", "id": 3}\n')
    assert load_text(path) == ["one", "two\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("indent", [None, 4])
def test_each_element_of_an_array_is_a_document_whatever_the_file_is_called(tmp_path, name, indent):
    array = json.dumps([{"text": "one"}, {"id": 3, "text": "two\n[{"}], indent=indent)
    assert load_text(write(tmp_path, name, f"\ufeff\r\n {array}\r\n\n")) == ["one", "two\n[{"]


@pytest.mark.parametrize("name", ["A.JSONL", "A.Json"])
def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path, name):
    path = write(tmp_path, name, '{"text": "one"}\n')
    assert load_text(path) == ["one"] and json_rows(path) is not None
    assert load_text(write(tmp_path, "A.RAW", "a\nb\n")) == [wikitext_rows("a\nb\n")]


@pytest.mark.parametrize("text", ["[Verse 1]\nOld river\n", '[{"text": "one"}]', "[", "[1] Frantar et al."])
def test_plain_text_that_begins_with_a_bracket_stays_as_it_is(tmp_path, text):
    for name in ("a.txt", "a", "a.md"):
        assert load_text(write(tmp_path, name, text)) == [text]


def test_numbers_beyond_the_integer_limit_are_ignored(tmp_path):
    assert load_text(write(tmp_path, "a.json", f'[{{"text": "one", "id": {"9" * 5000}}}]')) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", " \n \n", "no text"),
        ("a.raw", "\n\n", "no text"),
        ("a.jsonl", '{"text": ""}\n', "no text"),
        ("a.jsonl", '{"text": "x"}\n nope\n', "line 2, column 2: not JSON"),
        ("a.jsonl", '{"body": "x"}\n', 'line 1: no "text" field'),
        ("a.jsonl", "[1]\n", 'element 1: no "text" field with a string in it; it is no object'),
        ("a.json", "[]", "no text"),
        ("a.json", '[{"text": " "}]', "no text"),
        (
            "a.json",
            '[{"text": "x"}, {"body": "x"}]',
            'element 2: no "text" field with a string in it; its fields are body',
        ),
        ("a.json", '["x", "y"]', "element 1: no"),
        ("a.json", '[{"\\n\\u001b": 1}]', r"its fields are '\n\x1b'"),
        ("a.json", '[[{"text": "x"}]]', "element 1: no"),
        ("a.json", '[{"text": "x"},\n {"text": y}]', "line 2, column 11: not JSON"),
        ("a.json", '[{"text": "x"},\n]', "not JSON"),
        ("a.json", '[\n{"text": "x"}', "line 2, column 14: not JSON"),
        ("a.json", '[{"text": "x"}]\n[{"text": "y"}]', "line 2, column 1: not JSON (Extra data)"),
        ("a.json", "[Verse 1]\nOld river\n", "line 1, column 2: not JSON"),
        ("a.json", "Old river\n", "a .txt is read as it is"),
        ("a.json", '{\n  "text": "x"\n}\n', "line 1, column 2: not JSON"),
        ("a.json", '{"data": [{"text": "x"}]}', 'line 1: no "text" field with a string in it; its fields are data'),
        ("a.json", "[" * 200_000, "line 1 is nested too deep"),
        ("a.jsonl", '{"text": "x"}\n' + '{"a":' * 200_000, "line 2 is nested too deep"),
        ("a.json", '[{"text": "x \\ud83d"}]', 'element 1: \\ud83d in "text" is half of a character'),
        ("a.txt", b"\xff\xfe\x00a", "not UTF-8"),
        ("a.txt", b"GGUF\x00\x00", "zero bytes"),
    ],
)
def test_a_file_that_holds_no_text_is_named_in_one_line(tmp_path, name, content, says):
    path = write(tmp_path, name, content)
    with pytest.raises(TextError) as caught:
        load_text(path)
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(TextError, match="no such file; --text takes a .txt"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(TextError, match="not a file; --calibration takes one .txt"):
        load_text(tmp_path, "--calibration")


def test_the_hash_is_of_the_bytes_on_disk(tmp_path):
    path = write(tmp_path, "a.txt", "abc")
    assert text_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_documents_are_joined_by_the_end_of_text_token_and_nothing_else():
    ids = tokenize(Letters(adds_bos=True), ["ab", "c"])
    assert ids.dtype == torch.int64 and ids.tolist() == [97, 98, 2, 99]


def test_the_leading_token_is_found_by_asking_the_tokenizer():
    assert leading_bos(Letters(adds_bos=True)) == 1
    assert leading_bos(Letters()) is None
