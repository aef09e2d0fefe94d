"""The CUDA kernels as they are built: by nvcc, by NVRTC, or not at all. None of this needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import evidence
import pytest
import torch
from conftest import HAS_CUDA
from hypothesis import given
from hypothesis import strategies as st

import dlkern
from dlkern.kernels import cuda
from dlkern.kernels.activation import Activation
from dlkern.kernels.cuda import batch_norm_act, batch_norm_act_plan, depthwise_plan, nvrtc, plan
from dlkern.kernels.layout import Layout
from dlkern.kernels.reference.batch_norm_act import Request

ROOT = Path(__file__).resolve().parents[1]
DTYPES = list(plan.TYPES)
PLANS = {"batch_norm_act": batch_norm_act_plan, "depthwise": depthwise_plan}
KERNELS = {op: sorted({name for dtype in DTYPES for name in made.kernels(dtype)}) for op, made in PLANS.items()}
ALL_KERNELS = sorted(name for names in KERNELS.values() for name in names)

every_op = pytest.mark.parametrize("op", PLANS)


@functools.cache
def load_build_cuda() -> ModuleType:
    """csrc/build_cuda.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built() -> bool:
    """Whether the extension has CUDA kernels."""
    try:
        return bool(importlib.import_module("dlkern._C").cuda_kernels())
    except ImportError:
        return False


