"""Compiles a .cu for the host, and runs its kernels on tensors."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .preprocess import Refused, transform

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parents[1] / "csrc"
#: (AddressSanitizer says more than object-size does.)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize=object-size", "-fno-sanitize-recover=undefined")
_COMMON = ("-std=c++17", "-O1", "-g1", "-Wno-unknown-pragmas", "-DDLKERN_HOST_SHIM")
_NUMBERS = itertools.count()
_HEADERS = ("host_shim.h", "job.h", "runtime.h", "types.h")

#: The orders in which threads and blocks run; each must give the same bytes.
SCHEDULES = ("forward", "reverse", "random 1")


class ShimError(RuntimeError):
    """A kernel did on the host what it must not do on a device."""


@functools.cache
def missing() -> str | None:
    """None where kernels can be compiled and run here, else the reason."""
    compiler = _compiler()
    if compiler is None:
        return "the host shim needs g++"
    made = _folder() / "probe"
    probe = "#include <ucontext.h>\n#include <sanitizer/asan_interface.h>\nint main() { return 0; }\n"
    command = [compiler, *_COMMON, *_SANITIZE, "-x", "c++", "-", "-o", str(made)]
    built = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        return f"the host shim needs g++ with libasan and libubsan: {built.stderr.strip().splitlines()[-1]}"
    ran = subprocess.run([made], capture_output=True, text=True, env=_environment(), check=False)
    return None if ran.returncode == 0 else f"AddressSanitizer does not run here: {ran.stderr.strip()[:300]}"


@functools.cache
def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("g++")


@functools.cache
def _folder() -> Path:
    path = tempfile.mkdtemp(prefix="dlkern-host-shim-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    asan = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:handle_segv=1:use_sigaltstack=1"
    return {**kept, "ASAN_OPTIONS": asan, "UBSAN_OPTIONS": "print_stacktrace=0"}


def _compile(arguments: Sequence[str]) -> None:
    result = subprocess.run([str(_compiler()), *arguments], capture_output=True, text=True, check=False, cwd=_folder())
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line][:8] or result.stderr.splitlines()
        raise Refused(
            "the host shim cannot compile this (what it covers is in tests/host_shim/host_shim.h):\n"
            + "\n".join(errors)
        )


@functools.cache
def _objects() -> list[str]:
    """What every program is linked with. Compiled once, and without instrumentation."""
    made = [_folder() / f"{name}.o" for name in ("runner", "job")]
    for path in made:
        _compile([*_COMMON, "-c", str(_HERE / f"{path.stem}.cpp"), "-o", str(path)])
    return [str(path) for path in made]


@functools.cache
def build(
    source: Path,
    kernels: tuple[str, ...] = (),
    defines: tuple[str, ...] = (),
    edits: tuple[tuple[str, str], ...] = (),
) -> Program:
    """The .cu at ``source`` compiled for the host, once a session.

    ``kernels`` are C++ expressions that name kernels, such as ``forward<float, 4>``; extern "C" kernels are found
    without. ``defines`` are macros, such as ``WIDTH=4``; ``edits`` plant an error: (old, new) in the preprocessed text.

    Raises:
        Refused: the source uses what the shim does not run, or does not compile.
        ValueError: an edit's old text is not there.
    """
    stem = _folder() / f"{source.stem}-{next(_NUMBERS)}"
    preprocessed, unit, program = (Path(f"{stem}{suffix}") for suffix in (".ii", ".shim.ii", ""))
    folders = [f"-I{folder}" for folder in (_HERE, _CSRC, _CSRC / "include")]
    flags = [*_COMMON, *(f"-D{define}" for define in defines), *folders, "-include", "job.h"]
    _compile(["-E", *flags, "-x", "c++", str(source), "-o", str(preprocessed)])
    before = preprocessed.read_text()
    for old, new in edits:
        if old not in before:
            raise ValueError(f"{source}: nothing to edit: {old!r}")
        before = before.replace(old, new)
    text, found = transform(before, {str(_HERE / name) for name in _HEADERS})
    names = [*kernels, *found]
    if not names:
        raise Refused(f'{source}: no kernel; name them, or make them extern "C" __global__')
    rows = "\n".join(
        f'{{"{name}", [](const dlkern_shim::Job& job) {{ return dlkern_shim::prepare({name}, job); }}}},'
        for name in names
    )
    main = (
        f'\n# 1 "host_shim_main"\nstatic const dlkern_shim::Entry dlkern_entries[] = {{\n{rows}\n}};\n'
        "int main(int, char** argv) {\n"
        f"  return dlkern_shim::run_job(dlkern_entries, {len(names)}, argv[1], argv[2]);\n}}\n"
    )
    unit.write_text(text + main)
    _compile([*_COMMON, *_SANITIZE, "-fpreprocessed", str(unit), *_objects(), "-o", str(program)])
    return Program(program, names)


class Program:
    """A compiled .cu; ``kernels`` are the names that :meth:`launch` takes."""

    def __init__(self, path: Path, kernels: Sequence[str]) -> None:
        self.path, self.kernels = path, tuple(kernels)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        schedules: Sequence[str] = SCHEDULES,
        timeout: float = 120.0,
    ) -> None:
        """Run a kernel over a grid of up to three dimensions; tensors among the arguments are changed in place.

        An argument is a CPU tensor, None for a null pointer, an int, a float, a ctypes value, or :class:`Struct`. A
        kernel may touch what lies between a tensor's first and last element; alignment up to 64 bytes stays. Tensors
        may not overlap, except that one may be given twice.

        Raises:
            ShimError: with the kernel, block and thread, and what they did.
        """
        job = _Job()
        rows = [job.argument(value) for value in arguments]
        dims = [str(n) for size in (grid, block) for n in (*size, 1, 1)[:3]]
        head = [kernel, " ".join([*dims, str(shared)]), str(len(schedules)), *schedules]
        text = [*head, str(len(job.tensors)), *job.rows, str(len(rows)), *rows]
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            given, made = Path(folder, "job"), Path(folder, "result")
            given.write_bytes("\n".join([*text, ""]).encode() + b"".join(job.data))
            _run([str(self.path), str(given), str(made)], kernel, timeout)
            job.write_back(made.read_bytes())


class Struct(NamedTuple):
    """The bytes of a structure as an argument; ``pointers`` gives the tensor behind the pointer at each offset."""

    data: bytes
    pointers: Mapping[int, Tensor]


def _extent(x: Tensor) -> int:
    """Bytes from x's first element to behind its last one."""
    last = 0 if x.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return last * x.element_size()


