"""``dlkern bench`` on problems of a few elements; nothing here looks at a time."""

from __future__ import annotations

import builtins
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from torch import nn

pytest.importorskip("rich")

import dlkern
from dlkern import cli, dispatch, info
from dlkern.bench import cases, measure, models, ops, sequences, suite
from dlkern.bench import parity as packaged_parity
from dlkern.bench.cases import atrous, base, batch_norm_act, conv_bn_act, depthwise, transposed

#: Ops whose cases come with a residual, too.
WITH_RESIDUAL = ("batch_norm_act", "conv_bn_act")
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

MODELS = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, returns=None):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Conv2d(4, 3, 1)
        self.returns = returns

    def forward(self, x):
        y = self.head(self.relu(self.bn(self.conv(x))))
        return {"out": y, "aux": y} if self.returns == "maps" else y.mean((2, 3))

def tiny():
    return Tiny()

def maps():
    return Tiny("maps")

def text():
    return nn.Embedding(5, 3)
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread has nothing to do here, and waits where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of a few elements instead of the ops' own."""
    monkeypatch.setattr(batch_norm_act, "SHAPES", ((5, 4, 3),))
    monkeypatch.setattr(depthwise, "SHAPES", (depthwise.Shape(4, 6),))
    monkeypatch.setattr(conv_bn_act, "SHAPES", (conv_bn_act.Shape(4, 5, 6, 3, stride=2),))
    monkeypatch.setattr(transposed, "SHAPES", (transposed.Shape(4, 3, 5),))
    monkeypatch.setattr(atrous, "SHAPES", (atrous.Shape(4, 5, (1, 2), separable=True, out_channels=3),))
    monkeypatch.setattr(depthwise, "SHAPES", (depthwise.Shape(4, 6),))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "bench_test_models.py"
    path.write_text(MODELS)
    return path


def bench(*arguments: object) -> int:
    """The command in this process, on the CPU and in no time."""
    return cli.main(["bench", "--device", "cpu", "--min-seconds", "0", "--batch", "2", *map(str, arguments)])


def wrong(plain: base.Plain) -> nn.Module:
    """dlkern's layer with a weight that is off by a thousandth."""
    made = batch_norm_act_fused(plain)
    with torch.no_grad():
        made.weight.mul_(1.001)
    return made


batch_norm_act_fused = batch_norm_act._fused


# -------------------------------------------------------------------------------------- cases
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("op", list(cases.OPS))
def test_cases_can_be_told_apart(op: str, device_type: str) -> None:
    found = cases.of(op, device_type)
    assert len({str(case) for case in found}) == len(found)
    assert len({json.dumps(case.facts, sort_keys=True) for case in found}) == len(found)
    quick = [case for case in found if case.quick]
    assert {case.training for case in quick} == {True, False}
    assert any(case.residual for case in quick) == (op in WITH_RESIDUAL)
    assert len({case.dtype for case in quick}) == 1
    assert {case.shape[0] for case in found} == {64 if device_type == "cuda" else 8}
    assert {str(case.dtype) for case in found} == (
        {"torch.float32", "torch.bfloat16", "torch.float16"} if device_type == "cuda" else {"torch.float32"}
    )


def test_the_wanted_shapes_are_there() -> None:
    found = {case.label for case in cases.of("conv_bn_act", "cpu")}
    assert found == {
        "8x64x56x56-to-64-k3",
        "8x256x56x56-to-64-k1",
        "8x512x7x7-to-512-k3",
        "8x128x56x56-to-128-k3s2",
        "8x3x224x224-to-64-k7s2",
    }
    targets = {str(case): case.target for case in cases.of("batch_norm_act", "cpu")}
    assert targets["8x256x56x56-nchw-training-float32"] == 2.0
    assert targets["8x64x56x56-channels_last-training-float32-residual"] == 1.5
    assert targets["8x256x56x56-nchw-inference-float32"] is None
    with pytest.raises(ValueError, match=r"op 'nonsense': expected one of batch_norm_act, conv_bn_act"):
        cases.of("nonsense", "cpu")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", list(cases.OPS))
