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
    from ._swap import explain

    print(explain(model))
    return 0


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


# ------------------------------------------------------------------------------------- parser
def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
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
    explain.set_defaults(run=_explain)

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
    return parser


if __name__ == "__main__":
    sys.exit(main())
