"""The ahead-of-time gate (tests/aot): what it compiles, that it can fail, and the check itself."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import evidence
import pytest
import torch

pytest.importorskip("triton")

from aot import compile as aot_compile
from aot import gate
from aot.compile import Failed, Found
from aot.gate import Entry
from aot.jobs import Job

from dlkern.kernels.triton import attention_plan, depthwise_plan
from dlkern.kernels.triton.gemm_plan import DOUBLE, EXACT, TENSOR
from dlkern.kernels.triton.tiles import PLANES, ROWS

ROOT = Path(__file__).parent.parent


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process without Triton's interpreter, in which this tree's dlkern is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------ what is compiled
@pytest.fixture(scope="module")
def labels() -> list[list[str]]:
    """The words of each job's label."""
    out = _python("-m", "tests.aot", "list")
    assert out.returncode == 0, out.stderr[-4000:]
    return [label.split() for label in json.loads(out.stdout)]


def test_every_configuration_of_batch_norm_act(labels: list[list[str]]) -> None:
    for kernel in ("_statistics_kernel", "_forward_kernel", "_backward_sums_kernel", "_backward_kernel"):
        for kind, launches in (("rows", ROWS), ("planes", PLANES)):
            for launch in launches:
                words = ["batch_norm_act", kernel, kind, "x".join(map(str, launch))]
                types = {label[4].split("/")[0] for label in labels if label[:4] == words}
                assert types == {"fp16", "bf16", "fp32", "fp64"}, words
        assert any(label[1] == kernel and "sizes-of-1" in label for label in labels)
        assert any(label[1] == kernel and "int64" in label for label in labels)


def test_every_configuration_of_conv_bn_act(labels: list[list[str]]) -> None:
    modes = {"forward": 4, "input_gradient": 5, "weight_gradient": 3}
    for kernel, count in modes.items():
        mine = [label for label in labels if label[:2] == ["conv_bn_act", f"{kernel}_kernel"]]
        assert len({label[2] for label in mine}) == count
        for launches, types in ((TENSOR, {"fp16", "bf16", "tf32"}), (EXACT, {"fp32"}), (DOUBLE, {"fp64"})):
            for launch in launches:
                assert {label[4] for label in mine if label[3] == "x".join(map(str, launch))} == types


def test_every_configuration_of_depthwise(labels: list[list[str]]) -> None:
    for kernel in ("forward", "input_gradient", "weight_gradient"):
        mine = [label for label in labels if label[0] == "depthwise" and label[1].startswith(kernel)]
        assert {label[4] for label in mine} == {"rows", "planes"}
        for kind, table in (("rows", depthwise_plan.ROWS), ("planes", depthwise_plan.PLANES)):
            for launch in itertools.chain.from_iterable(table.values()):
                types = {label[5] for label in mine if label[3:5] == ["x".join(map(str, launch)), kind]}
                assert types, (kernel, kind, launch)
        assert {label[5] for label in mine} == {"fp16", "bf16", "fp32", "fp64"}


def test_every_configuration_of_attention(labels: list[list[str]]) -> None:
    mine = [label for label in labels if label[0] == "attention" and label[1] in ("forward_kernel", "tiles_kernel")]
    for tables in (tables for by_depth in attention_plan.TABLES.values() for tables in by_depth.values()):
        for launch in (launch for launches in tables for launch in launches.forward):
            assert any(label[2] == "forward" and label[4] == "x".join(map(str, launch)) for label in mine), launch
    assert {label[2] for label in mine} == {"forward", "query", "key", "both"}


