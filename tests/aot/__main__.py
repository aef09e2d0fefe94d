"""``python -m tests.aot``; see the package."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time

# Functions that Triton's interpreter has taken over do not compile; it does so where this is set at its import.
os.environ.pop("TRITON_INTERPRET", None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description="Triton's kernels compiled without a GPU")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="compile what changed and a subset of the rest, against the table")
    command.add_argument("--full", action="store_true", help="compile every job for every architecture")
    command.add_argument("--rotation", type=int, help="which subset (default: today's)")
    command = commands.add_parser("update", help="compile what changed and write it into the table")
    command.add_argument("--full", action="store_true", help="compile every job for every architecture")
    command.add_argument("--accept-growth", action="store_true", help="write down more registers, too")
    commands.add_parser("list", help="the jobs' labels, as JSON")
    options = vars(parser.parse_args())
    name = options.pop("command")

    from . import gate  # only now: it imports triton

    if name == "list":
        json.dump(list(gate.every_job()), sys.stdout)
        return 0
    start = time.perf_counter()
    report = functools.partial(print, flush=True)
    wrong = (gate.check if name == "check" else gate.update)(**options, report=report)
    print(f"{len(wrong)} wrong, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
