"""What is installed here and what of dlkern can run: the facts behind ``dlkern info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from . import dispatch
from ._version import __version__


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not there."""
    found: dict[str, str | None] = {
        "dlkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("torchvision", "timm", "triton", "numpy"):
        found[name] = _version(name)
    found["cupy"] = next(filter(None, map(_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy"))), None)
    found["cuda runtime"] = torch.version.cuda
    found["cuda driver"] = _cuda_driver()
    return found


def _version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_driver() -> str | None:
    """The newest CUDA version that the driver serves, or None without a driver."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent from CPU builds of torch
    number = ask() if ask is not None and torch.cuda.is_available() else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def cpu() -> dict[str, Any]:
    """The processor: model, cores, the threads torch uses, the instruction set torch chose."""
    return {
        "model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """One entry per CUDA device: name, architecture, memory in GiB."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "architecture": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def extension() -> dict[str, Any]:
    """What the extension was built with; ``missing`` holds the reason where it is not there."""
    try:
        from dlkern import _C
    except ImportError as error:
        return {
            "missing": str(error),
            "remedy": "put a C++17 compiler on the path and run in the clone: pip install --force-reinstall . "
            "(or -e .); without the extension PyTorch's own CPU kernels run",
        }
    return {**_C.build_info(), "file": _C.__file__}


def gather() -> dict[str, Any]:
    """All of it, as plain values that JSON can hold."""
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": sys.executable,
        "package": os.path.dirname(os.path.abspath(__file__)),
        "cpu": cpu(),
        "gpus": gpus(),
        "backends": dispatch.available_backends(),
        "extension": extension(),
        "environment": {n: v for n, v in os.environ.items() if n.startswith("DLKERN_") or n == "TRITON_INTERPRET"},
    }


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`gather` as a table for people."""
    rows: list[tuple[str, str]] = []

    def section(title: str, pairs: list[tuple[str, Any]]) -> None:
        rows.append((title, ""))
        rows.extend((f"  {name}", _text(value)) for name, value in pairs)

    section("versions", list(facts["versions"].items()))
    about = facts["cpu"]
    section(
        "devices",
        [
            ("cpu", f"{about['model']} ({facts['platform']})"),
            ("cores, threads", f"{about['cores']}, {about['threads']}"),
            ("instruction set", about["isa"]),
            *[
                (f"cuda:{i}", f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB")
                for i, gpu in enumerate(facts["gpus"])
            ],
            *([] if facts["gpus"] else [("cuda", "no device")]),
        ],
    )
    section("backends", [(n, "available" if why is None else f"no: {why}") for n, why in facts["backends"].items()])
    section("extension", list(facts["extension"].items()))
    if facts["environment"]:
        section("environment", list(facts["environment"].items()))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows)
