"""A base that is spread over the processes of a run, its frozen weights alone, by FSDP2's `fully_shard`.

    base       each process holds its share; a block is gathered before it computes, and let go after
    adapter    whole in each process, in float32 over a 16-bit base: its gradients travel as without FSDP

What trains is small, and would have to be gathered as well: it is not spread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.attach.adapted_module import own_class
from veneer.errors import ConfigError
from veneer.models.locate import config_of
from veneer.train.config import TrainConfig


def must_shard(config: TrainConfig) -> None:
    """Raises `ConfigError` for what does not work on a base that is spread."""
    packed = getattr(config_of(config.base), "quantization_config", None) is not None
    reasons = {
        "quantize": (config.quantize, "packed weights are not spread"),
        "a quantised base": (packed, "packed weights are not spread"),
        "cache_lower": (config.cache_lower, "its blocks run for a row at a time, in one process and not in another"),
        "task grpo": (config.task == "grpo", "answers of different lengths take different numbers of passes"),
    }
    for name, (there, why) in reasons.items():
        if there:
            found = f"parallel fsdp with {name}: {why}"
            raise ConfigError(found, "one of them", "set parallel to ddp, or leave the other out")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: those that transformers would not split over devices."""
    names = {*(getattr(model, "_no_split_modules", None) or ())}
    return [module for module in model.modules() if own_class(module).__name__ in names and module is not model]


def shard(model: Any, device: torch.device) -> None:
    """Spread the frozen weights over all processes, and put all else on `device`, where they meet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
