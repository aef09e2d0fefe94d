"""The CUDA kernels as they are built: by nvcc, by NVRTC, or not at all. None of this needs a GPU."""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import evidence
import pytest
import torch
from conftest import HAS_CUDA

from dlkern.kernels.cuda import batch_norm_act_plan, depthwise_plan, nvrtc, plan

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
    if importlib.util.find_spec("dlkern._C") is not None and extension().cuda_kernels():
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
    built, cuobjdump = extension(), _cuobjdump()
    if not built.cuda_kernels():
        pytest.skip("dlkern._C was built without CUDA kernels")
    if cuobjdump is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    command = [cuobjdump, "--dump-resource-usage", built.__file__]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"\bSTACK:(\d+) .*\bLOCAL:(\d+)", out)
    compiled = [a for a in built.build_info()["cuda_architectures"] if a.startswith("sm_")]
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
