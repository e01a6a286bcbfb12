"""Read text files into token ids, as the published perplexities do."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reallm.checkpoint.validation import suffix_of
from reallm.errors import TextError

_JSON = (".json", ".jsonl")
_MAX_DIGITS = 4000  # Python's default limit is 4,300


def load_text(path: str | Path, option: str = "--text") -> list[str]:
    """Return the documents of a UTF-8 file: one, except for `.json` and `.jsonl`.

    * `.raw` (WikiText): lines become rows, a blank line the empty string, and rows are joined by a blank
      line. This is the text behind the published WikiText-2 numbers, not the file as it lies on disk.
    * `.json`, `.jsonl`: the `text` field of each line, or of each element of an array, is a document of its own.
    * anything else: the file unchanged, even if it begins with a bracket.

    Errors: TextError if the file is missing (the message names `option`), is not text, or holds only white space; for
    JSON it names the line and column, or the element, that cannot be read.
    """
    path = Path(path)
    text = _read_text(path, option)
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
    """Return an iterator of (location for errors, value) over the rows of a `.json` or `.jsonl` file; None for others.

    Rows are non-blank lines, or the elements if the file is one array; both are numbered from 1.
    Errors: as `load_text`; for lines that are not JSON, when the iterator reaches them.
    """
    return _json_rows(path, _read_text(path, option)) if suffix_of(path) in _JSON else None


def json_text(where: str, row: Any, field: str) -> str:
    """Return the string in a field of a row. Errors: TextError naming the row and its fields if there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise TextError(f'{where}: no "{field}" field with a string in it; {describe_fields(row)}')
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # a tokenizer would refuse it with a TypeError
        half = f"\\u{ord(row[field][error.start]):04x}"
        raise TextError(f'{where}: {half} in "{field}" is half of a character: an unpaired surrogate') from None
    return row[field]


def describe_fields(row: Any) -> str:
    """Return the field names of a JSON row for an error message, in one line whatever the names contain."""
    if not isinstance(row, dict):
        return "it is no object"
    names = ", ".join(name if name.isprintable() else repr(name) for name in row)
    return f"its fields are {names or 'none'}"


def wikitext_rows(text: str) -> str:
    """Return a WikiText file's text as published results use it: rows joined by a blank line."""
    # Not str.splitlines: it also cuts at form feeds and Unicode separators, which are text here.
    lines = text.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return "\n\n".join(row if row.strip() else "" for row in rows)


def text_sha256(path: str | Path) -> str:
    """Return the SHA-256 of the file's bytes, as `sha256sum` prints it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tokenize(tokenizer: Any, documents: Sequence[str], enough: int | None = None) -> Int[Tensor, " n"]:
    """Return the token ids of the documents, each tokenized as one string, with the end-of-text token between them.

    Documents after the first `enough` tokens are not read.
    No other special token is added: `perplexity.windows` puts `leading_bos(tokenizer)` where it belongs.
    """
    ids: list[int] = []
    for number, document in enumerate(documents):
        if enough is not None and len(ids) >= enough:
            break
        if number and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        # verbose=False: no warning about texts longer than the model's maximum, windows are cut later.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def leading_bos(tokenizer: Any) -> int | None:
    """Return the begin-of-text token id if this tokenizer prepends it to a text, else None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def _read_text(path: Path, option: str) -> str:
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
    # By content, not by suffix: arrays and lines occur under both suffixes. A line of task data is an object.
    if text.lstrip().startswith("["):
        for number, element in enumerate(_parse_json(path, text), start=1):
            yield f"{path}, element {number}", element
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse_json(path, line, number)


def _parse_int(digits: str) -> int | float:
    """Return a number; one with more digits than Python's limit for integers becomes a float: only strings are used."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _parse_json(path: Path, text: str, line: int = 1) -> Any:
    """Return the value of a JSON text that begins at this line of the file."""
    try:
        return json.loads(text, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise TextError(
            f"{where}: not JSON ({error.msg}); {' and '.join(_JSON)} files hold an object in each line or one array of "
            "objects, a .txt is read as it is"
        ) from None
    except RecursionError:
        raise TextError(f"{path}: the value in line {line} is nested too deep") from None
