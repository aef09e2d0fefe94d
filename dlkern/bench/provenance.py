"""Where a measurement comes from: versions, date, commit, device, and how quiet the machine was."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from dlkern import info

from . import measure

#: Names the commit of a copy of the repository that has no .git of its own.
COMMIT_VARIABLE = "DLKERN_COMMIT"


def device_name(device_type: str | None = None) -> str:
    """The GPU's or the processor's model; by default of the GPU where there is one."""
    cuda = torch.cuda.is_available() if device_type is None else device_type == "cuda"
    return torch.cuda.get_device_name() if cuda else info.cpu()["model"]


def folder_name(device: str) -> str:
    """The folder of benchmarks/results that holds a device's files."""
    return "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()


def gather(device_type: str | None = None) -> dict[str, Any]:
    """All of it, as plain values that JSON can hold."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(Path(__file__).resolve().parents[2]),
        "device": device_name(device_type),
        "cpu": info.cpu(),
        "versions": info.versions(),
        "extension": {k: v for k, v in info.extension().items() if k != "file"},
        "environment_missing": measure.missing_stability(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def commit(root: Path) -> str | None:
    """The commit of the clone at ``root`` ("... with uncommitted changes" where there are some), or None.

    A package that is installed inside of some other repository is no clone, so ``root`` must be the top.
    """

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:
        return os.environ.get(COMMIT_VARIABLE) or None
    changed = git("status", "--porcelain", "--untracked-files=no")
    head = git("rev-parse", "HEAD")
    return head + (" with uncommitted changes" if changed else "") if head else None


def missing(facts: dict[str, Any]) -> list[str]:
    """What the facts of a results file lack before a figure of it may be shown, in words; empty where nothing."""
    lacking = [name for name in ("benchmark", "date", "device") if not facts.get(name)]
    if str(facts.get("commit") or "unknown").startswith("unknown"):
        lacking.append("commit")
    versions = facts.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    lacking += [f"versions.{name}" for name in ("dlkern", "torch", "python") if not versions.get(name)]
    rows = facts.get("rows")
    if not isinstance(rows, list):
        return [*lacking, "rows"]
    for index, row in enumerate(rows):
        lacking += [f"rows[{index}].{name}" for name in _row_lacks(row)]
    return lacking


def _row_lacks(row: dict[str, Any]) -> list[str]:
    """A row with a figure must say how the figure was taken."""
    figures = [name for name in ("ratio", "microseconds_over") if row.get(name) is not None]
    measured = row.get("measured")
    if measured is None:
        return ["measured"] if figures else []
    return [f"measured.{n}" for n in ("baseline", "rounds", "threads", "device", "milliseconds") if not measured.get(n)]
