"""The tokenizer of a GGUF file, as transformers builds it, checked against what the file says."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reallm.errors import SourceError
from reallm.source.gguf import fast_reader, open_reader
from reallm.source.limits import error_line
from reallm.source.transformers_logging import silence_transformers

# What the kinds of `tokenizer.ggml.model` are in the tokenizers library.
_MODELS = {"gpt2": "BPE", "llama": "BPE", "gemma4": "BPE", "t5": "Unigram"}
_CONTROL, _USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe")  # llama.cpp puts the begin of text before these, flag or not

_WORDS = "The small rivers see 2024 houses, déjà vu: Straße 漢字 привет 🙂 return x1+3.14 internationalization"
_SAMPLE = f"{_WORDS}\n\tif  x == 12:\n    # end"


@dataclass(frozen=True)
class _Stated:
    """What the header of a file says of its tokenizer."""

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]  # ids by transformers' names
    adds: dict[str, bool]  # add_bos_token, add_eos_token
    rows: int | None  # of the embedding

    def spellings(self, token: str) -> tuple[str, ...]:
        """Return how a token may be written in the tokenizers library: bytes as letters, spaces as underscores."""
        return (token, _byte_letters(token) if self.kind == "gpt2" else token.replace(" ", "▁"))

    def has(self, number: int, token: str) -> bool:
        """Return whether a token of the tokenizers library is the file's of that number."""
        if number >= len(self.tokens):
            return False
        stated = self.tokens[number]
        # T5's blanks are placeholders in the file.
        blank = re.fullmatch(r"\[PAD\d+\]", stated) and re.fullmatch(r"<extra_id_\d+>", token)
        return token == stated or token in self.spellings(stated) or bool(blank)


def gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a GGUF file, with no tokens but the file's and the special tokens that it states.

    Errors: SourceError with the remedy if there is none, if transformers cannot build it, or builds another than the
    file says: of another kind, vocabulary, merges or scores, with special tokens that are cut, or not reversible.
    """
    state = os.stat(path)
    return copy.deepcopy(_checked(path, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=1)  # asked for before a run, for its text, and to be saved: 3 s each for 49,152 tokens
def _checked(path: Path, size: int, changed: int) -> Any:
    import transformers

    stated = _read_stated(path)
    remedy = "give the Hugging Face folder of the model, or pip install -U transformers"
    try:
        with silence_transformers(), fast_reader():
            built = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = _only_of_file(built, stated)
        reason = next(_misfits(stated, tokenizer), None)
    except Exception as problem:  # it is code of many families that meets any file
        raise SourceError(
            f"{path}: transformers {transformers.__version__} cannot build its tokenizer of kind {stated.kind!r} "
            f"({error_line(problem)}); {remedy}"
        ) from problem
    if reason is not None:
        raise SourceError(
            f"{path}: its tokenizer as transformers {transformers.__version__} builds it is not the file's: {reason}; "
            f"{remedy}"
        )
    return tokenizer


def _read_stated(path: Path) -> _Stated:
    """Errors: SourceError if the file holds no tokenizer, or one whose parts do not belong together."""
    reader = open_reader(path)
    try:
        stated = _stated_in(reader, path)
        reason = _contradiction(stated)
    except SourceError:
        raise
    except Exception as problem:  # values of other types than these keys have, text that is no UTF-8
        reason = error_line(problem)
    if reason is not None:
        raise SourceError(f"{path}: its tokenizer is damaged: {reason}; give the Hugging Face folder of the model")
    return stated


def _stated_in(reader: Any, path: Path) -> _Stated:
    def value(key: str, default: Any) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    tokens = value("tokens", [])
    if value("model", "none") in ("none", "no_vocab") or not tokens:
        raise SourceError(
            f"{path}: holds no tokenizer (tokenizer.ggml.model and .tokens); give the Hugging Face folder of the model"
        )
    kind, adds = str(value("model", "")), {}
    if (bos := value("add_bos_token", kind == "llama" or value("pre", "") in _LLAMA_3 or None)) is not None:
        adds["add_bos_token"] = bool(bos) and kind != "gemma4"  # as published: its chat template writes it
    if (eos := value("add_eos_token", None)) is not None:
        adds["add_eos_token"] = bool(eos)
    special = {name: value(f"{key}_token_id", None) for name, key in _SPECIAL.items()}
    rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    lists = (value("token_type", []), value("scores", []), value("merges", []))
    if not all(isinstance(one, list) for one in (tokens, *lists)) or not all(isinstance(t, str) for t in tokens):
        raise ValueError("its tokens, types, scores or merges are no lists")
    # llama.cpp writes its "no token", -1, as the largest number.
    ids = {name: int(number) for name, number in special.items() if number not in (None, -1, 0xFFFFFFFF)}
    return _Stated(kind, tokens, *lists, ids, adds, rows)


def _contradiction(stated: _Stated) -> str | None:
    """What in a file's own words cannot be."""
    count = len(stated.tokens)
    if stated.rows is not None and count > stated.rows:
        return f"it has {count:,} tokens, the embedding {stated.rows:,} rows"
    for name, values in (("types", stated.types), ("scores", stated.scores)):
        if values and len(values) != count:
            return f"it has {count:,} tokens and {len(values):,} {name}"
    for name, token in stated.special.items():
        if not 0 <= token < count:
            return f"{name} is {token}, of {count:,} tokens"
    if stated.kind == "gpt2" and not stated.merges:
        return "it is byte-level BPE without merges (tokenizer.ggml.merges)"
    if stated.kind == "t5" and not stated.scores:
        return "it is Unigram without scores (tokenizer.ggml.scores)"
    if stated.kind == "llama" and not (stated.merges or stated.scores):
        return "it has neither merges nor scores"
    return None


