"""Task data: lines of JSON with what is asked and what is to be answered, as strings of which the answers count.

prompt, response              one string, as they stand; also prompt, completion
instruction, context,         Dolly's; also Alpaca's: input for context, output for response. With a chat template the
  response                    instruction and the context are the user's message, without one Alpaca's prompt is used
messages                      role and content of each; by the chat template, without one under headings of the roles
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reallm.errors import TextError
from reallm.model.text import fields_of, json_rows, json_text, leading_bos

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A part of an example; its tokens count in the loss or not."""

    text: str
    counted: bool


Example = tuple[Piece, ...]
ASSISTANT = "assistant"
KINDS = "text; prompt and response or completion; instruction (context or input) and response or output; messages"


def load_examples(path: str | Path, tokenizer: Any, option: str = "--text") -> list[Example] | None:
    """The examples of a `.jsonl` of task data, by the fields of its first line; None for any other file.

    A dialogue in which the chat template renders earlier answers otherwise than the last one (without their thoughts,
    for instance) becomes an example for each answer.
    Errors: TextError if the file cannot be read, naming the `option`, or naming the line and the fields that it has.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    rows = json_rows(path, option)
    first = rows[0][1] if rows and isinstance(rows[0][1], dict) else {}
    if (read := _reader(first)) is None:
        if first and "text" not in first:
            raise TextError(
                f'{path}, line {rows[0][0]}: no "text" field; its fields are {", ".join(first)}; {option} reads {KINDS}'
            )
        return None
    return [example for number, row in rows for example in read(path, number, row, tokenizer)]


def _reader(first: Row) -> Callable[..., list[Example]] | None:
    if "messages" in first:
        return _dialogue
    if "instruction" in first:
        return _instruction
    return _pair if first.keys() & {"prompt", "response", "completion"} else None


def _pair(path: Path, number: int, row: Any, _: Any) -> list[Example]:
    answer = "completion" if isinstance(row, dict) and "completion" in row else "response"
    prompt, response = (json_text(path, number, row, field) for field in ("prompt", answer))
    return [(Piece(prompt, False), Piece(response, True))]


def _instruction(path: Path, number: int, row: Any, tokenizer: Any) -> list[Example]:
    instruction = json_text(path, number, row, "instruction")
    response = json_text(path, number, row, "output" if "output" in row else "response")
    context = "input" if "input" in row else "context"
    extra = json_text(path, number, row, context) if row.get(context) is not None else ""
    if not getattr(tokenizer, "chat_template", None):
        return [(Piece(_alpaca(instruction, extra), False), Piece(response, True))]
    asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": response}]
    return _rendered(f"{path}, line {number}", messages, tokenizer)


def _alpaca(instruction: str, extra: str) -> str:
    """The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with or without an input."""
    paired = ", paired with an input that provides further context" if extra.strip() else ""
    given = f"### Input:\n{extra}\n\n" if extra.strip() else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def _dialogue(path: Path, number: int, row: Any, tokenizer: Any) -> list[Example]:
    where, messages = f"{path}, line {number}", row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise TextError(f'{where}: no "messages" field with a list in it; {fields_of(row)}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TextError(f'{where}: a message without "role" and "content", strings both; {fields_of(message)}')
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise TextError(f'{where}: no message of the role "{ASSISTANT}", so nothing to learn; its roles are {roles}')
    if getattr(tokenizer, "chat_template", None):
        return _rendered(where, messages, tokenizer)
    pieces = ((Piece(f"### {m['role'].capitalize()}:\n", False), _said(m)) for m in messages)
    return [tuple(piece for both in pieces for piece in both)]


def _said(message: Message) -> Piece:
    return Piece(f"{message['content']}\n\n", message["role"] == ASSISTANT)


def _rendered(where: str, messages: list[Message], tokenizer: Any) -> list[Example]:
    """By the chat template: the answers are what follows its prompt for an answer, up to the next message."""

    def text(count: int, asked: bool) -> str:
        try:
            made = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asked)
        except Exception as error:  # a template is a program of the model's author, and may refuse a role
            raise TextError(f"{where}: the model's chat template refuses these messages ({error})") from error
        # Windows begin with that token by themselves.
        return made.removeprefix(tokenizer.bos_token) if leading_bos(tokenizer) is not None else made

    places = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
    turns = [(text(place, True) if place else "", text(place + 1, False)) for place in places]
    for before, after in turns:
        if not after.startswith(before):
            raise TextError(
                f"{where}: the model's chat template renders an answer otherwise than it asks for it; "
                "give prompt and response in place of messages"
            )
    whole = turns[-1][1]
    if all(whole.startswith(after) for _, after in turns):
        return [_cut(whole, turns)]
    return [_cut(after, [(before, after)]) for before, after in turns]


def _cut(whole: str, turns: Sequence[tuple[str, str]]) -> Example:
    """A string in pieces: what is in it between `before` and `after` of each turn counts."""
    pieces, end = [], 0
    for before, after in turns:
        pieces += [Piece(whole[end : len(before)], False), Piece(whole[len(before) : len(after)], True)]
        end = len(after)
    return tuple(pieces)
