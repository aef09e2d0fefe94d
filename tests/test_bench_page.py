"""The roofline, --compare and --html of dlkern bench; nothing here looks at a time of its own."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from dlkern import cli
from dlkern.bench import cases, difference, measure, page, roofline
from dlkern.bench.results import Result

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = {"training": True, "format": "nchw", "dtype": "float32"}


def _result(case: str, ratios: list[float], **more: Any) -> Result:
    samples = {"eager": [1e-3 * r for r in ratios], "dlkern": [1e-3] * len(ratios)}
    comparison = measure.Comparison(samples, "eager", 1, 1, "cpu", False, True)
    return Result("op", "depthwise", case, "dlkern", NAMES, "eager", comparison=comparison, backend="cpu", **more)


def _facts(*results: Result) -> dict[str, Any]:
    return {
        "benchmark": "suite",
        "date": "2026-01-01 00:00 UTC",
        "commit": "0" * 40,
        "device": "a processor",
        "cpu": {"threads": 1},
        "versions": {"dlkern": "0.1.0", "torch": "2.14.0", "python": "3.11"},
        "rows": [result.as_dict() for result in results],
    }


# ------------------------------------------------------------------------------------- roofline
def _case(op: str, training: bool) -> cases.Case:
    found = cases.of(op, "cpu", batch=2, dtypes=(torch.float32,))
    return next(case for case in found if case.training is training and not case.residual)


def test_the_work_of_an_inference_is_counted_by_hand() -> None:
    case = _case("depthwise", False)
    n, c, h, w = case.shape
    _, k, oh, ow = case.out_shape
    taps = case.facts["kernel"] ** 2
    work = roofline.work(case)
    assert work.bytes == 4 * (n * c * h * w + n * k * oh * ow + k * taps)
    assert work.flops == 2 * n * k * oh * ow * taps + 4 * n * k * oh * ow


@pytest.mark.parametrize("op", list(cases.OPS))
def test_training_moves_and_computes_more(op: str) -> None:
    training, inference = (roofline.work(_case(op, flag)) for flag in (True, False))
    assert training.bytes > 2 * inference.bytes
    assert training.flops > 2 * inference.flops


def test_the_least_time_is_the_larger_of_the_two() -> None:
    peak = roofline.Peak(100.0, 1000.0)
    assert roofline.Work(200, 10).seconds(peak) == 2.0
    assert roofline.Work(10, 4000).seconds(peak) == 4.0


def test_half_data_moves_half_the_bytes() -> None:
    full, half = (
        roofline.work(next(c for c in cases.of("batch_norm_act", "cuda", dtypes=(d,)) if not c.residual))
        for d in (torch.float32, torch.bfloat16)
    )
    assert half.bytes * 2 == full.bytes
    assert half.flops == full.flops


def test_a_share_is_that_of_this_runs_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "peak", lambda *_: roofline.Peak(1e9, 1e15))
    case = _case("depthwise", False)
    least = roofline.work(case).bytes / 1e9
    facts = roofline.facts(case, 4 * least, torch.device("cpu"))
    assert facts["share"] == 0.25
    assert facts["least_ms"] == pytest.approx(least * 1e3, rel=1e-3)


# -------------------------------------------------------------------------------------- compare
def _compared(before: list[Result], after: list[Result]) -> difference.Difference:
    return difference.compare(_facts(*before), _facts(*after))


def test_what_moved_beyond_the_noise() -> None:
    quiet, noisy = [1.5, 1.51, 1.52, 1.5, 1.51], [1.0, 2.0, 1.5, 1.9, 1.1]
    before = [_result(name, quiet) for name in ("faster", "slower", "same")] + [_result("noisy", noisy)]
    after = [
        _result("faster", [2 * r for r in quiet]),
        _result("slower", [0.5 * r for r in quiet]),
        _result("same", [1.005 * r for r in quiet]),
        _result("noisy", [1.2 * r for r in noisy]),
    ]
    found = _compared(before, after)
    assert [row[0] for row in found.faster] == ["depthwise faster: dlkern"]
    assert [row[0] for row in found.slower] == ["depthwise slower: dlkern"]
    assert found.alike == 2
    assert "1.51 (1.50-1.51) -> 3.02" in difference.render(found)


def test_a_row_that_turned_red_or_is_gone() -> None:
    red = Result("op", "depthwise", "a", "dlkern", NAMES, "eager", red="dx: wrong")
    found = _compared([_result("a", [1.0] * 5), _result("b", [1.0] * 5)], [red])
    assert [row[0] for row in found.reddened] == ["depthwise a: dlkern"]
    assert [row[0] for row in found.only] == ["depthwise b: dlkern"]


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(_facts(_result("a", [1.0] * 5))))
    facts = _facts(Result("op", "depthwise", "a", "dlkern", NAMES, "eager", red="dx: wrong"))
    second.write_text(json.dumps({**facts, "device": "another"}))
    assert cli.main(["bench", "--compare", str(first), str(first)]) == 0
    assert "1 rows are where they were" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert "parity is red now (1)" in out
    assert "device: a processor -> another" in out


def test_compare_refuses_a_file_without_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    facts = _facts(_result("a", [1.0] * 5))
    del facts["date"]
    path.write_text(json.dumps(facts))
    assert cli.main(["bench", "--compare", str(path), str(path)]) == 2
    assert "no date" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", str(path), str(tmp_path / "nothing.json")]) == 2


# ----------------------------------------------------------------------------------------- html
class _Reader(HTMLParser):
    """Counts elements, checks that they close, and keeps the table, the scripts and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        self.ids += [str(given["id"])] if "id" in given else []
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def _page(monkeypatch: pytest.MonkeyPatch, *results: Result) -> _Reader:
    monkeypatch.setattr(page, "library", lambda: "var Plotly;")
    reader = _Reader()
    reader.feed(page.page(results, _facts(*results)))
    assert reader.open == []
    return reader