def _only_of_file(built: Any, stated: _Stated) -> Any:
    """A plain tokenizer: transformers' classes bring tokens of their own, with ids past the embedding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(built.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if stated.has(t["id"], t["content"])]
    _spell_out(state, stated)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=built.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: stated.tokens[token] for name, token in stated.special.items()},
        **stated.adds,
    )


def _spell_out(state: dict[str, Any], stated: _Stated) -> None:
    """Special tokens such as <｜User｜> lie in byte-level files as text; transformers takes them for bytes."""
    if stated.kind != "gpt2":
        return
    vocab, known = state["model"]["vocab"], {token["id"] for token in state["added_tokens"]}
    places = {token: number for number, token in enumerate(stated.tokens)}
    made = {merge.replace(" ", "", 1) for merge in stated.merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, (token, kind) in enumerate(zip(stated.tokens, stated.types, strict=False)):
        spelled = _byte_letters(token) if kind in (_CONTROL, _USER_DEFINED) else ""
        if not spelled or number in known or (spelled != token and spelled in made and spelled not in places):
            continue
        if spelled != token and vocab.get(spelled) == number:
            del vocab[spelled]
            vocab |= {token: number} | ({spelled: places[spelled]} if spelled in places else {})
        state["added_tokens"].append({"id": number, "content": token, "special": kind == _CONTROL, **flags})
    state["added_tokens"].sort(key=lambda token: token["id"])


def _misfits(stated: _Stated, tokenizer: Any) -> Iterator[str]:
    """What of a tokenizer is not as the file says, the most telling first."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    wanted = _MODELS.get(stated.kind, model["type"])
    if model["type"] != wanted:
        yield f"it is {model['type']}, {stated.kind!r} is {wanted}"
        return
    yield from _other_tokens(stated, tokenizer)
    if wanted == "BPE":
        yield from _other_merges(stated, state)
    elif wanted == "Unigram":
        yield from _other_scores(stated, model)
    yield from _cut_tokens(stated, tokenizer)
    yield from _not_reversible(stated, tokenizer)


def _other_tokens(stated: _Stated, tokenizer: Any) -> Iterator[str]:
    vocab = tokenizer.get_vocab()
    by_id = {number: token for token, number in vocab.items()}
    for number, token in enumerate(stated.tokens):
        if (found := by_id.get(number)) == token:
            continue
        twice = found is None and any(spelled in vocab for spelled in stated.spellings(token))
        if not twice and (found is None or not stated.has(number, found)):
            yield f"token {number} is {found!r}, in the file {token!r}"
    if more := sorted(number for number in by_id if number >= len(stated.tokens)):
        yield f"it has token {more[0]} ({by_id[more[0]]!r}), the file {len(stated.tokens):,} tokens"


