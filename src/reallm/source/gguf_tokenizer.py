"""The tokenizer of a GGUF file, built by transformers and checked against the file's header."""

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

# Model type in the tokenizers library by `tokenizer.ggml.model`.
_MODELS = {"gpt2": "BPE", "llama": "BPE", "gemma4": "BPE", "t5": "Unigram"}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe")  # llama.cpp prepends the BOS token for these, with or without the flag

_WORDS = "The small rivers see 2024 houses, déjà vu: Straße 漢字 привет 🙂 return x1+3.14 internationalization"
_SAMPLE = f"{_WORDS}\n\tif  x == 12:\n    # end"


@dataclass(frozen=True)
class _TokenizerSpec:
    """The tokenizer as the header of a file describes it."""

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]  # ids by transformers' names
    adds: dict[str, bool]  # add_bos_token, add_eos_token
    rows: int | None  # of the embedding

    def spellings(self, token: str) -> tuple[str, ...]:
        """Return how the tokenizers library may spell a token: bytes as letters, spaces as underscores."""
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
    """Return the tokenizer of a GGUF file, with exactly the tokens and special tokens of the file.

    Errors: SourceError with the remedy if the file has none, if transformers cannot build it, or if the result differs
    from the file in type, vocabulary, merges or scores, splits special tokens, or is not reversible.
    """
    state = os.stat(path)
    return copy.deepcopy(_load_verified(path, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=1)  # used before a run, for its text and for saving: 3 s each for 49,152 tokens
def _load_verified(path: Path, size: int, changed: int) -> Any:
    import transformers

    spec = _read(path)
    remedy = "give the Hugging Face folder of the model, or pip install -U transformers"
    try:
        with silence_transformers(), fast_reader():
            built = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = _rebuild(built, spec)
    except Exception as problem:  # any file reaches the code of many families
        raise SourceError(
            f"{path}: transformers {transformers.__version__} cannot build its tokenizer of kind {spec.kind!r} "
            f"({error_line(problem)}); {remedy}"
        ) from problem
    if (reason := next(_mismatches(spec, tokenizer), None)) is not None:
        raise SourceError(
            f"{path}: its tokenizer as transformers {transformers.__version__} builds it differs from the file: "
            f"{reason}; {remedy}"
        )
    return tokenizer


def _read(path: Path) -> _TokenizerSpec:
    """Read the tokenizer's header fields. Errors: SourceError if the file holds no tokenizer or an inconsistent one."""
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
        adds["add_bos_token"] = bool(bos) and kind != "gemma4"  # as published: its chat template writes the BOS token
    if (eos := value("add_eos_token", None)) is not None:
        adds["add_eos_token"] = bool(eos)
    special = {name: value(f"{key}_token_id", None) for name, key in _SPECIAL.items()}
    rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    lists = (value("token_type", []), value("scores", []), value("merges", []))
    spec = _TokenizerSpec(kind, tokens, *lists, {n: int(i) for n, i in special.items() if i is not None}, adds, rows)
    if (reason := _contradiction(spec)) is not None:
        raise SourceError(f"{path}: its tokenizer is damaged: {reason}; give the Hugging Face folder of the model")
    return spec


def _contradiction(spec: _TokenizerSpec) -> str | None:
    """Return an inconsistency within a file's header; None if there is none."""
    count = len(spec.tokens)
    if spec.rows is not None and count > spec.rows:
        return f"it has {count:,} tokens, the embedding {spec.rows:,} rows"
    for name, values in (("types", spec.types), ("scores", spec.scores)):
        if values and len(values) != count:
            return f"it has {count:,} tokens and {len(values):,} {name}"
    for name, token in spec.special.items():
        if not 0 <= token < count:
            return f"{name} is {token}, of {count:,} tokens"
    if spec.kind == "gpt2" and not spec.merges:
        return "it is byte-level BPE without merges (tokenizer.ggml.merges)"
    if spec.kind == "t5" and not spec.scores:
        return "it is Unigram without scores (tokenizer.ggml.scores)"
    if spec.kind == "llama" and not (spec.merges or spec.scores):
        return "it has neither merges nor scores"
    return None


def _rebuild(built: Any, spec: _TokenizerSpec) -> Any:
    """Return a plain tokenizer: transformers' classes add their own tokens, with ids beyond the embedding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(built.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(spec.tokens)]
    _add_special_tokens(state, spec)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=built.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: spec.tokens[token] for name, token in spec.special.items()},
        **spec.adds,
    )


def _add_special_tokens(state: dict[str, Any], spec: _TokenizerSpec) -> None:
    """Add special tokens such as <｜User｜>, which byte-level files store as text and transformers reads as bytes."""
    if spec.kind != "gpt2":
        return
    vocab, known = state["model"]["vocab"], {token["id"] for token in state["added_tokens"]}
    places = {token: number for number, token in enumerate(stated.tokens)}
    made = {merge.replace(" ", "", 1) for merge in stated.merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and number not in known and token:
            if vocab.get(spelled := _byte_letters(token)) == number:
                vocab[token] = vocab.pop(spelled)
            state["added_tokens"].append({"id": number, "content": token, "special": kind == _CONTROL, **flags})
    state["added_tokens"].sort(key=lambda token: token["id"])


def _mismatches(spec: _TokenizerSpec, tokenizer: Any) -> Iterator[str]:
    """Yield the differences between a tokenizer and the file, the most informative first."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    expected = _MODELS.get(spec.kind, model["type"])
    if model["type"] != expected:
        yield f"it is {model['type']}, {spec.kind!r} is {expected}"
        return
    yield from _token_mismatches(spec, tokenizer)
    if expected == "BPE":
        yield from _merge_mismatches(spec, state)
    elif expected == "Unigram":
        yield from _score_mismatches(spec, model)
    yield from _split_special_tokens(spec, tokenizer)
    yield from _round_trip_mismatches(spec, tokenizer)


def _token_mismatches(spec: _TokenizerSpec, tokenizer: Any) -> Iterator[str]:
    vocab = tokenizer.get_vocab()
    by_id = {number: token for token, number in vocab.items()}
    for number, token in enumerate(spec.tokens):
        if (found := by_id.get(number)) == token:
            continue
        allowed = spec.spellings(token)
        duplicate = found is None and any(spelling in vocab for spelling in allowed)
        # T5's sentinel tokens are placeholders in the file.
        blank = re.fullmatch(r"\[PAD\d+\]", token) and re.fullmatch(r"<extra_id_\d+>", found or "")
        if found not in allowed and not duplicate and not blank:
            yield f"token {number} is {found!r}, in the file {token!r}"
    if more := sorted(number for number in by_id if number >= len(spec.tokens)):
        yield f"it has token {more[0]} ({by_id[more[0]]!r}), the file {len(spec.tokens):,} tokens"


def _merge_mismatches(spec: _TokenizerSpec, state: dict[str, Any]) -> Iterator[str]:
    if spec.merges:
        found = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"]["merges"]]
        if found != spec.merges:
            yield f"it has {len(found):,} merges, which are not the {len(spec.merges):,} of the file"
    elif spec.kind == "llama" and not _follows_merge_order(spec, state):
        yield "it merges a sample of text in another order than the file's scores"


def _follows_merge_order(spec: _TokenizerSpec, state: dict[str, Any]) -> bool:
    """Return whether a sample is merged by score, or by token order, which Gemma uses whatever its scores."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
    vocab = bare.get_vocab()
    spelled = [token if token in vocab else token.replace(" ", "▁") for token in spec.tokens]
    by_position = {token: float(position) for position, token in enumerate(spelled)}
    by_score = {token: -score for token, score in zip(spelled, spec.scores, strict=False)}
    orders = (
        [by_position, by_score]
        if len({by_score[t] for t in spelled if len(t) > 1 and t[0] != "<"}) > 1
        else [by_position]
    )
    sample = "".join(letter for letter in _WORDS if _can_encode(letter, spec.kind, vocab))
    found = bare.encode(sample, add_special_tokens=False).tokens
    text = sample if bare.normalizer is None else bare.normalizer.normalize_str(sample)
    words = [text] if bare.pre_tokenizer is None else [word for word, _ in bare.pre_tokenizer.pre_tokenize_str(text)]

    def apply_merges(ranks: dict[str, float]) -> list[str]:
        pieces = [piece for word in words for piece in _merge(word, ranks)]
        return [token for piece in pieces for token in _token_or_bytes(piece, vocab)]

    return found in map(apply_merges, orders)


def _merge(word: str, ranks: dict[str, float]) -> list[str]:
    """Return the pieces of a word: join the pair whose token has the lowest rank, until no pair is a token."""
    pieces = list(word)
    while True:
        pairs = [
            (ranks[joined], position)
            for position in range(len(pieces) - 1)
            if (joined := pieces[position] + pieces[position + 1]) in ranks
        ]
        if not pairs:
            return pieces
        _, position = min(pairs)
        pieces[position : position + 2] = [pieces[position] + pieces[position + 1]]


def _token_or_bytes(piece: str, vocab: dict[str, int]) -> Sequence[str]:
    return [piece] if piece in vocab else [f"<0x{byte:02X}>" for byte in piece.encode()]


def _score_mismatches(spec: _TokenizerSpec, model: dict[str, Any]) -> Iterator[str]:
    for number, ((token, score), expected) in enumerate(zip(model["vocab"], spec.scores, strict=False)):
        if abs(score - expected) > 1e-4 * max(1.0, abs(expected)):
            yield f"token {number} ({token!r}) has score {score:.4f}, in the file {expected:.4f}"


def _split_special_tokens(spec: _TokenizerSpec, tokenizer: Any) -> Iterator[str]:
    """Yield special tokens that are split when they occur in text, as chat templates write them."""
    vocab = tokenizer.get_vocab()
    rows = zip(range(len(spec.tokens)), spec.tokens, spec.types, strict=False)
    special = [(n, token) for n, token, kind in rows if kind in (_CONTROL, _USER_DEFINED) and token.strip()]
    encoded = tokenizer.backend_tokenizer.encode_batch([token for _, token in special], add_special_tokens=False)
    for (number, token), found in zip(special, encoded, strict=True):
        if vocab.get(token, number) not in found.ids:
            yield f"it splits special token {number} ({token!r}) into {len(found.ids)} pieces"


def _round_trip_mismatches(spec: _TokenizerSpec, tokenizer: Any) -> Iterator[str]:
    vocab = tokenizer.get_vocab()
    text = "".join(letter for letter in _SAMPLE if _can_encode(letter, spec.kind, vocab))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if spec.kind == "t5":  # its normalisation is not reversible
        text, back = (" ".join(unicodedata.normalize("NFKC", one).split()) for one in (text, back))
    if back != text:
        yield f"a sample of text decodes to {back[:60]!r}"


def _can_encode(letter: str, kind: str, vocab: dict[str, int]) -> bool:
    """Return whether a vocabulary can encode a letter."""
    if kind == "gpt2":
        return all(symbol in vocab for symbol in _byte_letters(letter))
    return letter.replace(" ", "▁") in vocab or all(byte in vocab for byte in _token_or_bytes(letter, {}))


def _byte_letters(text: str) -> str:
    """Return a text in byte-level BPE spelling: one letter per byte."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(text))
