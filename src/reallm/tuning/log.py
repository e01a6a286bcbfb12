"""What happens during tuning, as events: JSON lines in a file, and whoever else listens."""

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
    """Collects events; `file` is appended to, so that a resumed run goes on in it."""

    file: Path | None = None
    listener: Listener | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Errors: RecipeError if the file cannot be appended to: better before the work than at its first event."""
        if self.file is None:
            return
        try:
            new = not self.file.exists()
            with self.file.open("a", encoding="utf-8"):
                pass
            if new:
                self.file.unlink()  # another check may still end the run
        except OSError as error:
            raise RecipeError(
                f"--log {self.file}: not a file in an existing folder that can be written ({error.strerror}); "
                "give another name"
            ) from error

    def add(self, **event: Any) -> None:
        """Note an event; numbers that are not finite become null in the file."""
        self.events.append(event)
        if self.listener is not None:
            self.listener(event)
        if self.file is not None:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain) + "\n")


class Throughput:
    """Tokens per second and the time left, from the steps since this process began."""

    def __init__(self, steps: int, done: int, tokens: int) -> None:
        self.steps, self.first, self.tokens, self.begun = steps, done, tokens, time.perf_counter()

    def rates(self, done: int) -> dict[str, float]:
        """`tokens_per_second` and `eta_seconds` once `done` steps are done."""
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        made = done - self.first
        return {
            "tokens_per_second": round(made * self.tokens / seconds, 1),
            "eta_seconds": round(seconds / made * (self.steps - done), 1) if made else math.nan,
        }
