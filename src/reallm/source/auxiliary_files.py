"""Auxiliary files of a model folder: tokenizer, processors, chat templates, licence; which travel, by their kind."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reallm.checkpoint.validation import read_json
from reallm.errors import SourceError

# Of data without code: settings, vocabularies, merges, templates. Tokenizers name their files as they like.
SUFFIXES = (
    *(".json", ".jinja", ".txt", ".tsv", ".dict"),
    *(".model", ".spm", ".tiktoken", ".bpe", ".vocab", ".vocabulary", ".codes", ".merges"),
)
_BARE = ("vocab", "merges", "bpe", "codes")  # names without a suffix
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
PATTERNS = (*(f"*{suffix}" for suffix in SUFFIXES), *_BARE, *_LEGAL)
TEMPLATES = "additional_chat_templates"
# Written again, of weights in other files, of the training, or for people.
_OTHERS = (
    *("config.json", "*.index.json", "adapter_config.json", "params.json", "quantize_config.json", "quant_config.json"),
    *("trainer_state.json", "training_args*", "*_results.json", "requirements*.txt", "readme*", ".*", "consolidated*"),
)
# Never copied, even where a tokenizer's settings name them: code, pickles, weights.
_NEVER = frozenset(
    ".py .pyc .so .dll .dylib .exe .sh .bat .js .ipynb .pkl .pickle .pt .pth .ckpt .bin .joblib .npy .npz .h5 .msgpack "
    ".safetensors .gguf .onnx .zip .tar .gz".split()
)
# Settings that may name files of sub-folders, and that make a sub-folder one of a second tokenizer or processor.
SETTINGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "special_tokens_map.json")
LARGEST = 100_000_000  # bytes; the largest tokenizer of today takes 40 MB


def auxiliary_files(folder: Path) -> list[Path]:
    """Return what travels with a model beside config and weights, as paths relative to its folder, sorted."""
    return sorted(file for file in _of_the_kind(folder) if (folder / file).stat().st_size <= LARGEST)


def too_large_files(folder: Path) -> list[Path]:
    """Return files of the same kind that are larger than any tokenizer's."""
    return sorted(folder / file for file in _of_the_kind(folder) if (folder / file).stat().st_size > LARGEST)


def _of_the_kind(folder: Path) -> set[Path]:
    found = {Path(file.name) for file in folder.iterdir() if file.is_file() and _travels(file.name)}
    for place in (place for place in folder.iterdir() if place.is_dir() and _is_auxiliary_folder(place)):
        found |= {file.relative_to(folder) for file in place.iterdir() if file.is_file() and _travels(file.name)}
    return found | set(_named(folder))


def _travels(name: str) -> bool:
    lower = name.lower()
    if any(fnmatch.fnmatchcase(lower, pattern) for pattern in _OTHERS) or Path(lower).suffix in _NEVER:
        return False
    return any(fnmatch.fnmatchcase(lower, pattern.lower()) for pattern in PATTERNS)


def _is_auxiliary_folder(place: Path) -> bool:
    """Whether a sub-folder holds templates, or a tokenizer or processor and no other model."""
    if place.name == TEMPLATES:
        return True
    return not (place / "config.json").exists() and any((place / name).is_file() for name in SETTINGS)


def named_below(folder: Path) -> list[str]:
    """Return files of sub-folders that the settings of a folder's tokenizer or processors name, there or not."""
    return [word for word in _words_of(folder) if "/" in word and _may_travel(word)]


def _named(folder: Path) -> Iterator[Path]:
    """Files inside the folder that the settings of a tokenizer or processor name."""
    for word in _words_of(folder):
        path = folder / word
        if _may_travel(word) and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            yield Path(word)


def _words_of(folder: Path) -> Iterator[str]:
    for name in SETTINGS:
        if (folder / name).is_file():
            with contextlib.suppress(SourceError):  # damaged ones are named by whoever loads the tokenizer
                yield from _words(read_json(folder / name, SourceError))


def _may_travel(word: str) -> bool:
    """Whether a word of the settings may name a file of the folder: no code, no pickle, none that is written again."""
    path = Path(word)
    if not 0 < len(word) < 200 or not word.isprintable() or path.is_absolute() or ".." in path.parts or not path.name:
        return False
    others = any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _OTHERS)
    return not others and path.suffix.lower() not in _NEVER and not set(word) & set("*?[]")


def _words(values: Any) -> Iterator[str]:
    """Every text in JSON values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _words(value)
