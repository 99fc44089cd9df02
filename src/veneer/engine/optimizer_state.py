"""The state of an adapter's optimiser as tensors with names, which a safetensors file can hold.

    "exp_avg:model.layers.0.q_proj.A"      key of the state, name of the parameter

A name finds its parameter again whatever the order in which a later version lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameter_names: Sequence[str]
) -> dict[str, Tensor]:
    """The optimiser's state by key and parameter. ``parameter_names``: in the order of the
    optimiser's parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{key}:{parameter_names[index]}": value.detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameter_names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimiser the state that ``optimizer_tensors`` returned."""
    indices = {name: index for index, name in enumerate(parameter_names)}
    state: dict[int, dict[str, Tensor]] = {}
    for label, tensor in tensors.items():
        key, _, parameter_name = label.partition(":")
        state.setdefault(indices[parameter_name], {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
