"""Compress Hugging Face language models to a given number of bits per weight.

    import reallm
    reallm.compress("folder-or-hub-id", "out", bits=3)
    model, tokenizer = reallm.load("out"), reallm.load_tokenizer("out")

After `import reallm`, `AutoModelForCausalLM.from_pretrained("out")` works too, in either import order of reallm and
transformers.
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

# Importing transformers' quantizers takes 4 s, so `import reallm` does not import them: it registers the quantizer
# once other code has imported the module that defines `from_pretrained`. When that module is complete,
# `transformers.quantizers` is too.
_MODELING_UTILS = "transformers.modeling_utils"
_QUANTIZER = "reallm.hf.quantizer"


def _import_quantizer(module: types.ModuleType) -> None:
    """Import our quantizer, which `_register_quantizer` then registers.

    An ImportError becomes a warning: code that uses transformers for other models must keep working.
    """
    try:
        importlib.import_module(_QUANTIZER)
    except ImportError as error:
        warnings.warn(f"reallm: transformers cannot load compressed models: {error}", stacklevel=2)


def _register_quantizer(module: types.ModuleType) -> None:
    module.register_with_transformers()


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Call a function with a module once the import of that module is complete.

    Importing and registering the quantizer are two callbacks because either module may be imported first: the quantizer
    module itself imports transformers, and is incomplete while it does.
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
        # Not importlib.util.find_spec: it would call this finder again and skip other hooks, such as type checkers.
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        return next((spec for spec in specs if spec is not None), None)

    @staticmethod
    def _wrap_exec_module(loader, callback) -> None:
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            callback(module)

        loader.exec_module = exec_module  # each import has its own loader: no other module is affected


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
