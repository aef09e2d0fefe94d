"""DistributedDataParallel on two gloo processes."""

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

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def _train(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name in ("plain", "swapped"):
        torch.manual_seed(0)
        model = models.Stack()
        if name == "swapped":
            dlkern.swap(model)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))[rank]
        for _ in range(3):
            optimizer.zero_grad()
            ddp(x).square().mean().backward()
            optimizer.step()
        results[name] = [p.detach().clone() for p in model.parameters()]
        if name == "swapped":
            calls = dlkern.report(ddp).calls
            results["calls"] = (calls.fused, calls.fallback)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_train_as_the_plain_model(tmp_path: os.PathLike[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_train, args=(port, str(tmp_path)), nprocs=2, join=True)
    first, second = (torch.load(os.path.join(tmp_path, f"{rank}.pt")) for rank in (0, 1))
    assert first["calls"] == second["calls"] == (18, 0)
    for a, b, plain in zip(first["swapped"], second["swapped"], first["plain"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, plain, rtol=1e-4, atol=1e-5)
