"""Random numbers of each adapter: within a ``RandomStream``, torch's default generators continue
the sequence of one adapter.

    RandomStream       the sequence of one adapter; it starts as after ``torch.manual_seed(seed)``
    DropoutByAdapter   dropout of the base draws for each adapter's rows from the adapter's sequence
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from veneer import context
from veneer.attach import RowAdapters, walk
from veneer.errors import SelectionError

#: torch's functions that drop entries of their first argument at random
_DROPOUT_FUNCTIONS: Any = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
}


def random_devices(model: nn.Module) -> list[torch.device]:
    """The devices whose default generators a call of the model may use: the CPU, then the CUDA
    devices that hold parameters."""
    cuda_devices = {
        parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"
    }
    return [torch.device("cpu"), *sorted(cuda_devices, key=str)]


def generator_states(devices: Iterable[torch.device]) -> list[Tensor]:
    return [
        torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
        for device in devices
    ]


def set_generator_states(devices: Iterable[torch.device], states: Iterable[Tensor]) -> None:
    for device, state in zip(devices, states, strict=True):
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def equal_states(states: Sequence[Tensor], other_states: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(state, other_state)
        for state, other_state in zip(states, other_states, strict=True)
    )


def _warn_of_deprecated_own() -> None:
    message = (
        "Runs.stream(name).own is now Runs.stream(name).states. Do: use states; own is removed in"
        " 0.3."
    )
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class RandomStream:
    """Context manager in which torch's default generators continue one adapter's sequence of random
    numbers. After the block, the generators have the states that they had before it. It is
    reentrant.

    Attributes:
        states: the state of each device's generator, in the order of ``devices``. It is updated
            when the outermost block ends.

    Raises:
        SelectionError: at the end of the outermost block, if activation checkpointing has drawn
            numbers in it, which differ from those of the first forward.
    """

    def __init__(self, seed: int, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self.states: list[Tensor] = []
        self.restart(seed)
        self._outer_states: list[Tensor] = []
        self._depth = 0

    @property
    def own(self) -> list[Tensor]:
        """Deprecated name of ``states``."""
        _warn_of_deprecated_own()
        return self.states

    @own.setter
    def own(self, states: list[Tensor]) -> None:
        _warn_of_deprecated_own()
        self.states = states

    def restart(self, seed: int) -> None:
        """Restart the sequence, as after ``torch.manual_seed(seed)``."""
        self.states = [
            torch.Generator(device).manual_seed(seed).get_state() for device in self.devices
        ]

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._outer_states = generator_states(self.devices)
            set_generator_states(self.devices, self.states)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        states_before, self.states = self.states, generator_states(self.devices)
        set_generator_states(self.devices, self._outer_states)
        # A layer runs during a backward only if activation checkpointing computes it a second time.
        # The sequence has advanced since the first time, so numbers drawn now differ from those of
        # the first time, and gradients would be wrong.
        if torch._C._current_graph_task_id() != -1 and not equal_states(states_before, self.states):
            raise SelectionError(
                "random numbers in a layer that activation checkpointing computes again, on rows "
                "of several runs",
                "the numbers of the first time",
                "set dropout to 0 or turn checkpointing off, or let batches of other shapes keep "
                "the runs apart",
            )


def dropout_settings(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute name) of each float attribute of a module of the model whose name is that
    of a dropout probability: one that contains "drop", or the ``p`` of a dropout module."""
    return [
        (module, attribute)
        for _, module in walk(model)
        for attribute, value in vars(module).items()
        if isinstance(value, float)
        and ("drop" in attribute or (attribute == "p" and isinstance(module, _DropoutNd)))
    ]


class DropoutByAdapter(TorchFunctionMode):
    """A torch function mode for a batch that joins the rows of several adapters. While it is
    active, dropout draws for the rows of each adapter from the adapter's ``RandomStream``.
    ``assignment``: which rows of the batch each adapter has. A call of dropout raises a
    ``SelectionError`` if its tensor does not hold the batch's rows along its first axis."""

    def __init__(self, assignment: RowAdapters) -> None:
        super().__init__()
        self.assignment = assignment
        self.row_counts = [stop - start for start, stop in assignment.row_ranges or ()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_active_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        current_selection = context.current.selection.get(self.assignment.uid)
        if current_selection is None or current_selection.layer_adapters is not self.assignment:
            # the call comes from a layer that runs on the rows of a single adapter, so there are no
            # rows to split
            return func(*args, **kwargs)
        if func in _DROPOUT_FUNCTIONS:
            kwargs = {**kwargs, "inplace": False}
        argument_values = [*args, *kwargs.values()]
        has_all_rows = [
            isinstance(value, Tensor)
            and value.dim() > 1
            and len(value) == self.assignment.row_count
            for value in argument_values
        ]
        if not has_all_rows[0]:
            raise SelectionError(
                f"dropout of a tensor {list(argument_values[0].shape)} of the base",
                f"the {self.assignment.row_count} rows of the batch along its first axis",
                "set the base's own dropout to 0, or its modules to eval()",
            )
        split_values = [
            value.split(self.row_counts) if has_rows else value
            for value, has_rows in zip(argument_values, has_all_rows, strict=True)
        ]
        outputs = []
        for index, selection in enumerate(self.assignment.selections):
            adapter_arguments = [
                value[index] if has_rows else value
                for value, has_rows in zip(split_values, has_all_rows, strict=True)
            ]
            keyword_arguments = dict(zip(kwargs, adapter_arguments[len(args) :], strict=True))
            with selection.random_stream:  # pyright: ignore[reportOptionalContextManager]
                outputs.append(func(*adapter_arguments[: len(args)], **keyword_arguments))
        return torch.cat(outputs)


def _is_active_dropout(func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a call of a torch function drops entries at random."""
    if func is F.scaled_dot_product_attention:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
    return func in _DROPOUT_FUNCTIONS and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0
