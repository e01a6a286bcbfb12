"""Tuning after compression: codes stay, and chosen float parts learn, block by block, end to end, or to a task."""

import sys
import types
from typing import Any

from reallm.tune.running import TuneResult, run, tune
from reallm.tune.settings import DEFAULT_TRAIN, LOSSES, METHODS, Settings

__all__ = ["DEFAULT_TRAIN", "LOSSES", "METHODS", "Settings", "TuneResult", "run", "tune"]


class _Callable(types.ModuleType):
    """`reallm.tune` is this room and, for users, a function as `reallm.compress` is: the room can be called."""

    def __call__(self, *arguments: Any, **settings: Any) -> TuneResult:
        return tune(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
