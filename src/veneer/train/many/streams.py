"""Random numbers of each run: torch's default generators stand where the run's own have come to,
for a block.

Stream          of one run: begins as ``torch.manual_seed(seed)`` does
OwnDropout      the base's dropout on rows of several runs, each drawn from its own stream
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from veneer import context
from veneer.attach.adapted_module import walk
from veneer.attach.select_rows import Parts
from veneer.errors import SelectionError

_DROPS: Any = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
}


def generators(model: nn.Module) -> list[torch.device]:
    """The devices whose default generators a call of the model may draw from."""
    used = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return [torch.device("cpu"), *sorted(used, key=str)]


def states(devices: Iterable[torch.device]) -> list[Tensor]:
    return [
        torch.get_rng_state() if one.type == "cpu" else torch.cuda.get_rng_state(one)
        for one in devices
    ]


def set_states(devices: Iterable[torch.device], values: Iterable[Tensor]) -> None:
    for device, value in zip(devices, values, strict=True):
        if device.type == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)


def same(states_: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(states_, others, strict=True))


class Stream:
    """A block in which torch's default generators are one run's. Blocks of one stream may be within
    each other."""

    def __init__(self, seed: int, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.own = [torch.Generator(device).manual_seed(seed).get_state() for device in devices]
        self.outside: list[Tensor] = []
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self.outside = states(self.devices)
            set_states(self.devices, self.own)

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        before, self.own = self.own, states(self.devices)
        set_states(self.devices, self.outside)
        if torch._C._current_graph_task_id() != -1 and not same(before, self.own):
            found = "random numbers in a layer that activation checkpointing computes again, on rows of several runs"
            do = "set dropout to 0 or turn checkpointing off, or let batches of other shapes keep the runs apart"
            raise SelectionError(found, "the numbers of the first time", do)


def dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The settings of modules that may be dropout, by their names."""
    return [
        (module, key)
        for _, module in walk(model)
        for key, value in vars(module).items()
        if isinstance(value, float)
        and ("drop" in key or (key == "p" and isinstance(module, _DropoutNd)))
    ]


class OwnDropout(TorchFunctionMode):
    """A block in which functions of torch that drop entries of a whole batch do so span by span."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.sizes = parts, [after - first for first, after in parts.spans or ()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _drops(func, args, kwargs):
            return func(*args, **kwargs)
        chosen = context.current.selection.get(self.parts.uid)
        if (
            chosen is None or chosen.parts is not self.parts
        ):  # one run's rows alone, in a layer of its own
            return func(*args, **kwargs)
        if func in _DROPS:
            kwargs = {**kwargs, "inplace": False}
        values = [*args, *kwargs.values()]
        held = [
            isinstance(one, Tensor) and one.dim() > 1 and len(one) == self.parts.count
            for one in values
        ]
        if not held[0]:
            found = f"dropout of a tensor {list(values[0].shape)} of the base"
            do = "set the base's own dropout to 0, or its modules to eval()"
            raise SelectionError(
                found, f"the {self.parts.count} rows of the batch along its first axis", do
            )
        pieces = [
            one.split(self.sizes) if own else one for one, own in zip(values, held, strict=True)
        ]
        outputs = []
        for place, selected in enumerate(self.parts.selections):
            own = [one[place] if isin else one for one, isin in zip(pieces, held, strict=True)]
            named = dict(zip(kwargs, own[len(args) :], strict=True))
            with selected.stream:  # pyright: ignore[reportOptionalContextManager]
                outputs.append(func(*own[: len(args)], **named))
        return torch.cat(outputs)


def _drops(func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    if func is F.scaled_dot_product_attention:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
    return func in _DROPS and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0
