"""DDP and FSDP2 over two processes give the outputs and the gradients of one process, and a whole
adapter."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.support.models import TinyLM
from tests.support.processes import CONTEXT
from tests.support.toys import error, randomise
from torch import nn

import veneer

IDS = torch.arange(24).view(4, 6) % 17


def attached() -> tuple[nn.Module, veneer.Handle]:
    torch.manual_seed(0)
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["all-linear", "embed_tokens"]))
    randomise(handle)
    return model, handle


def expected() -> tuple[torch.Tensor, list[torch.Tensor]]:
    model, handle = attached()
    output = model(IDS)
    output.square().mean().backward()
    return output.detach(), [parameter.grad.clone() for parameter in handle.parameters()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank: int, port: int, kind: str, folder: str) -> None:
    warnings.simplefilter("ignore")  # in a child process, torch's own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model, handle = attached()
        wanted, gradients = expected()
        if kind == "ddp":
            run = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model.model.layers:
                fully_shard(block)
            run = fully_shard(model)
        mine = IDS[2 * rank : 2 * rank + 2]
        output = run(mine)
        assert error(output, wanted[2 * rank : 2 * rank + 2]) < 1e-5
        output.square().mean().backward()
        for parameter, gradient in zip(handle.parameters(), gradients, strict=True):
            assert error(whole(parameter.grad), gradient) < 1e-4
        with veneer.use(run, None):
            assert error(run(mine), wanted[2 * rank : 2 * rank + 2]) > 1e-3
        if kind == "ddp" and rank == 0:
            veneer.save(
                run, Path(folder) / "adapter", alone=True
            )  # tests/test_save_distributed.py: on every rank
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(
        work, (port, kind, str(tmp_path)), nprocs=2, start_method=CONTEXT.get_start_method()
    )
    if kind == "ddp":
        torch.manual_seed(0)
        model = TinyLM()
        veneer.load(model, tmp_path / "adapter")
        assert error(model(IDS), expected()[0]) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_export():
    model, _ = attached()
    program = torch.export.export(model.eval(), (IDS,))
    assert error(program.module()(IDS), model(IDS)) < 1e-5
