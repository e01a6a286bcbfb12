"""Events of a tuning run: JSON lines in a file, and calls of a listener."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reallm.errors import RecipeError

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Log:
    """Collects events; `file` is opened for appending, so a resumed run continues it."""

    file: Path | None = None
    listener: Listener | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise RecipeError if the file cannot be appended to: before the work, not at the first event."""
        if self.file is None:
            return
        try:
            new = not self.file.exists()
            with self.file.open("a", encoding="utf-8"):
                pass
            if new:
                self.file.unlink()  # a later check may still refuse the run
        except OSError as error:
            raise RecipeError(
                f"--log {self.file}: not a file in an existing folder that can be written ({error.strerror}); "
                "give another name"
            ) from error

    def add(self, **event: Any) -> None:
        """Record an event; non-finite numbers become null in the file."""
        self.events.append(event)
        if self.listener is not None:
            self.listener(event)
        if self.file is not None:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain) + "\n")


class Throughput:
    """Tokens per second and remaining time, from the steps since this process started."""

    def __init__(self, steps: int, done: int, tokens: int) -> None:
        self.steps, self.first, self.tokens, self.start = steps, done, tokens, time.perf_counter()

    def rates(self, done: int) -> dict[str, float]:
        """Return `tokens_per_second` and `eta_seconds` after `done` steps."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        steps = done - self.first
        return {
            "tokens_per_second": round(steps * self.tokens / seconds, 1),
            "eta_seconds": round(seconds / steps * (self.steps - done), 1) if steps else math.nan,
        }