def test_every_kind_of_case_runs(op: str, dtype: torch.dtype) -> None:
    found = cases.of(op, "cpu", batch=2, dtypes=(dtype,))
    assert len(found) == (8 if op in WITH_RESIDUAL else 4)  # layout, training, and residual
    for case in found:
        result = ops.run(case, "dlkern", CPU, 0.0)
        assert result.red is None, f"{case}: {result.red}"
        assert result.backend in dispatch._all_ops()[op].modules
        assert result.comparison is not None
        assert result.comparison.baseline == "eager"
        assert set(result.comparison.samples) == {"eager", "dlkern"}
        assert set(result.kept) == ({"eager", "dlkern"} if case.training else set())
        assert result.peak == {}
        assert case.facts["training"] == case.training


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("op", list(cases.OPS))
def test_each_result_of_a_call_is_held_to_the_rule(op: str) -> None:
    added, convolves = op in WITH_RESIDUAL, op in ("conv_bn_act", "depthwise", "transposed")
    case = next(c for c in cases.of(op, "cpu", batch=2) if c.training and c.residual == added)
    problem = cases.Problem(case, CPU)
    eager = problem.step(problem.module("eager"))
    names = problem.names()
    assert {"y", "dx"} <= set(names)
    assert ("dresidual" in names) == added
    assert ({"dbn.weight", "dbn.bias"} <= set(names)) == (added or op == "transposed")
    assert ("dconv.weight" in names) == convolves
    assert ("dblock.convs.1.0.0.weight" in names) == (op == "atrous")
    problem.check(eager, eager)
    for index, name in enumerate(names):

        def step(index: int = index) -> tuple[torch.Tensor, ...]:
            return tuple(t * 1.001 if i == index else t for i, t in enumerate(eager()))

        with pytest.raises(AssertionError, match=rf"^{name} \(torch.float32\): relative L2 error"):
            problem.check(step, eager)


def test_the_gradient_is_zero_where_rounding_decides(tiny: None) -> None:
    case = next(c for c in cases.of("batch_norm_act", "cpu", batch=2) if c.training)
    problem = cases.Problem(case, CPU)
    kept = problem._away_from_the_kink()
    assert 0.5 < kept.mean() <= 1
    problem.wide.bn.weight.data.zero_()  # as far from PyTorch's z as can be: nothing is away from the kink
    problem.wide.bn.bias.data.zero_()
    assert problem._away_from_the_kink().sum() == 0


def test_one_rule_for_tests_and_benchmarks() -> None:
    assert parity.assert_parity is packaged_parity.assert_parity
    assert parity.assert_elementwise is packaged_parity.assert_elementwise


# ---------------------------------------------------------------------------------- ops by CLI
@pytest.mark.usefixtures("tiny")
def test_bench_of_an_op_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    written = ["--json", files["json"], "--csv", files["csv"], "--plot", files["png"]]
    assert bench("--op", "batch_norm_act", "--train", *written) == 0
    printed = capsys.readouterr()
    assert "2x5x4x3-nchw-training-float32" in printed.out
    assert "RED" not in printed.out
    assert printed.err.splitlines()[0] == "[1/3] batch_norm_act 2x5x4x3-nchw-training-float32: dlkern"
    assert files["png"].read_bytes().startswith(b"\x89PNG")

    facts = json.loads(files["json"].read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] == info.cpu()["model"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["settings"]["ops"] == ["batch_norm_act"]
    assert {"date", "commit", "load_average", "environment_missing", "extension"} <= set(facts)
    assert [row["case"] for row in facts["rows"]] == [
        "2x5x4x3-nchw-training-float32",
        "2x5x4x3-nchw-training-float32-residual",
        "2x5x4x3-channels_last-training-float32",
    ]
    for row in facts["rows"]:
        assert row["parity"] == "ok"
        assert row["shape"] == [2, 5, 4, 3]
        assert row["measured"]["rounds"] >= 7
        assert row["ratio"] == pytest.approx(row["measured"]["ratio"]["dlkern"]["paired"][0], abs=1e-3)
        assert set(row["kept_for_backward_mb"]) == {"eager", "dlkern"}

    with files["csv"].open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [line["case"] for line in table] == [row["case"] for row in facts["rows"]]
    for line, row in zip(table, facts["rows"], strict=True):
        assert float(line["ratio_median"]) == pytest.approx(row["ratio"], abs=1e-3)
        assert float(line["candidate_median_ms"]) == row["measured"]["milliseconds"]["dlkern"][0]
        assert line["mode"] == "training"
        assert line["parity"] == "ok"
        assert line["torch"] == torch.__version__
        assert int(line["baseline_kept_for_backward_bytes"]) > 0


@pytest.mark.usefixtures("tiny")
def test_a_red_row_shows_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm_act, "_fused", wrong)
    timed: list[Any] = []
    monkeypatch.setattr(measure, "compare", lambda *a, **k: timed.append(a))
    files = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--plot", tmp_path / "r.png"]
    assert bench("--op", "batch_norm_act", "--cases", "nchw-inference-float32", *files) == 1
    assert timed == []
    printed = capsys.readouterr().out
    assert "PARITY IS RED in 2 of 2 rows" in printed
    assert "RED, not timed: batch_norm_act 2x5x4x3-nchw-inference-float32 dlkern\ny (torch.float32)" in printed
    for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
        assert row["parity"].startswith("y (torch.float32): relative L2 error")
        assert row["ratio"] is None
        assert "measured" not in row
    with (tmp_path / "r.csv").open(newline="") as lines:
        for line in csv.DictReader(lines):
            assert {v for k, v in line.items() if k.endswith("_ms") or k.startswith("ratio")} == {""}
    assert not (tmp_path / "r.png").exists()


