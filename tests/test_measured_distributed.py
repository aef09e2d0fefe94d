"""A measured swap under torch.distributed: rank 0 measures, and all ranks choose alike."""

from __future__ import annotations

import os
import socket

import pytest
import swap_models as models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import dlkern
from dlkern.tuning import answers, policy, race

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def _begin(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _swap(rank: int, port: int, folder: str) -> None:
    os.environ["DLKERN_CACHE_DIR"] = os.path.join(folder, f"cache-{rank}")
    _begin(rank, port)
    raced = []
    real = race.race

    def noted(call: object, *rest: object) -> object:
        raced.append(call)
        return real(call, *rest)  # type: ignore[arg-type]

    race.race = noted  # type: ignore[assignment]
    model = models.Stack()
    x = torch.randn(4 + rank, 3, 8, 8)  # batches of two sizes
    dlkern.swap(model, sample=x, policy="measured")
    DistributedDataParallel(model)(x).sum().backward()
    report = dlkern.report(model)
    assert report.measured is not None
    torch.save(
        {
            "raced": len(raced),
            "swapped": [(row.path, row.backend, row.ratio) for row in report.swapped],
            "skipped": [(row.path, row.ratio) for row in report.skipped],
            "summary": report.measured.summary,
            "answers": sorted((k.op, k.shape, a.backend) for k, a in answers.everything()),
            "files": sorted(os.listdir(folder)),
        },
        os.path.join(folder, f"{rank}.pt"),
    )
    dist.barrier()
    dist.destroy_process_group()


def _fail(rank: int, port: int, folder: str) -> None:
    os.environ["DLKERN_CACHE_DIR"] = os.path.join(folder, "cache")
    _begin(rank, port)
    model = models.Stack()
    classes = [type(m) for m in model.modules()]
    if rank == 0:

        def broken(*_: object) -> None:
            raise ArithmeticError("planned")

        policy.race.race = broken  # type: ignore[assignment]
    message = ""
    try:
        dlkern.swap(model, sample=torch.randn(2, 3, 8, 8), policy="measured")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    same = classes == [type(m) for m in model.modules()]
    torch.save({"message": message, "same": same}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _spawn(function: object, folder: os.PathLike[str]) -> list[dict[str, object]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(function, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in (0, 1)]


def test_two_ranks_choose_alike(tmp_path: os.PathLike[str]) -> None:
    first, second = _spawn(_swap, tmp_path)
    assert first["raced"]
    assert second["raced"] == 0
    for name in ("swapped", "skipped", "summary", "answers"):
        assert first[name] == second[name], name
    assert first["answers"]
    assert "cache-1" not in os.listdir(tmp_path)


def test_an_error_on_rank_0_reaches_the_other(tmp_path: os.PathLike[str]) -> None:
    first, second = _spawn(_fail, tmp_path)
    assert first == {"message": "ArithmeticError: planned", "same": True}
    assert second["same"]
    assert "failed on rank 0: ArithmeticError: planned" in str(second["message"])
