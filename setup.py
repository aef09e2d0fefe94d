"""Build of the optional extension ``dlkern._C``; everything else is in pyproject.toml.

Without a compiler, or where the compilation fails, dlkern installs without its CPU kernels and says so
(here, with ``pip install -v``, and in ``dlkern info``). DLKERN_REQUIRE_EXTENSION=1 makes that an error.
The CUDA kernels are built where nvcc is found; csrc/build_cuda.py has what the environment says about them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "csrc"))
import build_cuda  # noqa: E402

REQUIRED = os.environ.get("DLKERN_REQUIRE_EXTENSION", "0") not in ("", "0")

# -ffp-contract=off: forward and backward round the same expressions the same way (csrc/cpu/simd/vector.inl).
# NaN and infinity keep their meaning: no -ffast-math. No -march: instruction sets are chosen at run time.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wno-psabi",
]


def compiles(compiler: list[str], flag: str) -> bool:
    """Whether the compiler accepts a flag and can link with it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, flag, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


class BuildExtension(build_ext):
    """build_ext that explains a failure and goes on without the extension."""

    def build_extension(self, ext: Extension) -> None:
        build_cuda.wanted(), build_cuda.architectures()  # a variable that makes no sense is an error, not a warning
        try:
            if platform.system() == "Windows":
                raise RuntimeError("the CPU kernels need GCC or Clang (vector extensions): not built on Windows")
            compiler = list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])
            if shutil.which(compiler[0]) is None:
                raise RuntimeError(f"no C++ compiler: {compiler[0]!r} is not on the path")
            ext.extra_compile_args = list(COMPILE_FLAGS)
            if compiles(compiler, "-fopenmp"):
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args = ["-fopenmp"]
            build_cuda.add_kernels(ext, self.build_temp)
            from pybind11.setup_helpers import ParallelCompile

            with ParallelCompile("DLKERN_BUILD_JOBS", default=os.cpu_count() or 1):
                super().build_extension(ext)
        except Exception as error:
            if REQUIRED or build_cuda.wanted():
                raise
            rule = "*" * 100
            print(
                f"\n{rule}\nWARNING: the extension dlkern._C was not built: {error}\n"
                "dlkern is installed without its CPU kernels; PyTorch's own run in their place.\n"
                "With a C++17 compiler on the path (GCC 9 or Clang 10, or later), install again.\n"
                "DLKERN_REQUIRE_EXTENSION=1 makes this an error.\n"
                f"{rule}\n",
                file=sys.stderr,
            )


extension = Extension(
    "dlkern._C",
    sources=sorted(
        p.relative_to(here).as_posix() for d in ("bindings", "cpu") for p in (here / "csrc" / d).glob("*.cpp")
    ),
    depends=sorted(
        p.relative_to(here).as_posix() for p in (here / "csrc").rglob("*") if p.suffix in (".h", ".inl", ".cu", ".cuh")
    ),
    include_dirs=["csrc", "csrc/include", "csrc/cpu", pybind11.get_include()],
    language="c++",
    optional=not REQUIRED,
)

setup(
    packages=[
        *find_packages(include=["dlkern", "dlkern.*"]),
        "dlkern.kernels",
        *(f"dlkern.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension, "build_py": build_cuda.BuildPython},
)