@pytest.mark.usefixtures("tiny")
def test_a_row_that_raises_is_red_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(plain: base.Plain) -> nn.Module:
        if plain.bn.training:
            raise KeyError("planned")
        return batch_norm_act_fused(plain)

    monkeypatch.setattr(batch_norm_act, "_fused", fused)
    settings = suite.Settings(ops=("batch_norm_act",), only="nchw", batch=2, device="cpu", min_seconds=0.0)
    found = {result.case: result for result in suite.run(settings, suite.plan(settings))}
    assert found["2x5x4x3-nchw-training-float32"].red == "KeyError: 'planned'"
    assert found["2x5x4x3-nchw-training-float32"].comparison is None
    assert found["2x5x4x3-nchw-inference-float32"].red is None


@pytest.mark.usefixtures("tiny")
def test_a_forced_backend_runs_or_says_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlkern.kernels.reference import batch_norm_act as reference

    arguments = ("--op", "batch_norm_act", "--cases", "nchw-inference-float32-residual", "--backend", "reference")
    assert bench(*arguments) == 0
    assert "dlkern-reference" in capsys.readouterr().out
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(reference, "supports", lambda request: "planned")
    assert bench(*arguments) == 0
    printed = capsys.readouterr().out
    assert "not run: backend 'reference' was forced for batch_norm_act but cannot run it: planned" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "nonsense"), "--op nonsense: expected one of batch_norm_act"),
        (("--dtype", "int8"), "--dtype int8: expected one of float32, bfloat16, float16"),
        (("--backend", "fast"), "--backend fast: expected one of torch"),
        (("--op", "batch_norm_act", "--cases", "no such"), "no case is left to run: dlkern bench --list"),
        (("--model", "nonsense"), "MODEL 'nonsense': expected torchvision:NAME"),
        (("--model", "{models}:absent"), "has no 'absent'"),
        (("--model", "{models}:text"), "expected a model of images, but it does not take 2x3x9x9"),
        (("--json", "out.txt"), "--json out.txt: expected a name that ends in .json"),
        (("--plot", "out.csv"), "--plot out.csv: expected a name that ends in .png"),
        (("--csv", "/no/such/folder/out.csv"), "there is no folder /no/such/folder"),
        (("--list", "--op", "nonsense"), "--op nonsense: expected one of"),
    ],
)
def test_bench_refuses(
    arguments: tuple[str, ...], message: str, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(models=model_file) for argument in arguments]
    assert bench("--image-size", 9, *filled) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--min-seconds", "-1"), ("--batch", "0"), ("--train", "--infer")])