def test_the_subset_covers_and_moves_on(labels: list[list[str]]) -> None:
    names = [" ".join(label) for label in labels]
    every = [(name, arch) for name in names for arch in gate.ARCHITECTURES]
    features = {feature for pair in every for feature in gate._features(*pair)}
    first, second = (gate.subset(every, rotation) for rotation in (1, 2))
    for pairs in (first, second):
        assert {feature for pair in pairs for feature in gate._features(*pair)} == features
        assert len(set(pairs)) == len(pairs)
        assert len(pairs) <= max(gate.SUBSET, 0.25 * len(every))
    assert set(first) != set(second)
    assert first == gate.subset(every, 1)
    over_time = {pair for rotation in range(60) for pair in gate.subset(every, rotation)}
    assert len(over_time) >= 0.99 * len(every)


# ------------------------------------------------------------------------------------ it can fail
_JOB = Job("op kernel word", None, {}, {}, {}, wgmma=True)
_FINE = Found("op kernel word", 90, 128, 0, 0, 227 * 1024, 0, 4, 0.0)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (_FINE._replace(stack=8), "spills"),
        (_FINE._replace(local=8), "spills"),
        (_FINE._replace(shared=227 * 1024 + 1), "shared memory"),
        (_FINE._replace(arch=120, shared=100 * 1024), "shared memory"),
        (_FINE._replace(arch=80, shared=164 * 1024), "shared memory"),
        (_FINE._replace(arch=100, tensor_memory=513), "tensor memory"),
        (_FINE._replace(wgmma=0), "wgmma"),
        (Failed("op kernel word", 90, "the compiler crashed"), "does not compile"),
    ],
    ids=str,
)
def test_limits(found: Found | Failed, complaint: str) -> None:
    assert gate.over_limits(_JOB, _FINE) == []
    assert gate.over_limits(_JOB, _FINE._replace(arch=100, wgmma=0)) == []
    (line,) = gate.over_limits(_JOB, found)
    assert complaint in line
    assert f"{found.label} sm_{found.arch}" in line