def test_the_page_has_every_row_and_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    share = {"share": 0.25}
    red = Result("op", "depthwise", "<b>&</script>", "dlkern", NAMES, "eager", red="dx: <wrong>")
    found = _page(monkeypatch, _result("first", [1.5] * 5, target=1.2, roofline=share), red)
    assert found.rows[0] == list(page._HEADS)
    assert found.rows[1] == [
        "depthwise", "first", "dlkern", "cpu", "1.000", "1.50", "1.50", "1.50", "1.2", "25%", "ok",
    ]  # fmt: skip
    assert found.rows[2][1] == "<b>&</script>"
    assert found.rows[2][-1] == "dx: <wrong>"
    assert found.addresses == ["data:,"]
    assert {"data", "charts"} <= set(found.ids)


def test_the_charts_hold_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _page(monkeypatch, _result("</script><i>", [1.0, 1.5, 2.0]))
    (chart,) = json.loads(found.scripts[0])
    (bars,) = chart["traces"]
    assert bars["x"] == [1.5]
    assert bars["y"] == ["</script><i>: dlkern"]
    assert bars["error_x"]["array"] == [pytest.approx(0.3)]


def test_without_plotly_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    assert cli.main(["bench", "--op", "depthwise", "--html", str(tmp_path / "a.html")]) == 1
    assert 'pip install "dlkern[bench]"' in capsys.readouterr().err


def test_the_library_is_inlined_whole() -> None:
    pytest.importorskip("plotly", reason="needs plotly")
    text = page.library()
    assert len(text) > 1_000_000
    assert "</script" not in text.lower()


@pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or BROWSER is None,
    reason="needs playwright, and chromium or google-chrome on the path",
)
def test_in_a_browser_it_sorts_it_draws_and_nothing_is_logged(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="needs plotly")
    from playwright.sync_api import sync_playwright

    results = [_result(name, [ratio] * 5) for name, ratio in (("b", 1.1), ("a", 10.0), ("c", 2.0))]
    path = tmp_path / "page.html"
    path.write_text(page.page(results, _facts(*copy.copy(results))))
    with sync_playwright() as driver:
        # no sandbox of its own where all is run as root, as in a container
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        logged: list[str] = []
        tab.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: logged.append(str(error)))
        tab.goto(path.as_uri())
        order = "Array.from(document.querySelector('tbody').rows).map(r => r.cells[1].textContent).join('')"
        assert tab.evaluate(order) == "bac"
        tab.click("th:nth-child(6) button")
        assert tab.evaluate(order) == "bca"
        tab.click("th:nth-child(6) button")
        assert tab.evaluate(order) == "acb"
        assert tab.locator("#charts .bars .point").count() == 3
        browser.close()
    assert logged == []
