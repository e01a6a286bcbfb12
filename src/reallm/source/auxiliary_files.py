"""Auxiliary files of a model folder, copied by type: tokenizer, processors, chat templates, licence."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reallm.checkpoint.validation import read_json
from reallm.errors import SourceError

# Data without code: settings, vocabularies, merges, templates. Tokenizers choose their file names freely.
SUFFIXES = (
    *(".json", ".jinja", ".txt", ".tsv", ".dict"),
    *(".model", ".spm", ".tiktoken", ".bpe", ".vocab", ".vocabulary", ".codes", ".merges"),
)
_BARE = ("vocab", "merges", "bpe", "codes")  # names without a suffix
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
PATTERNS = (*(f"*{suffix}" for suffix in SUFFIXES), *_BARE, *_LEGAL)
TEMPLATES = "additional_chat_templates"
# Not copied: written again, index of other weights, training state, or documentation.
_EXCLUDED = (
    *("config.json", "*.index.json", "adapter_config.json", "params.json", "quantize_config.json", "quant_config.json"),
    *("trainer_state.json", "training_args*", "*_results.json", "requirements*.txt", "readme*", ".*", "consolidated*"),
)
# Never copied, even if a tokenizer's settings name them: code, pickles, weights.
_NEVER = frozenset(
    ".py .pyc .so .dll .dylib .exe .sh .bat .js .ipynb .pkl .pickle .pt .pth .ckpt .bin .joblib .npy .npz .h5 .msgpack "
    ".safetensors .gguf .onnx .zip .tar .gz".split()
)
# Settings that may name files in subfolders; a subfolder with one of them holds a second tokenizer or processor.
SETTINGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "special_tokens_map.json")
LARGEST = 100_000_000  # bytes; the largest current tokenizer takes 40 MB


def auxiliary_files(folder: Path) -> list[Path]:
    """Return the files to copy in addition to config and weights: paths relative to the folder, sorted."""
    return sorted(file for file in _all_auxiliary_files(folder) if (folder / file).stat().st_size <= LARGEST)


def too_large_files(folder: Path) -> list[Path]:
    """Return auxiliary files that are larger than any tokenizer's and so are not copied."""
    return sorted(folder / file for file in _all_auxiliary_files(folder) if (folder / file).stat().st_size > LARGEST)


def _all_auxiliary_files(folder: Path) -> set[Path]:
    found = {Path(file.name) for file in folder.iterdir() if file.is_file() and _is_copied(file.name)}
    for subfolder in (entry for entry in folder.iterdir() if entry.is_dir() and _is_auxiliary_folder(entry)):
        found |= {file.relative_to(folder) for file in subfolder.iterdir() if file.is_file() and _is_copied(file.name)}
    return found | set(_settings_files(folder))


def _is_copied(name: str) -> bool:
    lower = name.lower()
    if any(fnmatch.fnmatchcase(lower, pattern) for pattern in _EXCLUDED) or Path(lower).suffix in _NEVER:
        return False
    return any(fnmatch.fnmatchcase(lower, pattern.lower()) for pattern in PATTERNS)


def _is_auxiliary_folder(place: Path) -> bool:
    """Return whether a subfolder holds templates, or a tokenizer or processor without another model."""
    if place.name == TEMPLATES:
        return True
    return not (place / "config.json").exists() and any((place / name).is_file() for name in SETTINGS)


def subfolder_files(folder: Path) -> list[str]:
    """Return the files in subfolders that the settings of a tokenizer or processor name, present or not."""
    return [word for word in _settings_strings(folder) if "/" in word and _may_be_copied(word)]


def _settings_files(folder: Path) -> Iterator[Path]:
    """Yield the existing files inside the folder that the settings of a tokenizer or processor name."""
    for word in _settings_strings(folder):
        path = folder / word
        if _may_be_copied(word) and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            yield Path(word)


def _settings_strings(folder: Path) -> Iterator[str]:
    for name in SETTINGS:
        if (folder / name).is_file():
            with contextlib.suppress(SourceError):  # loading the tokenizer reports damaged settings
                yield from _strings(read_json(folder / name, SourceError))


def _may_be_copied(word: str) -> bool:
    """Return whether a string of the settings may name a file to copy: no code, pickle or regenerated file."""
    path = Path(word)
    if not 0 < len(word) < 200 or not word.isprintable() or path.is_absolute() or ".." in path.parts or not path.name:
        return False
    excluded = any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _EXCLUDED)
    return not excluded and path.suffix.lower() not in _NEVER and not set(word) & set("*?[]")


def _strings(values: Any) -> Iterator[str]:
    """Yield every string in JSON values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _strings(value)
