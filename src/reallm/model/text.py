"""From a file to token ids, as the published numbers do it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reallm.artifact.checks import suffix_of
from reallm.errors import TextError

_JSON = (".json", ".jsonl")
_MOST_DIGITS = 4000  # Python's limit is 4,300 unless it is told otherwise


def load_text(path: str | Path, option: str = "--text") -> list[str]:
    """The documents of a UTF-8 file: one, save for `.json` and `.jsonl`.

    * `.raw` (WikiText): lines become rows, a blank line the empty string, and rows are joined by a blank
      line. This is the text behind the published WikiText-2 numbers, not the file as it lies on disk.
    * `.json`, `.jsonl`: the `text` field of each line, or of each element of an array, is a document of its own.
    * anything else: the file as it is, also where it begins with a bracket.

    TextError if the file is missing, which names the `option` that asked for it, is not text, or holds nothing but
    white space; of JSON it names the line and column, or the element, that cannot be read.
    """
    path = Path(path)
    text = _read(path, option)
    if suffix_of(path) == ".raw":
        documents = [wikitext_rows(text)]
    elif suffix_of(path) in _JSON:
        documents = [json_text(where, row, "text") for where, row in _json_rows(path, text)]
    else:
        documents = [text]
    if not any(document.strip() for document in documents):
        raise TextError(f"{path}: there is no text in this file")
    return documents


def json_rows(path: Path, option: str = "--text") -> Iterator[tuple[str, Any]] | None:
    """(where it stands, for errors; what it holds) of each row of a `.json` or `.jsonl`; None for any other file.

    Rows are lines, blank ones left out, or the elements of the one array that the file is; both count from 1.
    Errors: as `load_text`; of lines that are not JSON when they are come to.
    """
    return _json_rows(path, _read(path, option)) if suffix_of(path) in _JSON else None


def json_text(where: str, row: Any, field: str) -> str:
    """A field of a row. Errors: TextError naming the row and the fields it has, unless there is text in it."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise TextError(f'{where}: no "{field}" field with a string in it; {fields_of(row)}')
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # a tokenizer would refuse it with a TypeError
        half = f"\\u{ord(row[field][error.start]):04x}"
        raise TextError(f'{where}: {half} in "{field}" is half of a character, a pair cut in two') from None
    return row[field]


def fields_of(row: Any) -> str:
    """What a row of JSON has, for errors, which are one line whatever is in the names."""
    if not isinstance(row, dict):
        return "it is no object"
    names = ", ".join(name if name.isprintable() else repr(name) for name in row)
    return f"its fields are {names or 'none'}"


def wikitext_rows(text: str) -> str:
    """A WikiText file's text in the form that the field measures: rows joined by a blank line."""
    # Not str.splitlines: it also cuts at form feeds and Unicode separators, which are text here.
    lines = text.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return "\n\n".join(row if row.strip() else "" for row in rows)


def text_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as `sha256sum` prints it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tokenize(tokenizer: Any, documents: Sequence[str], enough: int | None = None) -> Int[Tensor, " n"]:
    """Token ids of the documents, each as one string, with the end-of-text token between two of them.

    Documents behind the first `enough` tokens are not looked at.
    No other special token is added: `perplexity.windows` puts `leading_bos(tokenizer)` where it belongs.
    """
    ids: list[int] = []
    for number, document in enumerate(documents):
        if enough is not None and len(ids) >= enough:
            break
        if number and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        # verbose=False: "longer than the model's maximum" is true and wanted, windows are cut later.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def leading_bos(tokenizer: Any) -> int | None:
    """The begin-of-text token id if this tokenizer puts it before a text by itself, else None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def _read(path: Path, option: str) -> str:
    if not path.exists():
        raise TextError(f"{path}: no such file; {option} takes a .txt, .raw (WikiText), .json or .jsonl file")
    if not path.is_file():
        raise TextError(f"{path}: not a file; {option} takes one .txt, .raw (WikiText), .json or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start}); convert it or choose another file") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise TextError(f"{path}: holds zero bytes, so it is not text; choose another file")
    return text


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # By the content, not the name: both are found under either. A line of task data is an object and begins otherwise.
    if text.lstrip().startswith("["):
        for number, element in enumerate(_parsed(path, text), start=1):
            yield f"{path}, element {number}", element
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parsed(path, line, number)


def _integer(digits: str) -> int | float:
    """Of more digits than Python turns into an integer, where only strings are asked for, it is no error."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    """The JSON of a text that begins in this line of the file."""
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise TextError(
            f"{where}: not JSON ({error.msg}); {' and '.join(_JSON)} files hold an object in each line or one array of "
            "objects, a .txt is read as it is"
        ) from None
    except RecursionError:
        raise TextError(f"{path}: what begins in line {line} is nested too deep to be read") from None
