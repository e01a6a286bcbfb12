"""Task data: JSON, in lines or an array, of what is asked and answered, as strings of which the answers count.

prompt, response              one string, as they stand; also prompt, completion
instruction, context,         Dolly's; also Alpaca's: input for context, output for response. With a chat template the
  response                    instruction and the context are the user's message, without one Alpaca's prompt is used
messages                      role and content of each; by the chat template, without one under headings of the roles
conversations                 ShareGPT's: messages of which each has from (human, gpt, system) and value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from reallm.calibrate.text import describe_fields, json_rows, json_text, leading_bos
from reallm.errors import TextError

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Segment:
    """A part of an example; its tokens count in the loss or not."""

    text: str
    loss_mask: bool


Example = tuple[Segment, ...]
ASSISTANT = "assistant"
KINDS = (
    "text; prompt and response or completion; instruction (context or input) and response or output; messages; "
    "conversations"
)
_SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT}


def load_examples(path: str | Path, tokenizer: Any, option: str = "--text") -> list[Example] | None:
    """The examples of a `.json` or `.jsonl` of task data, by the fields of its first row; None for any other file.

    A dialogue in which the chat template renders earlier answers otherwise than the last one (without their thoughts,
    for instance) becomes an example for each answer.
    Errors: TextError if the file cannot be read, naming the `option`, or naming the row and the fields that it has.
    """
    if (rows := json_rows(Path(path), option)) is None:
        return None
    where, first = next(rows, ("", None))
    if not isinstance(first, dict) or not first:
        return None
    if (read := _reader(first)) is None:
        if "text" not in first:
            raise TextError(f'{where}: no "text" field; {describe_fields(first)}; {option} reads {KINDS}')
        return None
    return [example for where, row in chain([(where, first)], rows) for example in read(where, row, tokenizer)]


def _reader(first: Row) -> Callable[..., list[Example]] | None:
    if first.keys() & {"messages", "conversations"}:
        return _dialogue
    if "instruction" in first:
        return _instruction
    return _pair if first.keys() & {"prompt", "response", "completion"} else None


def _pair(where: str, row: Any, _: Any) -> list[Example]:
    answer = "completion" if isinstance(row, dict) and "completion" in row else "response"
    prompt, response = (json_text(where, row, field) for field in ("prompt", answer))
    return [(Segment(prompt, False), Segment(response, True))]


def _instruction(where: str, row: Any, tokenizer: Any) -> list[Example]:
    instruction = json_text(where, row, "instruction")
    response = json_text(where, row, "output" if "output" in row else "response")
    context = "input" if "input" in row else "context"
    extra = json_text(where, row, context) if row.get(context) is not None else ""
    if not getattr(tokenizer, "chat_template", None):
        return [(Segment(_alpaca(instruction, extra), False), Segment(response, True))]
    asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": response}]
    return _render(where, messages, tokenizer)


def _alpaca(instruction: str, extra: str) -> str:
    """The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with or without an input."""
    paired = ", paired with an input that provides further context" if extra.strip() else ""
    given = f"### Input:\n{extra}\n\n" if extra.strip() else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def _dialogue(where: str, row: Any, tokenizer: Any) -> list[Example]:
    field = "conversations" if isinstance(row, dict) and "conversations" in row else "messages"
    dialogue = row.get(field) if isinstance(row, dict) else None
    if not isinstance(dialogue, list):
        raise TextError(f'{where}: no "{field}" field with a list in it; {describe_fields(row)}')
    messages = [_message(f"{where}, message {number}", message) for number, message in enumerate(dialogue, start=1)]
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise TextError(f'{where}: no message of the role "{ASSISTANT}", so nothing to learn; its roles are {roles}')
    if getattr(tokenizer, "chat_template", None):
        return _render(where, messages, tokenizer)
    pieces = ((Segment(f"### {m['role'].capitalize()}:\n", False), _message_segment(m)) for m in messages)
    return [tuple(piece for both in pieces for piece in both)]


def _message(where: str, message: Any) -> Message:
    """A message as chat templates take it, with whatever else is in it."""
    sharegpt = isinstance(message, dict) and "from" in message
    role, content = (
        json_text(where, message, field) for field in (("from", "value") if sharegpt else ("role", "content"))
    )
    return {**message, "role": _SHAREGPT_ROLES.get(role, role) if sharegpt else role, "content": content}


def _message_segment(message: Message) -> Segment:
    return Segment(f"{message['content']}\n\n", message["role"] == ASSISTANT)


def _render(where: str, messages: list[Message], tokenizer: Any) -> list[Example]:
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
        return [_split_turns(whole, turns)]
    return [_split_turns(after, [(before, after)]) for before, after in turns]


def _split_turns(whole: str, turns: Sequence[tuple[str, str]]) -> Example:
    """A string in pieces: what is in it between `before` and `after` of each turn counts."""
    pieces, end = [], 0
    for before, after in turns:
        pieces += [Segment(whole[end : len(before)], False), Segment(whole[len(before) : len(after)], True)]
        end = len(after)
    return tuple(pieces)