@pytest.fixture
def build_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    for name in ("DLKERN_BUILD_CUDA", "DLKERN_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return load_build_cuda()


def extension() -> Any:
    return pytest.importorskip("dlkern._C", exc_type=ImportError)


def test_the_table_of_kernels_is_what_the_plans_can_ask_for() -> None:
    # each dtype has four passes over two layouts with wide and with single accesses; two merges for each wide type
    assert len(KERNELS["batch_norm_act"]) == 4 * 16 + 4
    # of three dtypes three sizes, each with two strides, forward twice, and one gradient of the input; any geometry
    assert len(KERNELS["depthwise"]) == 3 * 3 * (2 * 3 + 1) + 4 * 2 * 4 + 4
    for op, names in KERNELS.items():
        for name in names:
            assert nvrtc.plan_of(name) is PLANS[op]
            assert name in PLANS[op].group(name)
            assert set(PLANS[op].group(name)) <= set(names)


# ------------------------------------------------------------------------------------------------ NVRTC
def _core() -> ModuleType:
    """cuda-core, whose names have left cuda.core.experimental."""
    try:
        from cuda import core
        from cuda.core import Program  # noqa: F401
    except ImportError:
        core = pytest.importorskip("cuda.core.experimental", reason="NVRTC without cupy needs the package cuda-core")
    try:
        from cuda.bindings import nvrtc as library

        library.nvrtcVersion()
    except Exception as error:  # the packages are there and the library is not
        pytest.skip(f"NVRTC does not load: {error}")
    return core


def _program_options(core: ModuleType, arch: str) -> Any:
    """The options that kernels/cuda/nvrtc.py gives to cupy, and those that cupy adds."""
    std, define, *folders = nvrtc.options()
    assert std.startswith("-std=")
    assert define.startswith("-D")
    assert all(folder.startswith("-I") for folder in folders)
    name, _, value = define[2:].partition("=")
    return core.ProgramOptions(
        arch=arch,
        std=std.removeprefix("-std="),
        define_macro=(name, value),
        include_path=[folder[2:] for folder in folders],
        device_as_default_execution_space=True,
    )


def _compile(names: list[str], arch: str) -> bytes:
    """The cubin of the kernels, compiled as kernels/cuda/nvrtc.py has cupy compile them."""
    core = _core()
    log = io.StringIO()
    program = core.Program(nvrtc.source(names[0]), "c++", _program_options(core, arch))
    try:
        made = program.compile("cubin", name_expressions=names, logs=log)
    except Exception as error:
        raise AssertionError(f"{error}\n{log.getvalue()}") from error
    finally:
        program.close()
    assert set(made.symbol_mapping) == set(names)
    return bytes(made.code)


def test_cuda_core_is_given_the_options_that_cupy_is() -> None:
    core = _core()
    made = _program_options(core, "sm_90")
    if not hasattr(made, "as_bytes"):
        pytest.skip("this cuda-core does not say what it gives to NVRTC")
    given = {
        option.decode().replace("--std", "-std").replace("--include-path=", "-I") for option in made.as_bytes("nvrtc")
    }
    given = {option.replace("--define-macro=", "-D") for option in given}
    assert given == {*nvrtc.options(), "-arch=sm_90", "--device-as-default-execution-space"}


def _cuobjdump() -> str | None:
    """The cuobjdump that Triton has with it."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        path = Path(folder, "backends", "nvidia", "bin", "cuobjdump")
        if path.is_file():
            return str(path)
    return None


#: (op, dtype, architecture). nvcc's test compiles all of them for both architectures; depthwise takes its time.
NVRTC_JOBS = [
    (op, dtype, arch)
    for op in PLANS
    for dtype in DTYPES
    for arch in ("sm_80", "sm_90")
    if (op, arch) != ("depthwise", "sm_80") or dtype == torch.float16
]


@pytest.mark.parametrize(("op", "dtype", "arch"), NVRTC_JOBS, ids=["-".join(map(str, job)) for job in NVRTC_JOBS])
def test_nvrtc_compiles_the_sources_that_cupy_is_given(op: str, dtype: torch.dtype, arch: str, tmp_path: Path) -> None:
    names = PLANS[op].kernels(dtype)
    cubin = tmp_path / "kernels.cubin"
    cubin.write_bytes(_compile(names, arch))
    evidence.record(op, "cuda", dtype, "compiled")
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        return
    command = [cuobjdump, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == len(names), usage
    for registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), usage
        assert int(registers) * plan.MAX_THREADS <= 65536


def test_sources_are_read_from_the_clone_or_the_installed_package(build_cuda: ModuleType, tmp_path: Path) -> None:
    assert nvrtc.sources() == ROOT / "csrc"
    from setuptools import Distribution

    command = build_cuda.BuildPython(Distribution({"packages": []}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    command.run()
    installed = tmp_path / "dlkern" / "kernels" / "cuda" / "csrc"
    for name in ("cuda", "include/dlkern"):
        wanted = {path.name: path.read_bytes() for path in (ROOT / "csrc" / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (installed / name).iterdir()} == wanted


def test_a_changed_header_changes_nvrtcs_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cupy keeps on disk is found by source and options."""
    monkeypatch.setattr(nvrtc, "toolkit_include", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "sources", lambda: tmp_path)
    for name in ("a.h", "b.cuh"):
        before = nvrtc.options.__wrapped__()
        (tmp_path / name).write_text("// changed")
        assert nvrtc.options.__wrapped__() != before
        assert nvrtc.options.__wrapped__() == nvrtc.options.__wrapped__()


def test_nvrtc_says_which_header_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(RuntimeError, match=r"cuda_fp16\.h.*CUDA_HOME"):
        nvrtc.toolkit_include.__wrapped__()


# ------------------------------------------------------------------------------------------------- nvcc
@pytest.mark.slow
@every_op
def test_nvcc_spills_nothing(op: str, build_cuda: ModuleType, tmp_path: Path) -> None:
    toolkit = build_cuda.find()
    if toolkit is None:
        pytest.skip("no nvcc on the path")
    if _built():
        pytest.skip("dlkern._C has been built with them: see test_what_is_built_spills_nothing")
    csrc = ROOT / "csrc"
    source = csrc / "cuda" / f"{op}.cu"
    command = [toolkit.nvcc, *build_cuda.FLAGS, *toolkit.gencode, f"-I{csrc}", f"-I{csrc / 'include'}", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) == len(KERNELS[op]) * sum(a.startswith("sm_") for a in toolkit.architectures), done.stderr
    assert set(frames) == {("0", "0", "0")}, done.stderr


def test_what_is_built_spills_nothing() -> None:
    """Of every kernel in the extension, for each architecture that it has code of."""
    if not _built():
        pytest.skip("dlkern._C was built without CUDA kernels")
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    extension = importlib.import_module("dlkern._C")
    cuobjdump = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", extension.__file__]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"\bSTACK:(\d+) .*\bLOCAL:(\d+)", out)
    compiled = [a for a in extension.build_info()["cuda_architectures"] if a.startswith("sm_")]
    assert len(used) == len(ALL_KERNELS) * len(compiled), out
    assert set(used) == {("0", "0")}, out


def test_architectures_are_read(build_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_cuda.architectures() == ("sm_80", "sm_90a", "compute_90")
    monkeypatch.setenv("DLKERN_CUDA_ARCHS", "8.6, 100a;120+PTX 86")
    assert build_cuda.architectures() == ("sm_86", "sm_100a", "compute_120")
    toolkit = build_cuda.Toolkit("nvcc", "13.0.88", build_cuda.architectures("90a;90+PTX"))
    assert toolkit.gencode == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm_90", "'sm_90' is no architecture"),
        ("75", "'75' is older than 80"),
        ("90a+PTX", "runs on no newer device"),
        (";", "names no architecture"),
    ],
)
def test_architectures_that_are_none(build_cuda: ModuleType, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cuda.architectures(text)


def test_whether_cuda_is_built(build_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_cuda.find() is None
    monkeypatch.setenv("DLKERN_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="no nvcc on the path"):
        build_cuda.find()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"CUDA_HOME=.* holds no bin/nvcc"):
        build_cuda.find()
    monkeypatch.setenv("DLKERN_BUILD_CUDA", "0")
    assert build_cuda.find() is None
    monkeypatch.setenv("DLKERN_BUILD_CUDA", "maybe")
    with pytest.raises(ValueError, match="expected 0, 1 or nothing"):
        build_cuda.find()


def test_a_failing_nvcc_is_an_error_only_where_it_is_demanded(
    build_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from setuptools import Extension

    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    made = Extension("dlkern._C", [])
    build_cuda.add_kernels(made, tmp_path)
    assert (made.define_macros, made.extra_objects) == ([], [])
    assert "built without CUDA kernels" in capsys.readouterr().err
    monkeypatch.setenv("DLKERN_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="out of order"):
        build_cuda.add_kernels(made, tmp_path)


# ------------------------------------------------------------------------------------ the built extension
def test_the_extension_has_the_plans_kernels_or_none() -> None:
    built = extension()
    names, info = built.cuda_kernels(), built.build_info()
    if not names:
        assert info["cuda_architectures"] == []
        assert info["nvcc"] is None
        assert "without CUDA kernels" in built.cuda_problem()
        with pytest.raises(RuntimeError, match="without CUDA kernels"):
            built.cuda_launch(0, 1, 1, 32, 0, 0, 0, bytes(batch_norm_act_plan.ARGS.size))
        return
    assert sorted(names) == ALL_KERNELS
    assert info["cuda_architectures"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])


def test_a_launch_without_a_driver_gives_the_reason() -> None:
    built = extension()
    if not built.cuda_kernels():
        pytest.skip("dlkern._C was built without CUDA kernels (no nvcc on the path)")
    for op, made in PLANS.items():
        index = built.cuda_kernels().index(KERNELS[op][0])
        with pytest.raises(ValueError, match=f"expected {made.ARGS.size} bytes of arguments, got 3"):
            built.cuda_launch(index, 1, 1, 32, 0, 0, 0, b"abc")
    with pytest.raises(ValueError, match="there is no kernel 1000"):
        built.cuda_launch(1000, 1, 1, 32, 0, 0, 0, bytes(depthwise_plan.ARGS.size))
    if HAS_CUDA:
        assert built.cuda_problem() == ""
        return
    assert "CUDA error" in built.cuda_problem()
    for op, made in PLANS.items():
        index = built.cuda_kernels().index(KERNELS[op][0])
        message = rf"launch of dlkern::cuda::{op}::.*CUDA error \d+\); the cuda backend needs"
        with pytest.raises(RuntimeError, match=message):
            built.cuda_launch(index, 1, 1, 32, 0, 0, 0, bytes(made.ARGS.size))


@every_op
def test_the_argument_is_packed_as_the_header_has_it(op: str) -> None:
    header, args = (ROOT / "csrc" / "cuda" / f"{op}.h").read_text(), PLANS[op].ARGS
    ((name, body),) = re.findall(r"struct (\w+Args) \{(.*?)\n\};", header, re.DOTALL)
    letters = {"void": "Q", "long long": "q", "double": "d", "int": "i"}
    fields = []
    for kind, names in re.findall(r"(void|long long|double|int)\b([^;]*);", re.sub(r"//.*", "", body)):
        fields += [(name.strip(" *"), letters[kind]) for name in names.split(",")]
    assert tuple(fields) == args.fields
    assert f"sizeof({name}) == {args.size}" in header
    assert len(args.pack({})) == args.size
    with pytest.raises(KeyError, match="has no scale"):
        args.pack({"scale": 1.0})


# ------------------------------------------------------------------------------------------ availability
def _request(**changes: Any) -> Request:
    wanted = Request("cuda", torch.float32, torch.float32, False, True, False, "relu")
    return wanted._replace(**changes)


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "takes tensors on CUDA devices, not on 'cpu'" in (batch_norm_act.supports(_request(device="cpu")) or "")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or later, this device has 7.5" in (batch_norm_act.supports(_request()) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert batch_norm_act.supports(_request()) is None
    assert "no kernels for torch.int32" in (batch_norm_act.supports(_request(dtype=torch.int32)) or "")
    assert "no activation 'softmax'" in (batch_norm_act.supports(_request(activation="softmax")) or "")


def test_unavailable_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable = cuda._unavailable.__wrapped__
    if not HAS_CUDA:
        assert unavailable() == "no CUDA device (torch.cuda.is_available() is False)"
        with (
            pytest.raises(RuntimeError, match="backend 'cuda' is not available: no CUDA device"),
            dlkern.backend("cuda"),
        ):
            pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_built_problem", lambda: "dlkern._C was built without CUDA kernels")
    monkeypatch.setattr(cuda, "_cupy_problem", lambda: None)
    assert unavailable() is None
    monkeypatch.setattr(cuda, "_cupy_problem", lambda: "cupy is not installed")
    reason = unavailable()
    assert "built without CUDA kernels, and cupy is not installed" in reason
    assert re.search(r"nvcc .* on the path, or pip install 'dlkern\[cuda1[23]\]'", reason)
    monkeypatch.setattr(cuda, "_built_problem", lambda: None)
    assert unavailable() is None


def test_a_machine_without_cuda_is_left_alone() -> None:
    program = (
        "import json, sys, dlkern; early = [n for n in ('cupy', 'cuda', 'dlkern._C') if n in sys.modules]; "
        "backends = dlkern.available_backends(); late = [n for n in ('cupy',) if n in sys.modules]; "
        "print(json.dumps([early, late, backends['cuda'], backends['torch']]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    early, late, reason, torch_reason = json.loads(done.stdout)
    assert (early, late, torch_reason) == ([], [], None)
    assert "no CUDA device" in reason


# ---------------------------------------------------------------------------------------------- launches
@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's state as a launcher sees it, without a device."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))


def _launches() -> list[plan.Launch]:
    """A training forward's, on CPU tensors that nothing reads."""
    x, vector = torch.empty(64, 16), torch.empty(16)
    kept: list[plan.Launch] = []
    keeper = types.SimpleNamespace(multiprocessors=lambda device: 2, run=lambda launches, device: kept.extend(launches))
    with mock.patch.object(cuda, "forced", keeper):
        batch_norm_act.forward(
            x, vector, vector, None, vector, vector,
            batch_stats=True, momentum=0.1, eps=1e-5, activation=Activation("relu"),
        )  # fmt: skip
    names = [launch.kernel.removeprefix(batch_norm_act_plan.NAMESPACE) for launch in kept]
    assert names == ["statistics<float, 4, true>", "merge_statistics<float>", "forward<float, 4, true>"]
    assert all(launch.args == batch_norm_act_plan.ARGS.pack(launch.fields) for launch in kept)
    return kept


def test_cupy_is_given_the_launches(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[dict[str, Any]] = []
    seen: list[tuple[Any, ...]] = []
    places: list[tuple[Any, ...]] = []

    class Module:
        def __init__(self, **arguments: Any) -> None:
            modules.append(arguments)

        def get_function(self, name: str) -> Any:
            def kernel(grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
                (argument,) = args
                assert argument.size == 1  # what cupy passes by value
                seen.append((name, grid, block, shared_mem, argument.tobytes()))

            return kernel

    def place(*arguments: Any) -> Any:
        places.append(arguments)
        return contextlib.nullcontext()

    fake = types.SimpleNamespace(RawModule=Module, cuda=types.SimpleNamespace(Device=place, ExternalStream=place))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(nvrtc, "options", lambda: ("-an-option",))
    launches = _launches()
    runtime = nvrtc.Nvrtc()
    for _ in range(2):
        runtime.run(launches, torch.device("cuda", 1))
    assert seen == 2 * [(n.kernel, n.grid, (n.threads,), n.shared_bytes, n.args) for n in launches]
    assert places == 2 * [(1,), (77, 1)]
    assert [module["name_expressions"] for module in modules] == [
        batch_norm_act_plan.group(n.kernel) for n in launches[:2]
    ]
    assert {module["options"] for module in modules} == {("-an-option",)}


def test_the_extension_is_given_the_launches(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    extension()
    from dlkern.kernels.cuda import built

    seen: list[tuple[Any, ...]] = []
    fake = types.SimpleNamespace(
        cuda_kernels=lambda: ALL_KERNELS, cuda_launch=lambda *arguments: seen.append(arguments)
    )
    monkeypatch.setattr(built, "_C", fake)
    launches = _launches()
    built.Built().run(launches, torch.device("cuda", 1))
    assert seen == [(ALL_KERNELS.index(n.kernel), *n.grid, n.threads, n.shared_bytes, 1, 77, n.args) for n in launches]


# -------------------------------------------------------------------------------------------------- plan
@given(
    rows=st.booleans(),
    outer=st.integers(1, 5000),
    channels=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 1000, 2048])),
    inner=st.sampled_from([2, 3, 16, 49, 56 * 56, 512 * 512 + 1]),
    dtype=st.sampled_from(DTYPES),
    aligned=st.booleans(),
    reduction=st.booleans(),
    multiprocessors=st.sampled_from([1, 16, 132]),
)
def test_a_walk_covers_the_tensor_within_the_limits(
    rows: bool, outer: int, channels: int, inner: int, dtype: torch.dtype, aligned: bool, reduction: bool,
    multiprocessors: int,
) -> None:  # fmt: skip
    view = Layout(rows, outer, channels, 1 if rows else inner)
    walk = batch_norm_act_plan.walk(view, dtype, aligned=aligned, multiprocessors=multiprocessors, reduction=reduction)
    assert walk.kernel("forward") in KERNELS["batch_norm_act"]
    assert walk.width == 1 or (aligned and walk.width * plan.TYPES[dtype].size == 16)
    assert (view.channels if rows else view.inner) % walk.width == 0
    # the kernels reduce by halves, and divide a block into columns
    for power in (walk.threads, walk.threads_c):
        assert power & (power - 1) == 0
    assert walk.threads_c <= walk.threads <= plan.MAX_THREADS
    assert walk.grid[0] * walk.threads_c * walk.width >= channels if rows else walk.grid[0] == channels
    length = view.outer if rows else view.outer * (view.inner // walk.width)
    assert (walk.splits - 1) * walk.share < length <= walk.splits * walk.share  # no share is empty
    assert walk.share_elements == walk.share * (1 if rows else walk.width)
    assert walk.splits <= (batch_norm_act_plan.MAX_SPLITS if reduction else 65535)
    assert walk.step("statistics", {}, 1).shared_bytes <= 48 * 1024
