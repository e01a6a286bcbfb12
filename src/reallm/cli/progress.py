"""How far a long command is, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (matrix or phase, done, in all) that draws a bar with the time left, or plain lines in a log.

    A phase begins with 0 done.
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
    """A line every tenth of the way, and one where a phase begins."""
    tenths, last, whole = 0, 0, 0

    def show(name: str, done: int, total: int) -> None:
        nonlocal tenths, last, whole
        if done < last or total != whole:
            tenths = 0
        last, whole = done, total
        if done == 0 or done * 10 // total > tenths:
            tenths = done * 10 // total
            console.print(f"{10 * tenths:3d} %  {name}", highlight=False)

    return show
