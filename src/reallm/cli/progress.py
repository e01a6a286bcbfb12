"""Progress of long commands, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (matrix or phase, done, total) that draws a progress bar, or prints lines without a terminal.

    A phase begins with done = 0.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress(console)
        return
    columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(name: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(task)
            bar.update(task, description=name, completed=done, total=total)

        yield show


def _plain_progress(console: Any) -> Callable[[str, int, int], None]:
    """Return a callback that prints a line per 10 % and one when a phase begins."""
    tenths, last_done, last_total = 0, 0, 0

    def show(name: str, done: int, total: int) -> None:
        nonlocal tenths, last_done, last_total
        if done < last_done or total != last_total:
            tenths = 0
        last_done, last_total = done, total
        if done == 0 or done * 10 // total > tenths:
            tenths = done * 10 // total
            console.print(f"{10 * tenths:3d} %  {name}", highlight=False)

    return show