def _memory(x: Tensor) -> Any:
    return (ctypes.c_char * _extent(x)).from_address(x.data_ptr())


class _Job:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.rows: list[str] = []
        self.data: list[bytes] = []

    def buffer(self, x: Tensor) -> int:
        if x.device.type != "cpu":
            raise ValueError(f"the host shim takes CPU tensors, not one on {x.device}")
        start, stop = x.data_ptr(), x.data_ptr() + _extent(x)
        for i, other in enumerate(self.tensors):
            if (other.data_ptr(), _extent(other), other.dtype) == (start, stop - start, x.dtype):
                return i
            if start < other.data_ptr() + _extent(other) and other.data_ptr() < stop:
                raise ValueError("two arguments overlap in memory")
        self.tensors.append(x)
        self.rows.append(f"{stop - start} {start % 64} {str(x.dtype).removeprefix('torch.')}")
        self.data.append(bytes(_memory(x)))
        return len(self.tensors) - 1

    def argument(self, value: Any) -> str:
        if value is None:
            return "null"
        if isinstance(value, Tensor):
            return f"buffer {self.buffer(value)}"
        if isinstance(value, Struct):
            places = [f"{offset} {self.buffer(tensor)}" for offset, tensor in value.pointers.items()]
            return " ".join([f"bytes {value.data.hex()} {len(places)}", *places])
        if isinstance(value, (bool, int)):
            return f"integer {int(value)}"
        if isinstance(value, float):
            return f"float {value.hex() if abs(value) < float('inf') else value}"
        if isinstance(value, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
            return f"bytes {bytes(value).hex()} 0"
        raise TypeError(f"the host shim takes tensors, None, numbers and ctypes values as arguments, not {value!r}")

    def write_back(self, result: bytes) -> None:
        at = 0
        for x, before in zip(self.tensors, self.data, strict=True):
            after = result[at : at + len(before)]
            at += len(before)
            if after != before:
                ctypes.memmove(x.data_ptr(), after, len(after))


def _run(command: list[str], kernel: str, timeout: float) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise ShimError(f"{kernel}: no end within {timeout:g} seconds (blocks that wait for each other?)") from None
    if ran.returncode != 0:
        raise ShimError(f"{kernel}: {_message(ran.stderr) or f'exit status {ran.returncode}'}")


def _message(text: str) -> str:
    """What the shim and the sanitizers said, without addresses and frames of no interest."""
    kept = []
    for line in text.splitlines():
        line = re.sub(r"^=+\d+=+\s*", "", line.strip())
        if "doesn't fully support makecontext" in line:
            continue
        if re.match(r"shim: |ERROR: AddressSanitizer|(READ|WRITE) of size|SUMMARY|.*is located|.*runtime error", line):
            kept.append(line)
    return "\n".join(kept) or text.strip()[:2000]
