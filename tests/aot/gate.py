"""The gate: limits, the table of registers, and which jobs a check compiles."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .compile import TRITON, Failed, Found, compile_all, job_hash
from .jobs import ARCHITECTURES, Job, every_job, without_jobs

TABLE = Path(__file__).with_name("registers.json")
UPDATE = "python -m tests.aot update"
#: Bytes of shared memory that one block may have, by architecture.
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: Columns of a multiprocessor's tensor memory (sm_100).
MAX_TENSOR_MEMORY = 512
#: Compilations of unchanged jobs in one check; more where covering them takes more.
SUBSET = 160

Pair = tuple[str, int]

#: Bytes of stack that an older compiler takes where Triton 3.8 takes none from the same code, by Triton's version. No
#: more than these, and none on sm_90; a newer version has no entries: there a spill is mended in the kernel.
KNOWN_STACK: dict[str, dict[Pair, int]] = {
    "3.6": {
        ("batch_norm_act _backward_sums_kernel planes 128x16x4 fp16/fp32 identity residual round", 120): 8,
        ("batch_norm_act _backward_sums_kernel planes 8x256x4 bf16/bf16 identity residual round", 100): 8,
        ("conv_bn_act forward_kernel pointwise 128x128x64x8x3 fp16 norm-batch identity c unit", 100): 72,
        ("conv_bn_act forward_kernel taps 128x128x64x8x3 fp16 norm-batch identity bias c unit", 100): 56,
        ("conv_bn_act input_gradient_kernel flat 64x64x64x4x3 tf32", 80): 8,
        ("recurrent step_forward_kernel lstm fp32 stepx16x32x64x4x1 tanh", 100): 216,
    }
}


class Entry(NamedTuple):
    """What the table has of a job: its hash, and registers in the order of ARCHITECTURES (None: not one of its own)."""

    hash: str
    registers: tuple[int | None, ...]


# ------------------------------------------------------------------------------------------- the table
def read_table(path: Path = TABLE) -> dict[str, dict[str, Entry]]:
    """Entries by Triton's version and label."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["architectures"] != list(ARCHITECTURES):
        raise ValueError(f"{path.name} is of architectures {content['architectures']}, expected {ARCHITECTURES}")
    return {
        version: {label: Entry(code, tuple(registers)) for label, (code, *registers) in entries.items()}
        for version, entries in content["triton"].items()
    }


def write_table(table: dict[str, dict[str, Entry]], path: Path = TABLE) -> None:
    """One line a job, sorted, so that a change shows as the lines of what changed."""
    versions = []
    for version, entries in sorted(table.items()):
        lines = [
            f"{json.dumps(label)}: {json.dumps([entry.hash, *entry.registers])}"
            for label, entry in sorted(entries.items())
        ]
        versions.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    text = f'{{"architectures": {json.dumps(ARCHITECTURES)}, "triton": {{\n' + ",\n".join(versions) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------ the limits
def over_limits(job: Job, found: Found | Failed) -> list[str]:
    """What of a compiled job is not allowed, whatever the table says."""
    where = f"{found.label} sm_{found.arch}"
    if isinstance(found, Failed):
        return [f"{where}: does not compile ({found.reason})"]
    wrong = []
    known = KNOWN_STACK.get(TRITON, {}).get((found.label, found.arch), 0)
    if found.stack > known or found.local:
        wrong.append(f"{where}: spills ({found.stack} bytes of stack, {found.local} of local memory; expected {known})")
    if found.shared > MAX_SHARED[found.arch]:
        wrong.append(f"{where}: {found.shared} bytes of shared memory, at most {MAX_SHARED[found.arch]} are there")
    if found.tensor_memory > MAX_TENSOR_MEMORY:
        wrong.append(f"{where}: {found.tensor_memory} columns of tensor memory, at most {MAX_TENSOR_MEMORY} are there")
    if job.wgmma and found.arch == 90 and not found.wgmma:
        wrong.append(f"{where}: no wgmma in the code, expected some")
    return wrong


