"""The ``dlkern`` command. Exit codes: 0 done, 1 failed, 2 asked for wrongly."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ._version import __version__

# torch and what needs it are imported by the command that runs, so that --help comes at once


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (sys.argv[1:] by default) and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.own_process = argv is None
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("dlkern: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has gone; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(message: object, code: int) -> int:
    print(f"dlkern: {message}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------- commands
def _info(arguments: argparse.Namespace) -> int:
    from . import info

    facts = info.gather()
    print(json.dumps(facts, indent=2) if arguments.json else info.render(facts))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from . import models

    try:
        model = models.build(arguments.model)
    except models.ModelError as error:
        return _fail(error, 2)
    if arguments.measured:
        arguments.suite = False
        return _tune(arguments)
    from ._swap import explain

    print(explain(model))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.suite == (arguments.model is not None):
        return _fail("tune: expected MODEL or --suite", 2)
    from . import models
    from .bench import measure
    from .tuning import cache, command

    try:
        device = command.checked_device(arguments.device)
        if arguments.own_process:  # and no test's or notebook's
            measure.restart_stable()
        if arguments.suite:
            print(f"{command.suite(device)} calls raced")
        else:
            print(
                command.model(
                    arguments.model,
                    training=arguments.training,
                    batch=arguments.batch or (64 if device.type == "cuda" else 8),
                    image_size=arguments.image_size or (224 if device.type == "cuda" else 96),
                    dtype=arguments.dtype or "float32",
                    device=device,
                    any_format=arguments.channels_last,
                )
            )
    except models.ModelError as error:
        return _fail(error, 2)
    except ValueError as error:
        return _fail(error, 2)
    print(f"\nremembered in {cache.path(cache.identity(device.type))}")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from .tuning import cache

    if arguments.what == "clear":
        count = cache.clear()
        print(f"{count} file{'' if count == 1 else 's'} removed from {cache.folder()}")
    else:
        print(cache.show())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    try:
        found = list(doctor.examine(backends=tuple(arguments.backend)))
    except ValueError as error:
        return _fail(error, 2)
    print(doctor.render(found))
    return 1 if any(finding.state == "broken" for finding in found) else 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    try:
        return demo.run(
            demo.Settings(
                epochs=arguments.epochs,
                samples=arguments.samples,
                seed=arguments.seed,
                threads=arguments.threads,
                out=arguments.out,
                device=arguments.device,
            )
        )
    except demo.DemoError as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import command, measure

    settings = command.Settings(
        ops=tuple(arguments.op),
        models=tuple(arguments.model),
        every=arguments.all,
        only=arguments.cases,
        training=arguments.training,
        dtype=arguments.dtype,
        batch=arguments.batch,
        image_size=arguments.image_size,
        backends=tuple(arguments.backend),
        compile=arguments.compile,
        device=arguments.device,
        min_seconds=arguments.min_seconds,
        json=arguments.json,
        csv=arguments.csv,
        plot=arguments.plot,
        html=arguments.html,
    )
    try:
        if arguments.compare:
            from .bench import difference

            found = difference.compare(*map(difference.load, arguments.compare))
            print(difference.render(found))
            return 1 if found.reddened else 0
        if arguments.list:
            print(command.listing(settings))
            return 0
        if arguments.own_process:  # and no test's or notebook's
            measure.restart_stable()
        return command.run(settings)
    except command.BenchError as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)


# ------------------------------------------------------------------------------------- parser
def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlkern",
        description="Faster layers for PyTorch models, without changing the models.",
        epilog="example: dlkern info",
    )
    parser.add_argument("--version", action="version", version=f"dlkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="versions, devices, and each backend: available, or why it is not",
        description="Print versions, devices, and each backend: available, or the reason it is not.",
        epilog="example: dlkern info --json",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    info.set_defaults(run=_info)

    explain = commands.add_parser(
        "explain",
        help="what dlkern.swap would do with a model, and why",
        description="Build a model and print, site by site, what dlkern.swap does with it and why.",
        epilog="example: dlkern explain torchvision:resnet50",
    )
    explain.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:FUNCTION or path/to/file.py:FUNCTION",
    )
    explain.add_argument(
        "--measured", action="store_true", help="measure each site on random images, as dlkern tune does"
    )
    _add_sample(explain)
    explain.set_defaults(run=_explain)
    _add_tuning(commands)

    demo = commands.add_parser(
        "demo",
        help="train a ResNet on handwritten digits, plain and swapped, and compare",
        description="Train ResNet-18 on real handwritten digits twice from one seed, plain and after dlkern.swap, "
        "step by step beside each other; print losses, accuracies, time, memory and parity; save a picture.",
        epilog="example: dlkern demo --samples 1000 --out digits.png",
    )
    demo.add_argument("--epochs", type=_positive, default=1, metavar="N", help="passes over the digits (default 1)")
    demo.add_argument(
        "--samples", type=_positive, default=None, metavar="N", help="use N digits in all (default: every one, 5,000)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, split and order (default 0)")
    demo.add_argument("--threads", type=_positive, default=None, metavar="N", help="CPU threads (default: torch's own)")
    demo.add_argument(
        "--out", default="dlkern-demo.png", metavar="PICTURE.png", help="where the picture goes (default %(default)s)"
    )
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one, else cpu"
    )
    demo.set_defaults(run=_demo)
    _add_bench(commands)
    return parser


def _add_sample(parser: argparse.ArgumentParser) -> None:
    """What a model is measured on."""
    sample = parser.add_argument_group("what is measured")
    mode = sample.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="training", action="store_true", default=True, help="a training step (default)")
    mode.add_argument("--infer", dest="training", action="store_false", help="inference")
    sample.add_argument("--batch", type=_positive, metavar="N", help="images (default: 8 on a CPU, 64 on CUDA)")
    sample.add_argument("--image-size", type=_positive, metavar="N", help="height and width (default: 96, 224)")
    sample.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="autocast's (default: float32)")
    sample.add_argument("--channels-last", action="store_true", help="try this memory format as well")
    sample.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")


def _add_tuning(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure which backend is fastest at each site of a model, and remember it",
        description="Record what a model asks for on random images, check each backend against PyTorch on every shape, "
        "time those that are right, print the choice with its ratio per site, and remember it for "
        'dlkern.swap(model, sample=batch, policy="measured").',
        epilog="example: dlkern tune torchvision:mobilenet_v2 --infer",
    )
    tune.add_argument("model", metavar="MODEL", nargs="?", help="named as for explain")
    tune.add_argument("--suite", action="store_true", help="the quick cases of dlkern bench instead of a model")
    _add_sample(tune)
    tune.set_defaults(run=_tune)

    cache = commands.add_parser(
        "cache",
        help="the measurements that are remembered: show them, or clear them",
        description="Show the tuning cache's folder and answers, or remove them. DLKERN_CACHE_DIR names the folder.",
        epilog="example: dlkern cache show",
    )
    cache.add_argument("what", choices=("show", "clear"))
    cache.set_defaults(run=_cache)

    doctor = commands.add_parser(
        "doctor",
        help="run every op of every available backend once, and say what is broken and what to do",
        description="Run every op that an available backend has on a small case, forward and backward, and hold it to "
        "the parity rule. Exit code 1 where one is broken.",
        epilog="example: dlkern doctor",
    )
    doctor.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="only this backend, also where it is emulated"
    )
    doctor.set_defaults(run=_doctor)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="parity, time and memory of ops and models on this device, PyTorch beside dlkern",
        description="Hold every row to the parity rule, then time it in turn with PyTorch: eager, torch.compile (on "
        "CUDA, or with --compile) and dlkern; memory kept for backward. Without --op and --model: a quick suite of "
        "both. A row whose parity is red shows no time and makes the exit code 1.",
        epilog="example: dlkern bench --op batch_norm_act --train --json bench.json",
    )
    what = bench.add_argument_group("what runs")
    what.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op; can be repeated")
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="only this model, named as for explain; can be repeated",
    )
    what.add_argument("--all", action="store_true", help="every case of the ops, not the quick ones alone")
    what.add_argument("--cases", metavar="TEXT", help="only the ops' cases whose name (see --list) contains TEXT")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="training", action="store_true", default=None, help="training alone")
    mode.add_argument("--infer", dest="training", action="store_false", default=None, help="inference alone")
    what.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16; autocast for models (default: float32 on a CPU; bfloat16 on CUDA, and "
        "every one with --all or --cases)",
    )
    what.add_argument("--batch", type=_positive, metavar="N", help="batch (default: 8 on a CPU, 64 on CUDA)")
    what.add_argument(
        "--image-size", type=_positive, metavar="N", help="height and width of the models' images (default: 96, 224)"
    )
    what.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="time this backend too; can be repeated"
    )
    what.add_argument("--compile", action=argparse.BooleanOptionalAction, help="time torch.compile (default: on CUDA)")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    what.add_argument(
        "--min-seconds", type=_seconds, metavar="S", help="least time of one comparison (default: 1, on CUDA 0.3)"
    )
    what.add_argument("--list", action="store_true", help="print the cases and stop")
    out = bench.add_argument_group("where results go, beside the tables")
    out.add_argument("--json", metavar="FILE.json", help="everything, with versions, commit, date and device")
    out.add_argument("--csv", metavar="FILE.csv", help="a line per row")
    out.add_argument("--plot", metavar="FILE.png", help="a picture of the ratios (also .pdf, .svg)")
    out.add_argument("--html", metavar="FILE.html", help="one page with a sortable table and charts")
    out.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing: print what moved between two files of --json beyond the noise",
    )
    bench.set_defaults(run=_bench)


if __name__ == "__main__":
    sys.exit(main())