def _other_merges(stated: _Stated, state: dict[str, Any]) -> Iterator[str]:
    if stated.merges:
        found = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"]["merges"]]
        if found != stated.merges:
            yield f"it has {len(found):,} merges, which are not the {len(stated.merges):,} of the file"
    elif stated.kind == "llama" and not _merges_as_stated(stated, state):
        yield "it merges a sample of text in another order than the file's scores say"


def _merges_as_stated(stated: _Stated, state: dict[str, Any]) -> bool:
    """Whether a sample is merged by the scores, or by the order of the tokens, which is Gemma's whatever its scores."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
    vocab = bare.get_vocab()
    spelled = [token if token in vocab else token.replace(" ", "▁") for token in stated.tokens]
    by_place = {token: float(place) for place, token in enumerate(spelled)}
    by_score = {token: -score for token, score in zip(spelled, stated.scores, strict=False)}
    orders = (
        [by_place, by_score] if len({by_score[t] for t in spelled if len(t) > 1 and t[0] != "<"}) > 1 else [by_place]
    )
    sample = "".join(letter for letter in _WORDS if _has(letter, stated.kind, vocab))
    found = bare.encode(sample, add_special_tokens=False).tokens
    text = sample if bare.normalizer is None else bare.normalizer.normalize_str(sample)
    words = [text] if bare.pre_tokenizer is None else [word for word, _ in bare.pre_tokenizer.pre_tokenize_str(text)]

    def merged(ranks: dict[str, float]) -> list[str]:
        pieces = [piece for word in words for piece in _merge(word, ranks)]
        return [token for piece in pieces for token in _or_bytes(piece, vocab)]

    return found in map(merged, orders)


def _merge(word: str, ranks: dict[str, float]) -> list[str]:
    """The pieces of a word: the pair that makes the token of the lowest rank is joined, until none makes one."""
    pieces = list(word)
    while True:
        pairs = [
            (ranks[both], place)
            for place in range(len(pieces) - 1)
            if (both := pieces[place] + pieces[place + 1]) in ranks
        ]
        if not pairs:
            return pieces
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def _or_bytes(piece: str, vocab: dict[str, int]) -> Sequence[str]:
    return [piece] if piece in vocab else [f"<0x{byte:02X}>" for byte in piece.encode()]


def _other_scores(stated: _Stated, model: dict[str, Any]) -> Iterator[str]:
    for number, ((token, score), wanted) in enumerate(zip(model["vocab"], stated.scores, strict=False)):
        if abs(score - wanted) > 1e-4 * max(1.0, abs(wanted)):
            yield f"token {number} ({token!r}) has score {score:.4f}, in the file {wanted:.4f}"


def _cut_tokens(stated: _Stated, tokenizer: Any) -> Iterator[str]:
    """Special tokens that text cannot say: chats are made of them."""
    vocab = tokenizer.get_vocab()
    rows = zip(range(len(stated.tokens)), stated.tokens, stated.types, strict=False)
    whole = [(n, token) for n, token, kind in rows if kind in (_CONTROL, _USER_DEFINED) and token.strip()]
    encoded = tokenizer.backend_tokenizer.encode_batch([token for _, token in whole], add_special_tokens=False)
    for (number, token), found in zip(whole, encoded, strict=True):
        if vocab.get(token, number) not in found.ids:
            yield f"it cuts special token {number} ({token!r}) into {len(found.ids)} pieces"


def _not_reversible(stated: _Stated, tokenizer: Any) -> Iterator[str]:
    vocab = tokenizer.get_vocab()
    text = "".join(letter for letter in _SAMPLE if _has(letter, stated.kind, vocab))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if stated.kind == "t5":  # its normalisation is one way
        text, back = (" ".join(unicodedata.normalize("NFKC", one).split()) for one in (text, back))
    if back != text:
        yield f"a sample of text comes back as {back[:60]!r}"


def _has(letter: str, kind: str, vocab: dict[str, int]) -> bool:
    """Whether a vocabulary has what a letter is written with."""
    if kind == "gpt2":
        return all(symbol in vocab for symbol in _byte_letters(letter))
    return letter.replace(" ", "▁") in vocab or all(byte in vocab for byte in _or_bytes(letter, {}))


def _byte_letters(text: str) -> str:
    """A text as byte-level BPE writes it: a letter a byte."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(text))