def allowed(registers: int) -> int:
    """The most registers where the table has ``registers``: growth of 10 %, or of 8."""
    return registers + max(registers // 10, 8)


def growth(entry: Entry | None, found: Found | Failed) -> list[str]:
    """Registers against the table's, where it has any."""
    if entry is None or isinstance(found, Failed):
        return []
    before = entry.registers[ARCHITECTURES.index(found.arch)]
    if before is None or found.registers <= allowed(before):
        return []
    return [f"{found.label} sm_{found.arch}: {found.registers} registers, {before} in the table"]


# -------------------------------------------------------------------------------------- what to compile
def stale(jobs: dict[str, Job], entries: dict[str, Entry]) -> list[str]:
    """Labels that the table lacks, or has with another hash."""
    return [name for name, job in jobs.items() if name not in entries or entries[name].hash != job_hash(job)]


def _features(label: str, arch: int) -> set[tuple[Any, ...]]:
    """What compiling a pair shows: each word of a kernel, and each of its first words on the architecture."""
    op, kernel, *words = label.split()
    return {(op, kernel, arch), *((op, kernel, word) for word in words), *((op, word, arch) for word in words)}


def _pairs(labels: Iterable[str]) -> list[Pair]:
    """Each job with each of its architectures."""
    return [(label, arch) for label in labels for arch in every_job()[label].architectures]


def subset(every: Iterable[Pair], rotation: int, size: int = SUBSET) -> list[Pair]:
    """Pairs that cover each kernel's words and architectures, filled up to ``size`` by what the rotation deals."""
    pairs = sorted(every)
    random.Random(rotation).shuffle(pairs)
    chosen: list[Pair] = []
    rest: list[Pair] = []
    covered: set[tuple[Any, ...]] = set()
    for pair in pairs:
        new = _features(*pair) - covered
        (chosen if new else rest).append(pair)
        covered |= new
    return chosen + rest[: max(0, size - len(chosen))]


def today() -> int:
    """The rotation of a day."""
    return datetime.datetime.now(datetime.timezone.utc).date().toordinal()


# ------------------------------------------------------------------------------------------- commands
def _compile(pairs: Sequence[Pair], report: Callable[[str], None]) -> Iterator[Found | Failed]:
    for done, one in enumerate(compile_all(pairs), 1):
        if done % 100 == 0:
            report(f"{done} of {len(pairs)} compiled")
        yield one


def _say(lines: Sequence[str], report: Callable[[str], None]) -> None:
    for line in lines:
        report(line)


def check(*, full: bool = False, rotation: int | None = None, report: Callable[[str], None] = print) -> list[str]:
    """Compile what has changed and a subset of the rest (``full``: all of it); what is wrong, in words.

    Each line of it is reported as it is found, too.
    """
    jobs, table = every_job(), read_table()
    entries = table.get(TRITON, {})
    wrong = [f"{name}: no job compiles this kernel (see tests/aot)" for name in without_jobs()]
    if TRITON not in table:
        report(f"there is no table of Triton {TRITON}: registers are compared with nothing ({UPDATE} makes one)")
    changed = stale(jobs, entries) if TRITON in table else []
    for label in changed:
        what = "has changed since" if label in entries else "is not in"
        wrong.append(f"{label}: {what} the table of Triton {TRITON}; run: {UPDATE}")
    gone = [label for label in entries if label not in jobs]
    wrong += [f"{label}: in the table of Triton {TRITON}, but no job has this label; run: {UPDATE}" for label in gone]
    unchanged = [label for label in jobs if label not in set(changed)]
    _say(wrong, report)
    rotation = today() if rotation is None else rotation
    pairs = _pairs(jobs if full else changed)
    if not full:
        pairs += subset(_pairs(unchanged), rotation)
    report(
        f"Triton {TRITON}: {len(jobs)} jobs on {len(ARCHITECTURES)} architectures, {len(changed)} changed; "
        f"compiling {len(pairs)}" + ("" if full else f" (rotation {rotation})")
    )
    for one in _compile(pairs, report):
        problems = over_limits(jobs[one.label], one) + growth(entries.get(one.label), one)
        _say(problems, report)
        wrong += problems
    return wrong


def update(
    *, full: bool = False, accept_growth: bool = False, report: Callable[[str], None] = print, path: Path = TABLE
) -> list[str]:
    """Compile what has changed (``full``: all) and write down what is within the limits; the rest, in words."""
    table = read_table(path)
    jobs, entries = every_job(), table.get(TRITON, {})
    labels = list(jobs) if full else stale(jobs, entries)
    report(f"Triton {TRITON}: compiling {len(labels)} of {len(jobs)} jobs on {len(ARCHITECTURES)} architectures")
    kept = {label: entry for label, entry in entries.items() if label in jobs}
    by_label: dict[str, list[Found | Failed]] = {}
    wrong: list[str] = []
    for one in _compile(_pairs(labels), report):
        found = by_label.setdefault(one.label, [])
        found.append(one)
        if len(found) == len(jobs[one.label].architectures):
            problems = _enter(jobs[one.label], found, kept, accept_growth)
            _say(problems, report)
            wrong += problems
            write_table({**table, TRITON: kept}, path)  # at once: an interrupted update goes on from here
    write_table({**table, TRITON: kept}, path)
    return wrong


def _enter(job: Job, found: Sequence[Found | Failed], entries: dict[str, Entry], accept_growth: bool) -> list[str]:
    """Put a job that is compiled for every architecture into ``entries``, or say why not."""
    problems = [line for one in found for line in over_limits(job, one)]
    if not accept_growth:
        more = [line for one in found for line in growth(entries.get(job.label), one)]
        problems += [f"{line} (--accept-growth writes it down all the same)" for line in more]
    if not problems:
        registers = {one.arch: one.registers for one in found if isinstance(one, Found)}
        entries[job.label] = Entry(job_hash(job), tuple(registers.get(arch) for arch in ARCHITECTURES))
    return problems
