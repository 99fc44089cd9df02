"""Sharding of the frozen base weights over the processes of a run, by FSDP2's `fully_shard`.

    base       each process holds a shard; the weights of a block are gathered before it computes,
               and freed afterwards
    adapter    each process holds all of it, in float32 if the base has 16 bits; its gradients are
               averaged as without FSDP

Trained parameters are not sharded: they are small, and shards of them would have to be gathered
too. With `shard_size` there are several copies of the base, each sharded over `shard_size`
processes (hybrid sharding, HSDP). Blocks are then gathered only among the processes of one copy.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from veneer.distributed import base_class, is_spread, reshard
from veneer.models.load import Base
from veneer.models.shares import WholeOnlyError
from veneer.train.callbacks import say
from veneer.train.tasks import Task
from veneer.variants import VARIANTS


def gathered_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights FSDP gathers together, one module at a time; inner modules come
    first. They are the modules of the classes in the model's `_no_split_modules`, usually its
    transformer blocks. A module that shares a parameter with a module outside of it is left out;
    its weights are gathered with those of the remaining model."""
    block_classes = {*(getattr(model, "_no_split_modules", None) or ())}
    candidate_blocks = [
        module
        for module in model.modules()
        if base_class(module).__name__ in block_classes and module is not model
    ]
    modules_by_parameter_id = defaultdict[int, set[nn.Module]](set)
    for module in model.modules():
        for parameter in module._parameters.values():
            modules_by_parameter_id[id(parameter)].add(module)
    return [
        block
        for block in reversed(candidate_blocks)
        if all(
            modules_by_parameter_id[id(parameter)] <= {*block.modules()}
            for parameter in block.parameters()
        )
    ]


def load(task: Task, device: torch.device, console: Console) -> Base:
    """Load the base of a task, frozen and sharded over all processes, each of which reads only its
    shard from the files. If that is impossible, print the reason and load the full base in each
    process; the caller must then call `shard` after it has attached and checked an adapter.
    ``device``: where the shards are."""
    config, full_load_reason = task.config, None
    if config.add_tokens or config.trainable_tokens:
        full_load_reason = "trained tokens, whose rows may be new, need the whole embedding"
    elif "gradient" in VARIANTS[config.variant].needs:
        full_load_reason = f"variant {config.variant!r} starts from gradients of whole weights"
    if full_load_reason is None:
        load_options = task.load_options
        task.load_options = {
            **load_options,
            "device": str(device),
            "spread": partial(shard, device=device, shard_size=config.shard_size),
        }
        try:
            base = task.load()
            reshard(base.model)  # frees weights that a forward in `task.load` has gathered
            return base
        except WholeOnlyError as error:
            task.load_options, full_load_reason = load_options, str(error)
    say(console, f"Loading  each process reads the whole base first: {full_load_reason}")
    return task.load()


def shard(model: Any, device: torch.device, shard_size: int | None = None) -> None:
    """Shard the frozen weights of a model in place: over all processes, or with `shard_size` over
    each group of that many consecutive ranks. Move the trained parameters to `device`, whose type
    (CPU or GPU) is that of the shards. Does nothing if the model is sharded already."""
    if is_spread(model.modules()):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    process_count = torch.distributed.get_world_size()
    copy_dimension = (
        {} if shard_size in (None, process_count) else {"copies": process_count // shard_size}
    )
    mesh_sizes = {**copy_dimension, "shares": shard_size or process_count}
    mesh = init_device_mesh(device.type, (*mesh_sizes.values(),), mesh_dim_names=(*mesh_sizes,))
    trained_parameters = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained_parameters:
        parameter.data = parameter.data.to(device)
    for block in gathered_blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=trained_parameters)
    fully_shard(model, mesh=mesh, ignored_params=trained_parameters)
    # On a CPU, communication does not overlap with computation, so prefetching the weights of the
    # next module would only take memory. A list that holds only the module itself replaces FSDP's
    # choice of the next module.
    if device.type == "cpu":
        model._set_unshard_async_op(True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_backward_prefetch([module])
