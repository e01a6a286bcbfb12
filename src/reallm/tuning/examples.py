"""Task data as JSON or JSON lines: prompts and responses, rendered to text whose loss mask covers the responses.

prompt, response              joined as they are; also prompt, completion
instruction, context,         Dolly; also Alpaca: input for context, output for response. With a chat template,
  response                    instruction and context are the user's message; without one, Alpaca's prompt is used
messages                      each with role and content; rendered by the chat template, or under headings of the roles
conversations                 ShareGPT: messages, each with from (human, gpt, system) and value
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
    """A part of an example whose tokens are all in the loss (`loss_mask`) or all outside it."""

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
    """Return the examples of a `.json` or `.jsonl` file of task data, or None for any other file.

    The fields of the first row decide the kind. If the chat template renders earlier responses differently from the
    last one (without reasoning, for instance), a dialogue becomes one example per response.
    Errors: TextError naming `option` if the file cannot be read, or naming the row and its fields.
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
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [{"role": "user", "content": question}, {"role": ASSISTANT, "content": response}]
    return _render(where, messages, tokenizer)


def _alpaca(instruction: str, extra: str) -> str:
    """Return the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with or without an input."""
    paired = ", paired with an input that provides further context" if extra.strip() else ""
    input_section = f"### Input:\n{extra}\n\n" if extra.strip() else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{input_section}### Response:\n"
    )


def _dialogue(where: str, row: Any, tokenizer: Any) -> list[Example]:
    field = "conversations" if isinstance(row, dict) and "conversations" in row else "messages"
    dialogue = row.get(field) if isinstance(row, dict) else None
    if not isinstance(dialogue, list):
        raise TextError(f'{where}: no "{field}" field with a list in it; {describe_fields(row)}')
    messages = [_message(f"{where}, message {number}", message) for number, message in enumerate(dialogue, start=1)]
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise TextError(
            f'{where}: no message has the role "{ASSISTANT}", so there is nothing to train on; its roles are {roles}'
        )
    if getattr(tokenizer, "chat_template", None):
        return _render(where, messages, tokenizer)
    segments = ((Segment(f"### {m['role'].capitalize()}:\n", False), _message_segment(m)) for m in messages)
    return [tuple(segment for pair in segments for segment in pair)]


def _message(where: str, message: Any) -> Message:
    """Return the message with role and content, as chat templates expect, and its other fields unchanged."""
    sharegpt = isinstance(message, dict) and "from" in message
    role, content = (
        json_text(where, message, field) for field in (("from", "value") if sharegpt else ("role", "content"))
    )
    return {**message, "role": _SHAREGPT_ROLES.get(role, role) if sharegpt else role, "content": content}


def _message_segment(message: Message) -> Segment:
    return Segment(f"{message['content']}\n\n", message["role"] == ASSISTANT)


def _render(where: str, messages: list[Message], tokenizer: Any) -> list[Example]:
    """Render by the chat template; a response is the text after the generation prompt, up to the next message."""

    def text(count: int, prompt: bool) -> str:
        try:
            rendered = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates are programs of the model's author and may reject a role
            raise TextError(f"{where}: the model's chat template rejects these messages ({error})") from error
        # `load_windows` begins every window with this token.
        return rendered.removeprefix(tokenizer.bos_token) if leading_bos(tokenizer) is not None else rendered

    places = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
    turns = [(text(place, True) if place else "", text(place + 1, False)) for place in places]
    for before, after in turns:
        if not after.startswith(before):
            raise TextError(
                f"{where}: the model's chat template renders a response that does not begin with its generation "
                "prompt; give prompt and response instead of messages"
            )
    whole = turns[-1][1]
    if all(whole.startswith(after) for _, after in turns):
        return [_split_turns(whole, turns)]
    return [_split_turns(after, [(before, after)]) for before, after in turns]


def _split_turns(whole: str, turns: Sequence[tuple[str, str]]) -> Example:
    """Split a string into segments; for each turn the text after `before`, up to the end of `after`, is in the loss."""
    segments, end = [], 0
    for before, after in turns:
        segments += [Segment(whole[end : len(before)], False), Segment(whole[len(before) : len(after)], True)]
        end = len(after)
    return tuple(segments)
