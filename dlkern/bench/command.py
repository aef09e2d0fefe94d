"""``dlkern bench``: plan, run, print, write."""

from __future__ import annotations

import os

from . import provenance, results, suite
from .suite import BenchError, Settings

__all__ = ["BenchError", "Settings", "listing", "run"]


def run(settings: Settings) -> int:
    """Run the suite. Returns the exit code: 1 where parity is red somewhere.

    Raises:
        BenchError: an extra package or the device asked for is missing.
        ValueError: an unknown op, model, dtype or backend, or a path that cannot be written.
    """
    planned = suite.plan(settings)
    from . import show  # needs rich, which the plan has looked for

    facts = provenance.gather(planned.device.type)
    show.heading(facts)
    found = list(suite.run(settings, planned))
    show.tables(found)
    for why in planned.left_out:
        print(f"left out: {why}")
    if settings.json:
        results.write_json(settings.json, found, facts, settings.as_dict())
    if settings.csv:
        results.write_csv(settings.csv, found, facts)
    red = [result for result in found if result.red is not None]
    if settings.plot:
        if len(red) < len(found):
            show.picture(found, facts, settings.plot)
        else:
            print(f"no picture is drawn in {settings.plot}: nothing was timed")
    if settings.html:
        from . import page

        with open(settings.html, "w", encoding="utf-8") as file:
            file.write(page.page(found, facts))
    for path in filter(None, (settings.json, settings.csv, settings.plot, settings.html)):
        if os.path.exists(path):
            print(f"written: {os.path.abspath(path)}")
    if red:
        print(f"\nPARITY IS RED in {len(red)} of {len(found)} rows")
    return 1 if red else 0


def listing(settings: Settings) -> str:
    """Every op's cases on this device, the quick suite's marked, and the default models.

    Raises:
        BenchError: the device asked for is missing.
        ValueError: an unknown op, dtype or backend.
    """
    device_type = suite.checked(settings).type
    lines = []
    for op in settings.ops or tuple(suite.cases.OPS):
        found = suite.select(settings, op, device_type, every=True)
        lines.append(f"{op}: {len(found)} cases (* in the quick suite)")
        lines += [f"  {'*' if case.quick else ' '} {case}" for case in found]
    specs = settings.models or suite.models.DEFAULT
    lines.append("models:")
    lines += [f"  * {case.spec} {case}" for case in suite.model_cases(settings, specs, device_type)]
    return "\n".join(lines)
