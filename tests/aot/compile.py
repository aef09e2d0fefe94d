"""One job compiled for one architecture, and what stands in its code; a job's hash."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .jobs import Job, every_job

#: Triton's version as the table has it: a patch release has no table of its own.
TRITON = ".".join(triton.__version__.split(".")[:2])
_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Found(NamedTuple):
    """What a job takes on an architecture: registers a thread, bytes of stack, of local memory (spills) and of shared
    memory, columns of tensor memory; the number of wgmma instructions; the seconds it took to compile."""

    label: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    wgmma: int
    seconds: float


class Failed(NamedTuple):
    """A job that does not compile for an architecture."""

    label: str
    arch: int
    reason: str


# ----------------------------------------------------------------------------------------- compiling
def compile_job(job: Job, arch: int) -> Found:
    """Compile a job for an architecture such as 90."""
    start = time.perf_counter()
    names = job.kernel.arg_names
    if set(names) != set(job.signature):
        raise ValueError(f"{job.label}: arguments {sorted(set(names) ^ set(job.signature))} do not match the kernel's")
    ordered = {name: job.signature[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(ordered.items())
        if str(kind).startswith("*") or name in job.divisible
    }
    constants = {(names.index(name),): value for name, value in job.constants.items()}
    source = ASTSource(job.kernel, ordered, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(job.options))
    used = _resources(compiled.asm["cubin"])
    return Found(
        job.label,
        arch,
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        compiled.asm["ptx"].count("wgmma.mma_async"),
        time.perf_counter() - start,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump does not tell what a kernel takes:\n{out}")
    return found


def _compile_label(label: str, arch: int) -> Found | Failed:
    """In a worker: jobs themselves do not pickle."""
    try:
        return compile_job(every_job()[label], arch)
    except Exception as error:  # whatever a compiler's passes raise
        return Failed(label, arch, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that find nothing in Triton's cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def compile_all(pairs: Sequence[tuple[str, int]], workers: int = 2) -> Iterator[Found | Failed]:
    """Compile pairs of label and architecture by that many processes; results come as they are ready.

    A compiler that crashes takes its process along, and with it the pool: what was being compiled is then compiled
    again, one by one, which tells the culprit.
    """
    waiting = list(dict.fromkeys(pairs))
    while waiting:
        with _pool(workers) as pool:
            futures = {pool.submit(_compile_label, *pair): pair for pair in waiting}
            try:
                for future in concurrent.futures.as_completed(futures):
                    result = future.result()
                    waiting.remove(futures[future])
                    yield result
            except BrokenProcessPool:
                pass
        suspects, waiting = waiting[: 2 * workers], waiting[2 * workers :]
        for pair in suspects:
            with _pool(1) as pool:
                try:
                    yield pool.submit(_compile_label, *pair).result()
                except BrokenProcessPool:
                    yield Failed(*pair, "the compiler crashed")


# -------------------------------------------------------------------------------------------- hashing
def job_hash(job: Job) -> str:
    """Of the sources of the kernel and of what it calls, and of how it is compiled; 12 hexadecimal digits.

    Triton's own ``cache_key`` has line numbers in it as well, and would be another for each line added above.
    """
    parts = {
        "sources": _sources(job.kernel),
        "signature": [job.signature[name] for name in job.kernel.arg_names],
        "constants": [(name, str(value)) for name, value in sorted(job.constants.items())],
        "divisible": sorted(job.divisible),
        "options": sorted(job.options.items()),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _sources(kernel: JITFunction) -> dict[str, Any]:
    """Code of a kernel and of each function it reaches, and the values of the constants they read, by full name."""
    found: dict[str, Any] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name in found:
            continue
        source = textwrap.dedent(inspect.getsource(function.fn))
        found[name] = code_alone(source)
        for reached, value in _globals(source, function.fn.__globals__):
            if isinstance(value, JITFunction):
                if not value.fn.__module__.startswith("triton."):  # (Triton's own are known by its version)
                    waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                found[f"{name}: {reached}"] = str(value.value)
    return dict(sorted(found.items()))


def _globals(source: str, namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Global names that code reads, attributes of modules among them, with their values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in namespace:
            yield node.id, namespace[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = namespace.get(node.value.id)
            if isinstance(module, ModuleType) and hasattr(module, node.attr):
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr)


_BETWEEN_STATEMENTS = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
_NAMES = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}
_ENDS = tuple(_NAMES.values())


def code_alone(source: str) -> list[str]:
    """The tokens of a function without comments, docstrings and line breaks that mean nothing."""
    kept: list[str] = []
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        docstring = token.type == tokenize.STRING and before in _BETWEEN_STATEMENTS
        its_end = token.type == tokenize.NEWLINE and before == tokenize.STRING and kept[-1] in _ENDS
        if not docstring and not its_end:
            kept.append(_NAMES.get(token.type, token.string))
        before = token.type
    return kept
