"""From a file to token ids, as the published numbers do it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reallm.errors import TextError


def load_text(path: str | Path, option: str = "--text") -> list[str]:
    """The documents of a UTF-8 file: one, save for `.jsonl`.

    * `.raw` (WikiText): lines become rows, a blank line the empty string, and rows are joined by a blank
      line. This is the text behind the published WikiText-2 numbers, not the file as it lies on disk.
    * `.jsonl`: the `text` field of each line is a document of its own.
    * anything else: the file as it is.

    TextError if the file is missing, which names the `option` that asked for it, is not text, or holds nothing but
    white space.
    """
    path = Path(path)
    text = _read(path, option)
    if path.suffix == ".raw":
        documents = [wikitext_rows(text)]
    elif path.suffix == ".jsonl":
        documents = [json_text(path, number, row, "text") for number, row in _json_rows(path, text)]
    else:
        documents = [text]
    if not any(document.strip() for document in documents):
        raise TextError(f"{path}: there is no text in this file")
    return documents


def json_rows(path: Path, option: str = "--text") -> list[tuple[int, Any]]:
    """(number of the line, what it holds) of a `.jsonl`, blank lines left out. Errors: as `load_text`."""
    return _json_rows(path, _read(path, option))


def json_text(path: Path, number: int, row: Any, field: str) -> str:
    """A field of a line. Errors: TextError naming the line and the fields it has, unless there is a string in it."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise TextError(f'{path}, line {number}: no "{field}" field with a string in it; {fields_of(row)}')
    return row[field]


def fields_of(row: Any) -> str:
    """What a line of JSON has, for errors."""
    return f"its fields are {', '.join(row) or 'none'}" if isinstance(row, dict) else "it is no object"


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
        raise TextError(f"{path}: no such file; {option} takes a .txt, .raw (WikiText) or .jsonl file")
    if not path.is_file():
        raise TextError(f"{path}: not a file; {option} takes one .txt, .raw (WikiText) or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start}); convert it or choose another file") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise TextError(f"{path}: holds zero bytes, so it is not text; choose another file")
    return text


def _json_rows(path: Path, text: str) -> list[tuple[int, Any]]:
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _json_row(path, number, line)) for number, line in lines if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{path}, line {number}: not JSON ({error.msg})") from None
