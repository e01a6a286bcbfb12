"""Reading GGUF files through transformers, at a bearable speed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reallm.errors import SourceError
from reallm.model.silence import quiet


def require_gguf() -> None:
    """Errors: SourceError with the pip command if a package that reading GGUF needs is not installed."""
    import importlib.util

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise SourceError(f"reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` that read a GGUF file into dense weights."""
    import transformers

    arguments: dict[str, Any] = {"gguf_file": path.name}
    # Later transformers would keep the blocks of the file where a kernel for them is installed.
    if (config := getattr(transformers, "GgufConfig", None)) is not None:
        arguments["quantization_config"] = config(dequantize=True)
    return arguments


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, with the special tokens that the file states.

    transformers 5.16 takes the end of text from its defaults instead.
    """
    import gguf
    from transformers import AutoTokenizer

    with quiet(), fast_reader():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        fields = gguf.GGUFReader(str(path)).fields
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if (field := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            setattr(tokenizer, ours, tokenizer.convert_ids_to_tokens(int(field.parts[-1][0])))
    return tokenizer


@contextlib.contextmanager
def fast_reader() -> Iterator[None]:
    """Make gguf parse from a plain array, and without a bar of its own, while we use it.

    Every string of the vocabulary is a slice of the file; slices of a memmap run Python code each.
    A vocabulary of 49,152: 5.0 s before, 1.1 s after. And the map of tensor names, 20 ms, is asked for
    once a module instead of once. Config, tokenizer and weights each open the file anew: it is parsed once.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as legacy

    original = gguf.GGUFReader

    class PlainArrayReader(original):  # type: ignore[misc, valid-type]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if type(self.data) is not np.ndarray:
                self.data = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    def opened(path: Any, *more: Any) -> Any:
        return _parsed(PlainArrayReader, path, *more)

    bar = getattr(legacy, "tqdm", None)  # not one of those that transformers can switch off
    names = gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = opened, functools.lru_cache(names)
    legacy.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, legacy.tqdm = original, names, bar


_last: tuple[tuple[str, int, int], Any] | None = None


def _parsed(reader: Any, path: Any, *more: Any) -> Any:
    """The reader of a GGUF file: the one made last, if the file is still the same."""
    global _last
    state = os.stat(path)
    key = (os.path.realpath(path), state.st_size, state.st_mtime_ns)
    if more:  # to write into
        return reader(path, *more)
    if _last is None or _last[0] != key:
        _last = (key, reader(path))
    return _last[1]