def test_known_stack_is_of_an_older_compiler_and_no_more(
    labels: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {" ".join(label) for label in labels}
    for version, known in gate.KNOWN_STACK.items():
        assert tuple(map(int, version.split("."))) < (3, 7)
        assert {name for name, _ in known} <= names
        assert 90 not in {arch for _, arch in known}
    (name, arch), most = next(iter(gate.KNOWN_STACK["3.6"].items()))
    found, job = _FINE._replace(label=name, arch=arch, shared=0), _JOB._replace(label=name, wgmma=False)
    for version, stack, wrong in (("3.6", most, 0), ("3.6", most + 8, 1), ("3.8", most, 1)):
        monkeypatch.setattr(gate, "TRITON", version)
        assert len(gate.over_limits(job, found._replace(stack=stack))) == wrong


@pytest.mark.parametrize(("before", "most"), [(24, 32), (80, 88), (128, 140), (255, 280)])
def test_growth_of_registers(before: int, most: int) -> None:
    entry = Entry("", (1, before, 1, 1))
    assert gate.growth(entry, _FINE._replace(registers=most)) == []
    (line,) = gate.growth(entry, _FINE._replace(registers=most + 1))
    assert f"{most + 1} registers, {before} in the table" in line


def test_the_table_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "registers.json"
    table = {
        "3.6": {"a b": Entry("01", (1, 2, 3, 4))},
        "3.8": {"c": Entry("02", (5, 6, 7, 8)), "b": Entry("03", (9,) * 4)},
    }
    gate.write_table(table, path)
    assert gate.read_table(path) == table
    assert len(path.read_text().splitlines()) == 2 + 1 + 2 + 4
    path.write_text(path.read_text().replace("[80,", "[75,"))
    with pytest.raises(ValueError, match="architectures"):
        gate.read_table(path)


def test_the_table_is_small() -> None:
    assert gate.TABLE.stat().st_size < 200_000


def test_comments_are_no_code() -> None:
    plain = "def f(a):\n    return a + 1\n"
    written = 'def f(a):  # why\n    """What."""\n    # why not\n\n    return (\n        a + 1\n    )\n'
    assert aot_compile.code_alone(written.replace("(\n        a + 1\n    )", "a + 1")) == aot_compile.code_alone(plain)
    assert aot_compile.code_alone(plain.replace("1", "2")) != aot_compile.code_alone(plain)
    assert aot_compile.code_alone('def f():\n    g("a")\n') != aot_compile.code_alone('def f():\n    g("b")\n')


#: Prints a JSON object of what is wrong with planted jobs.
_PLANTED = """
import json, triton
from tests.aot import compile, gate, jobs
from dlkern.kernels.triton import activation, implicit_gemm, tiles

every = jobs.every_job()
name = next(n for n in every if n.startswith("conv_bn_act forward_kernel pointwise 64x64x64x4x3 fp16"))
job = every[name]
found = {"without jobs": jobs.without_jobs()}
other = every[next(n for n in every if n.startswith("batch_norm_act _backward_kernel planes 1x2048x4 fp64"))]
tight = other._replace(options=other.options | {"maxnreg": 32})
found["32 registers"] = gate.over_limits(tight, compile.compile_job(tight, 90))
deep = job._replace(options=job.options | {"num_stages": 16})
found["16 stages"] = gate.over_limits(deep, compile.compile_job(deep, 120))

before = compile.job_hash(job)
found["same"] = compile.job_hash(job) == before
found["reaches"] = sorted(compile._sources(job.kernel))
for what, other in {
    "options": job._replace(options=job.options | {"num_stages": 2}),
    "constants": job._replace(constants=job.constants | {"BLOCK_M": 32}),
    "signature": job._replace(signature=job.signature | {"rows": "i64"}),
    "divisible": job._replace(divisible=()),
}.items():
    found[what] = compile.job_hash(other) != before
entries = {name: gate.Entry(before, (0, 0, 0, 0))}
found["known"] = gate.stale({name: job}, entries)
found["missing"] = gate.stale({name: job}, {})
activation.RELU = triton.language.constexpr(99)
found["a constant of a function it calls"] = gate.stale({name: job}, entries)
del every[next(n for n in every if "condense_statistics_kernel fp32" in n)]
del every[next(n for n in every if "condense_statistics_kernel fp64" in n)]
found["one left out"] = jobs.without_jobs()
print(json.dumps([name, found]))
"""


@pytest.mark.slow
def test_planted_faults_are_found() -> None:
    out = _python("-c", _PLANTED)
    assert out.returncode == 0, out.stderr[-4000:]
    name, found = json.loads(out.stdout)
    assert found["without jobs"] == []
    assert found["one left out"] == ["implicit_gemm.condense_statistics_kernel"]
    assert "spills" in found["32 registers"][0]
    assert "shared memory" in found["16 stages"][0]
    assert found["same"]
    assert found["options"]
    assert found["constants"]
    assert found["signature"]
    assert found["divisible"]
    for function in ("implicit_gemm.gather", "batch_norm_act._scale_and_shift", "activation._clamp6"):
        assert f"dlkern.kernels.triton.{function}" in found["reaches"]
    assert "dlkern.kernels.triton.activation.forward: RELU" in found["reaches"]
    assert found["known"] == []
    assert found["missing"] == found["a constant of a function it calls"] == [name]


# ------------------------------------------------------------------------------------ the check
@pytest.mark.slow
def test_check(labels: list[list[str]]) -> None:
    """What changed since the table was written, and today's subset of the rest."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.fail("this triton has no NVIDIA compiler")
    if gate.TRITON not in gate.read_table():
        pytest.skip(f"tests/aot/registers.json has no table of Triton {gate.TRITON}")
    out = _python("-m", "tests.aot", "check")
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-4000:]
    types = {name: getattr(torch, word) for word, names in _TYPES.items() for name in names}
    for op, _, *words in labels:
        for name in {word.split("/")[0] for word in words} & types.keys():
            evidence.record(op, "triton", types[name], "compiled")


_TYPES = {"float32": ("fp32", "tf32"), "float16": ("fp16",), "bfloat16": ("bf16",), "float64": ("fp64",)}
