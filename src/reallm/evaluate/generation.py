"""Generate text with a model, streamed in pieces."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reallm.errors import ReallmError, SourceError, TextError

# Most tokens that are decoded again for each piece: without a limit its cost would grow with the answer.
REDECODED_TOKENS = 64


def generate_stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.1,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
) -> Iterator[str]:
    """Yield the answer to `prompt` in pieces; joined they are the whole answer, without special tokens.

    `temperature` 0 is greedy decoding; above 0 tokens are sampled from the most likely ones that together
    reach `top_p`, the same for the same `seed`. A `repetition_penalty` above 1 makes tokens that were
    already used less likely: without it the greedy output of a small model soon repeats itself.
    `chat` wraps the prompt (and `system`) in the tokenizer's chat template; None does so if there is one.
    Generation ends at the end-of-text token, after `max_new_tokens`, or at the model's last position.
    Closing the iterator early stops the model.

    Errors: SourceError if a chat template is requested and missing; TextError if the prompt is empty or too long, or
    an option is out of range.
    """
    input_ids = encode_prompt(tokenizer, prompt, chat=chat, system=system)
    settings = _sampling_options(temperature, top_p, repetition_penalty) | {
        "max_new_tokens": _remaining_tokens(model, input_ids.shape[1], max_new_tokens),
        "pad_token_id": _pad_token_id(model, tokenizer),
    }
    return _run(model, tokenizer, input_ids, settings, seed)


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None
) -> Int[Tensor, "1 n"]:
    """Return the token ids of the prompt, chat template and special tokens included.

    Errors: SourceError for a missing chat template, or one that refuses the prompt; TextError for an empty prompt, or a
    system message without a chat template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat is None:
        chat = template is not None
    if chat and template is None:
        raise SourceError("this tokenizer has no chat template: leave --chat out, or use --raw")
    if system is not None and not chat:
        raise TextError("a system message needs a chat template: leave --system out, or write it into the prompt")
    text = _chat_text(tokenizer, prompt, system) if chat else prompt
    # A chat template writes its own special tokens, <bos> included.
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise TextError("the prompt is empty")
    return torch.tensor([ids], dtype=torch.int64)


def _chat_text(tokenizer: Any, prompt: str, system: str | None) -> str:
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may refuse a role
        raise SourceError(f"the model's chat template refuses this prompt ({error}): use --raw") from error


def _sampling_options(temperature: float, top_p: float, repetition_penalty: float) -> dict[str, Any]:
    """Return the sampling options of `model.generate`.

    All are set, so that the defaults in a model's generation config do not make original and compressed model differ.
    Errors: TextError for a value out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise TextError(
            f"temperature {temperature}, top_p {top_p}, repetition_penalty {repetition_penalty}: "
            "temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0 are required"
        )
    greedy = temperature == 0
    return {
        "do_sample": not greedy,
        "temperature": None if greedy else temperature,
        "top_p": None if greedy else top_p,
        "top_k": None if greedy else 0,
        "repetition_penalty": repetition_penalty,
    }


def _remaining_tokens(model: Any, used: int, wanted: int) -> int:
    if wanted < 1:
        raise TextError(f"max_new_tokens {wanted}: at least 1 is needed")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return wanted
    if used >= limit:
        raise TextError(f"the prompt has {used} tokens, and the model's {limit} positions leave none for an answer")
    return min(wanted, limit - used)


def _pad_token_id(model: Any, tokenizer: Any) -> int | None:
    """Return a padding token id: one prompt is never padded, but without an id transformers prints a warning."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return None


class _StopGeneration(Exception):
    """Raised inside the generation thread to stop it when the iterator is closed."""


class _QueueStreamer:
    """A streamer for `model.generate`: passes new token ids from its thread to the reader."""

    def __init__(self):
        self.queue: queue.Queue = queue.Queue()
        self.stopped = threading.Event()
        self.prompt_seen = False

    def put(self, ids) -> None:
        if self.stopped.is_set():
            raise _StopGeneration
        if self.prompt_seen:
            self.queue.put(ids.flatten().tolist())
        self.prompt_seen = True  # the first call passes the prompt

    def end(self) -> None:
        """Do nothing: the thread itself reports its end, also after an error."""


def _run(model: Any, tokenizer: Any, input_ids: Tensor, settings: dict, seed: int) -> Iterator[str]:
    tokens = _QueueStreamer()
    thread = threading.Thread(target=_generate, args=(model, input_ids, settings, seed, tokens), daemon=True)
    thread.start()
    try:
        yield from _decode_stream(tokenizer, _receive(tokens.queue))
    finally:
        tokens.stopped.set()
        thread.join()


def _generate(model: Any, input_ids: Tensor, settings: dict, seed: int, tokens: _QueueStreamer) -> None:
    """Run `model.generate` in the thread; the last item in the queue is None, or the error."""
    try:
        torch.manual_seed(seed)
        input_ids = input_ids.to(_device(model))
        mask = torch.ones_like(input_ids)
        model.generate(input_ids=input_ids, attention_mask=mask, streamer=tokens, **settings)
        tokens.queue.put(None)
    except BaseException as error:
        tokens.queue.put(error)


def _device(model: Any) -> torch.device:
    # Token ids go to the device of the input embedding, also in a model spread over devices.
    embedding = model.get_input_embeddings()
    tensors = [*embedding.parameters(), *embedding.buffers(), *model.parameters(), *model.buffers()]
    return tensors[0].device


def _receive(tokens: queue.Queue) -> Iterator[list[int]]:
    while (item := tokens.get()) is not None:
        if isinstance(item, ReallmError):
            raise item
        if isinstance(item, BaseException):
            raise RuntimeError(f"generation failed: {item}") from item
        yield item


def _decode_stream(tokenizer: Any, batches: Iterator[list[int]]) -> Iterator[str]:
    """Yield text as tokens arrive. A character may consist of several tokens: it is yielded when it is complete."""
    ids: list[int] = []
    shown = ""  # the part of the text of `ids` that was yielded
    for batch in batches:
        ids += batch
        text = _decode(tokenizer, ids)
        whole = text.rstrip("\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if len(ids) > REDECODED_TOKENS and whole == text:
            # The last tokens are kept as context: many tokenizers drop the space before the first word.
            ids = ids[-8:]
            shown = _decode(tokenizer, ids)
    rest = _decode(tokenizer, ids)[len(shown) :]
    if rest:
        yield rest


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Clean-up would change text that was already yielded: "a ." becomes "a." once the full stop arrives.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
