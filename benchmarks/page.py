"""Pages with a part that is generated: what stands between two marks is replaced, and nothing else."""

from __future__ import annotations

from pathlib import Path


class PageError(Exception):
    """A page that is not there or lacks its marks; the message names it."""


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the generated part ``name``."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check(path: Path, name: str) -> None:
    """Raise PageError unless the page has both marks of the part, once each."""
    begin, end = marks(name)
    if not path.is_file():
        raise PageError(f"--write {path}: there is no such file")
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise PageError(f"{path} needs the lines {begin} and {end}, once each")


def replace(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of the part ``name``.

    Raises:
        PageError: see :func:`check`.
    """
    check(path, name)
    begin, end = marks(name)
    page = path.read_text()
    before, after = page.split(begin)[0], page.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
