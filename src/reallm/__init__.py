"""Compress Hugging Face language models to a stated number of bits.

    import reallm
    reallm.compress("folder-or-hub-id", "out", bits=3)
    model, tokenizer = reallm.load("out"), reallm.load_tokenizer("out")

After `import reallm`, `AutoModelForCausalLM.from_pretrained("out")` works too, whichever of the two
was imported first.
"""

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
import types
import warnings

try:
    __version__ = importlib.metadata.version("reallm-compress")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "compress", "load", "load_tokenizer", "pack", "tune", "unpack"]

# Importing transformers' quantizers costs 4 s, so `import reallm` does not: it waits until somebody
# else has imported what loads models, and only then tells it about our format. The module that holds
# `from_pretrained` is the one to wait for: when it is complete, so is `transformers.quantizers`.
_MODELING_UTILS = "transformers.modeling_utils"
_QUANTIZER = "reallm.hf.quantizer"


def _import_quantizer(module: types.ModuleType) -> None:
    """Import our quantizer, which registers itself through `_register_quantizer`.

    A failure is a warning: code that imports transformers for another model must go on working.
    """
    try:
        importlib.import_module(_QUANTIZER)
    except ImportError as error:
        warnings.warn(f"reallm: transformers cannot load compressed models: {error}", stacklevel=2)


def _register_quantizer(module: types.ModuleType) -> None:
    module.register_with_transformers()


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Calls a function with a module once that module's own import is complete.

    Two steps instead of one call, because either may come first: our quantizer imports transformers
    itself, and while it does so it is half made and has no function to call yet.
    """

    def __init__(self, callbacks: dict):
        self.callbacks = callbacks

    def find_spec(self, name, path=None, target=None):
        callback = self.callbacks.get(name)
        if callback is None:
            return None
        spec = self._find_spec_elsewhere(name, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap_exec_module(spec.loader, callback)
        return spec

    def _find_spec_elsewhere(self, name, path, target):
        # Not importlib.util.find_spec: it would ask us again, and forget hooks such as type checkers.
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        return next((spec for spec in specs if spec is not None), None)

    @staticmethod
    def _wrap_exec_module(loader, callback) -> None:
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            callback(module)

        loader.exec_module = exec_module  # every import has a loader of its own: no other module is touched


def _register() -> None:
    callbacks = {_MODELING_UTILS: _import_quantizer, _QUANTIZER: _register_quantizer}
    sys.meta_path.insert(0, _PostImportFinder(callbacks))
    if _MODELING_UTILS in sys.modules:
        _import_quantizer(sys.modules[_MODELING_UTILS])


_LAZY_EXPORTS = {
    "compress": "reallm.pipeline",
    "load": "reallm.hf",
    "load_tokenizer": "reallm.hf",
    "pack": "reallm.pipeline.pack_file",
    "tune": "reallm.tuning",
    "unpack": "reallm.checkpoint.unpack",
}


def __getattr__(name: str):
    if name in _LAZY_EXPORTS:
        return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module 'reallm' has no attribute {name!r}")


_register()
