"""A line of progress on a terminal: by rich where it is installed, plainly where not, nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

#: ``say(done, total, what)``.
Say = Callable[[int, int, str], None]


@contextlib.contextmanager
def bar(shown: bool | None = None) -> Iterator[Say]:
    """Progress on stderr; ``shown`` None where stderr is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done, total, what: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        try:
            yield _plain
        finally:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


def _plain(done: int, total: int, what: str) -> None:
    print(f"\r\x1b[2K[{done}/{total}] {what}"[:200], end="", file=sys.stderr, flush=True)