def test_bench_refuses_what_argparse_can_tell(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2


def test_bench_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def fake(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("rich", "matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(suite.importlib, "import_module", fake)
    assert bench("--op", "batch_norm_act") == 1
    assert "rich does not import (No module named 'rich'); pip install \"dlkern[bench]\"" in capsys.readouterr().err


def test_bench_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--dtype", "bfloat16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch_norm_act: 32 cases (* in the quick suite)" in lines
    assert "  * 2x64x56x56-nchw-training-bfloat16" in lines
    assert "    2x256x28x28-nchw-training-bfloat16-residual" in lines
    assert "  * torchvision:resnet18 2x96x96-nchw-inference-bfloat16" in lines


def test_bench_restarts_its_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlkern.bench import command

    done: list[str] = []
    monkeypatch.setattr(measure, "restart_stable", lambda: done.append("restart"))
    monkeypatch.setattr(command, "run", lambda settings: done.append("run") or 0)
    assert bench() == 0
    assert done == ["run"]
    monkeypatch.setattr(sys, "argv", ["dlkern", "bench"])
    assert cli.main() == 0
    assert done == ["run", "restart", "run"]


# ------------------------------------------------------------------------------------- models
def test_bench_of_a_model(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.json"
    assert bench("--model", f"{model_file}:tiny", "--image-size", 8, "--json", out) == 0
    assert "plain model" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["row"], row["training"]) for row in rows if row["row"] == "swapped"] == [
        ("swapped", True),
        ("swapped", False),
    ]
    for row in rows:
        assert row["parity"] == "ok"
        assert row["ratio_of_equals"] > 0
        assert {"plain", "plain again", row["row"]} <= set(row["measured"]["milliseconds"])
        assert set(row["kept_for_backward_mb"]) == ({"plain", "swapped"} if row["training"] else set())


def test_a_model_with_maps_in_a_dict_and_half_precision_trains(model_file: Path) -> None:
    case = models.ModelCase(f"{model_file}:maps", True, 2, 8, torch.bfloat16, "channels_last")
    problem = models.ModelProblem(case, CPU)
    assert problem.labels.shape == (2, 6, 6)
    (result,) = models.run(problem, names=["swapped"], min_seconds=0.0, min_rounds=2)
    assert result.red is None
    assert all(parameter.dtype == torch.float32 for parameter in problem.plain.parameters())


@pytest.mark.usefixtures("own_answers")
@pytest.mark.parametrize("training", [True, False])
def test_a_measured_swap_is_a_candidate_and_sequences_are_samples(training: bool) -> None:
    problem = models.ModelProblem(models.ModelCase("dlkern.bench.sequences:gru", training, 8, 8), CPU)
    assert problem.images.shape == (8, *sequences.Classifier.sample_shape)
    (result,) = models.run(problem, names=["measured"], min_seconds=0.0, min_rounds=2)
    assert result.red is None
    assert set(result.kept) == ({"plain", "measured"} if training else set())


def test_a_red_model_shows_no_time(
    model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dlkern.swap

    def swap(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.conv.weight.mul_(1.01)  # type: ignore[union-attr, operator]
        return real(model)

    monkeypatch.setattr(dlkern, "swap", swap)
    assert bench("--model", f"{model_file}:tiny", "--image-size", 8, "--infer") == 1
    printed = capsys.readouterr().out
    assert "RED, not timed" in printed
    assert "NOT ok" in printed


def test_freezing_is_measured_where_there_is_freezing(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlkern, "freeze", lambda model: dlkern.swap(model), raising=False)
    for training, expected in ((False, ["swapped", "frozen"]), (True, ["swapped"])):
        problem = models.ModelProblem(models.ModelCase(f"{model_file}:tiny", training, 2, 8), CPU)
        found = models.run(problem, names=models.candidate_names(training, False), min_seconds=0.0, min_rounds=2)
        assert [(result.candidate, result.red) for result in found] == [(name, None) for name in expected]


def test_without_torchvision_the_ops_still_run(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setattr(suite, "model_cases", lambda *a: [models.ModelCase("torchvision:resnet18", False, 2, 8)])
    assert bench("--infer") == 0
    assert "left out: MODEL 'torchvision:resnet18': torchvision does not import" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- on a GPU
def test_no_peak_on_a_cpu() -> None:
    assert measure.peak_bytes(lambda: pytest.fail("was called"), "cpu") is None


@pytest.mark.gpu
def test_peak_on_a_gpu() -> None:
    held = torch.empty(1 << 20, device="cuda")
    size = 4 << 20
    peak = measure.peak_bytes(lambda: torch.empty(size, dtype=torch.uint8, device="cuda"), "cuda")
    assert peak is not None
    assert size <= peak < size + held.numel()


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("op", list(cases.OPS))
def test_bench_on_a_gpu(op: str, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    arguments = ["--op", op, "--all", "--batch", "2", "--min-seconds", "0", "--no-compile", "--json", str(out)]
    assert cli.main(["bench", "--device", "cuda", *arguments]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["row"] for row in rows} == {"dlkern", *(f"dlkern-{name}" for name in ops.backends(op, "cuda"))}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert all("measured" in row for row in rows if row["parity"] == "ok")
    assert all(row["peak_mb"]["eager"] > 0 for row in rows if row["parity"] == "ok")


def test_pytest_benchmarks_has_the_same_cases() -> None:
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    for op in cases.OPS:
        for case in cases.of(op, device_type):
            assert f"::test_{op}[{case}-eager]" in done.stdout, case
