"""A base that is spread over the processes of a run, its frozen weights alone, by FSDP2's
`fully_shard`.

    base       each process holds its share; a block is gathered before it computes, and let go after
    adapter    whole in each process, in float32 over a 16-bit base: its gradients travel as without FSDP

What trains is small, and would have to be gathered as well: it is not spread. With `shard_size`
there are several copies of the base, each spread over so many processes (HSDP): blocks are gathered
among those alone.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from veneer.attach.adapted_module import base_class
from veneer.distributed import is_spread, reshard
from veneer.models.load import Base
from veneer.models.shares import WholeOnlyError
from veneer.train.callbacks import say
from veneer.train.tasks import Task
from veneer.variants import VARIANTS


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time, from the inside out: those that transformers
    would not split over devices, but for who shares a parameter with another module, which are
    gathered together."""
    names = {*(getattr(model, "_no_split_modules", None) or ())}
    found = [
        module
        for module in model.modules()
        if base_class(module).__name__ in names and module is not model
    ]
    holders = defaultdict[int, set[nn.Module]](set)
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)].add(module)
    own = [
        block
        for block in found
        if all(holders[id(one)] <= {*block.modules()} for one in block.parameters())
    ]
    return own[::-1]


def load(task: Task, device: torch.device, console: Console) -> Base:
    """The base of a task, frozen and spread over all processes: each reads its share of the files.
    Where that cannot be, each reads all of it, and `shard` spreads it once an adapter is attached
    and checked."""
    config, reason = task.config, None
    if config.add_tokens or config.trainable_tokens:
        reason = "trained tokens, whose rows may be new, need the whole embedding"
    elif "gradient" in VARIANTS[config.variant].needs:
        reason = f"variant {config.variant!r} starts from gradients of whole weights"
    if reason is None:
        whole = task.loading
        task.loading = {
            **whole,
            "device": str(device),
            "spread": partial(shard, device=device, size=config.shard_size),
        }
        try:
            base = task.load()
            reshard(base.model)  # a task may have called it
            return base
        except WholeOnlyError as error:
            task.loading, reason = whole, str(error)
    say(console, f"Loading  each process reads the whole base first: {reason}")
    return task.load()


def shard(model: Any, device: torch.device, size: int | None = None) -> None:
    """Spread the frozen weights over all processes (over each `size` of them, neighbours by rank),
    and put all else on `device`, where they meet."""
    if is_spread(model.modules()):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    count = torch.distributed.get_world_size()
    copies = {} if size in (None, count) else {"copies": count // size}
    sizes = {**copies, "shares": size or count}
    mesh = init_device_mesh(device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    # nothing overlaps there: what is gathered ahead, or let go of later, is memory alone
    if device.type == "cpu":
        model._set_unshard_async_op(True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_backward_prefetch([module])
