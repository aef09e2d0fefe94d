"""What is installed under which name, and what a clone does without being installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools.setup."""
    setuptools = pytest.importorskip("setuptools")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    fake = types.ModuleType("pybind11")  # a requirement of the build alone
    fake.get_include = lambda: "pybind11/include"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pybind11", fake)
    monkeypatch.delenv("DLKERN_REQUIRE_EXTENSION", raising=False)  # CI sets it
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return seen


def _packages(folder: Path, name: str) -> set[str]:
    """Every folder of Python files under ``folder``, as the package it becomes."""
    found = set()
    for path in folder.rglob("*.py"):
        parts = path.parent.relative_to(folder).parts
        if "__pycache__" not in parts:
            found.add(".".join([name, *parts]))
    return found


def test_every_folder_of_code_is_a_package_under_dlkern(setup_arguments: dict[str, Any]) -> None:
    expected = _packages(ROOT / "dlkern", "dlkern") | _packages(ROOT / "kernels", "dlkern.kernels")
    listed = setup_arguments["packages"]
    assert sorted(listed) == sorted(expected)
    assert {name.partition(".")[0] for name in listed} == {"dlkern"}  # no top-level kernels, tests or benchmarks
    assert {"dlkern.bench", "dlkern.demo", "dlkern.kernels.reference", "dlkern.nn", "dlkern.ops"} <= set(listed)


def test_the_extension_is_optional_and_all_its_sources_exist(setup_arguments: dict[str, Any]) -> None:
    (extension,) = setup_arguments["ext_modules"]
    assert extension.name == "dlkern._C"
    assert extension.optional
    assert [path for path in extension.sources if not (ROOT / path).is_file()] == []


def test_setup_and_pyproject_keep_to_the_rules() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
    project = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*)\]$", project, re.MULTILINE)
    names = {re.match(r"[\w-]+", item.strip(' "')).group() for item in requires.split(",")}  # type: ignore[union-attr]
    assert names == {"setuptools", "pybind11"}
    for extra in ("demo", "test", "bench", "numba", "cuda12", "cuda13"):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_the_source_distribution_can_build_the_extension() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text()
    for suffix in {path.suffix for path in (ROOT / "csrc").rglob("*") if path.is_file()}:
        assert f"*{suffix}" in manifest or "graft csrc" in manifest, suffix


def _uninstalled(*arguments: str) -> str:
    """Run Python in the clone's root where only torch's folder of packages is on the path.

    ``-S`` leaves .pth files unread, and with them an editable installation of dlkern.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONHOME")}
    environment["PYTHONPATH"] = str(Path(torch.__file__).parents[1])
    done = subprocess.run([sys.executable, "-S", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_clone_works_from_its_root_without_being_installed() -> None:
    printed = _uninstalled(
        "-c",
        "import json, sys, dlkern, dlkern.kernels, dlkern.kernels.activation as a; "
        "print(json.dumps([dlkern.__file__, dlkern.kernels.__file__, a.__name__, 'kernels' in sys.modules]))",
    )
    assert json.loads(printed) == [
        str(ROOT / "dlkern" / "__init__.py"),
        str(ROOT / "kernels" / "__init__.py"),
        "dlkern.kernels.activation",
        False,
    ]


def test_python_m_dlkern_works_uninstalled() -> None:
    facts = json.loads(_uninstalled("-m", "dlkern", "info", "--json"))
    assert facts["package"] == str(ROOT / "dlkern")


def test_readme_commands_name_extras_that_exist() -> None:
    page = (ROOT / "README.md").read_text()
    assert 'pip install ".[demo]" && dlkern demo' in page
    assert 'pip install -e ".[test]" && pytest' in page
