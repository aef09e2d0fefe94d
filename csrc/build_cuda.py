"""How setup.py compiles csrc/cuda with nvcc.

DLKERN_BUILD_CUDA    0: never. 1: an error where it cannot be done. Unset: where nvcc is found.
DLKERN_CUDA_ARCHS    what to compile for, "80;90a;90+PTX" by default. N is machine code for compute capability N
                     (which devices of its major version and a minor one as high or higher run; "a" ones run on N
                     alone); N+PTX is PTX, which the driver compiles for N and everything newer, and no machine code.
CUDA_HOME, CUDA_PATH the toolkit, where it is not the one of the nvcc on the path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.command.build_py import build_py

DEFAULT_ARCHITECTURES = "80;90a;90+PTX"
CSRC = Path(__file__).resolve().parent

# Hidden symbols: another library's of the same name stay apart.
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads=0"]


class Toolkit(NamedTuple):
    """nvcc, its version, and what it is to compile for (words such as sm_90a and compute_90)."""

    nvcc: str
    version: str
    architectures: tuple[str, ...]

    @property
    def macros(self) -> list[tuple[str, str | None]]:
        """Definitions for the C++ files of the extension."""
        words = " ".join(self.architectures)
        return [("DLKERN_CUDA_ARCHITECTURES", f'"{words}"'), ("DLKERN_NVCC_VERSION", f'"{self.version}"')]

    @property
    def gencode(self) -> list[str]:
        """nvcc's options for the architectures."""
        return [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in self.architectures]

    @property
    def link_args(self) -> list[str]:
        """The static runtime, with its symbols kept out of sight of PyTorch's own."""
        home = Path(self.nvcc).resolve().parents[1]
        folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        found = [f"-L{folder}" for folder in folders if (folder / "libcudart_static.a").is_file()]
        if not found:
            raise RuntimeError(f"there is no libcudart_static.a in {home}: the CUDA toolkit is not complete")
        return [found[0], "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def wanted() -> bool | None:
    """DLKERN_BUILD_CUDA: never (False), demanded (True), or where it can be done (None)."""
    value = os.environ.get("DLKERN_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"DLKERN_BUILD_CUDA={value!r}; expected 0, 1 or nothing")
    return None if value == "" else value == "1"


def architectures(text: str | None = None) -> tuple[str, ...]:
    """The words behind DLKERN_CUDA_ARCHS; ValueError for what is not a list of compute capabilities."""
    text = os.environ.get("DLKERN_CUDA_ARCHS") or DEFAULT_ARCHITECTURES if text is None else text
    found = []
    for item in filter(None, (part.strip() for part in re.split(r"[;, ]", text))):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(
                f"DLKERN_CUDA_ARCHS: {item!r} is no architecture; expected such as {DEFAULT_ARCHITECTURES!r}"
            )
        number, letter, ptx = match[1] + match[2], match[3], match[4]
        if int(number) < 80:
            raise ValueError(f"DLKERN_CUDA_ARCHS: {item!r} is older than 80, the first that dlkern's kernels run on")
        if ptx and letter:
            raise ValueError(f"DLKERN_CUDA_ARCHS: {item!r}: PTX of an {letter!r} architecture runs on no newer device")
        found.append(f"compute_{number}" if ptx else f"sm_{number}{letter}")
    if not found:
        raise ValueError(f"DLKERN_CUDA_ARCHS={text!r} names no architecture")
    return tuple(dict.fromkeys(found))


def _nvcc() -> str | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home:
            path = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if path is None:
                raise RuntimeError(f"{name}={home!r} holds no bin/nvcc")
            return path
    return shutil.which("nvcc")


def find() -> Toolkit | None:
    """The toolkit to build with; None where none is wanted or, without being demanded, none is there.

    Raises:
        RuntimeError: DLKERN_BUILD_CUDA=1 and there is no nvcc that works.
        ValueError: an environment variable that makes no sense.
    """
    demanded, chosen = wanted(), architectures()
    if demanded is False:
        return None
    nvcc = _nvcc()
    if nvcc is None:
        if demanded:
            raise RuntimeError("DLKERN_BUILD_CUDA=1, and there is no nvcc on the path or in CUDA_HOME/bin")
        return None
    # nvcc may be a script on the path: its toolkit is where the compiler says it is
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", shown)
    if top is None or version is None:
        raise RuntimeError(f"{nvcc} does not run: {(dry.stderr or shown).strip()[-500:]}")
    return Toolkit(str(Path(top[1].strip()).resolve() / "bin" / "nvcc"), version[1], chosen)


def compile_objects(toolkit: Toolkit, folder: str | Path) -> list[str]:
    """Object files of every csrc/cuda/*.cu in ``folder``; those whose sources and options are unchanged stay.

    Raises:
        RuntimeError: with nvcc's own words, where it fails.
    """
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    options = [*FLAGS, *toolkit.gencode]
    read = sorted(p for d in ("cuda", "include") for p in (CSRC / d).rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    content = b"\0".join([toolkit.version.encode(), *map(str.encode, options), *(p.read_bytes() for p in read)])
    key = hashlib.sha256(content).hexdigest()[:16]
    out = Path(folder, "cuda")
    out.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        target = out / f"{source.stem}-{key}.o"
        objects.append(str(target))
        if target.is_file():
            continue
        part = target.with_suffix(f".{os.getpid()}.part.o")
        command = [toolkit.nvcc, *options, *includes, "-c", str(source), "-o", str(part)]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{(done.stdout + done.stderr).strip()}")
        part.replace(target)
    return objects


def add_kernels(ext: Extension, folder: str | Path) -> None:
    """Give the extension the CUDA kernels where there is an nvcc; without it, it has its CPU kernels alone.

    Raises:
        RuntimeError: DLKERN_BUILD_CUDA=1, and they cannot be built.
    """
    try:
        toolkit = find()
        if toolkit is None:
            return
        link_args, objects = toolkit.link_args, compile_objects(toolkit, folder)
    except RuntimeError as error:
        if wanted():
            raise
        print(f"WARNING: dlkern._C is built without CUDA kernels: {error}", file=sys.stderr)
        return
    ext.define_macros, ext.extra_objects = toolkit.macros, objects
    ext.extra_link_args = [*ext.extra_link_args, *link_args]


class BuildPython(build_py):
    """build_py that puts the CUDA sources into dlkern.kernels.cuda, which compiles them where nvcc did not."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an editable installation reads the clone's
            return
        for path in [*(CSRC / "cuda").iterdir(), *(CSRC / "include" / "dlkern").iterdir()]:
            target = Path(self.build_lib, "dlkern", "kernels", "cuda", "csrc", path.relative_to(CSRC))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))
