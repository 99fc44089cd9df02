"""The state of an adapter's optimiser as named tensors, for a safetensors file.

    "exp_avg:model.layers.0.q_proj.A"      key of the optimiser's state, name of the parameter

States are matched by name, so another version of Veneer may list the parameters in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameter_names: Sequence[str]
) -> dict[str, Tensor]:
    """The optimiser's state as {"key:parameter name": tensor}. ``parameter_names``: the names of
    the parameters, in the optimiser's order."""
    return {
        f"{state_key}:{parameter_names[index]}": value.detach().cpu().contiguous()
        for index, parameter_state in optimizer.state_dict()["state"].items()
        for state_key, value in parameter_state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameter_names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Load into the optimiser a state that ``optimizer_tensors`` returned. The settings in its
    ``param_groups``, such as the learning rate, stay as they are.

    Args:
        parameter_names: the names of the parameters, in the optimiser's order.

    Raises:
        KeyError: ``tensors`` has a parameter that is not in ``parameter_names``.
    """
    index_by_name = {name: index for index, name in enumerate(parameter_names)}
    state_by_index: dict[int, dict[str, Tensor]] = {}
    for tensor_name, tensor in tensors.items():
        state_key, _, parameter_name = tensor_name.partition(":")
        state_by_index.setdefault(index_by_name[parameter_name], {})[state_key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state_by_index})
