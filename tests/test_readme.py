"""The README's first example prints what stands under it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dlkern import dispatch


@pytest.mark.skipif(dispatch.unavailable("cpu") is not None, reason=str(dispatch.unavailable("cpu")))
def test_the_first_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.delenv("DLKERN_BACKEND", raising=False)
    page = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)\.\.\.\n```", page, re.DOTALL)
    assert found is not None
    exec(found[1], {})
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = found[2].splitlines()
    assert len(shown) > 5
    assert printed[: len(shown)] == shown
