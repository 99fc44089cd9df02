"""Find the zero weights that block the gradient between an adapter and the output.

A gate that starts at zero (LayerScale, ReZero, zero convolutions, adaLN-Zero) multiplies the
gradient of every layer before it by zero. So the output seems not to depend on the adapter,
although it will once the gate has trained. Source analysis cannot show this. So the zeros are
replaced by random numbers: if the gradient appears, they blocked it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: the largest number of zero weights to test one by one; if there are more, all are reported
MAX_TESTED = 64
#: standard deviation of the random numbers that replace zeros
FILL_STD = 0.02

#: computes, for each checked change, whether its gradient is nonzero
HaveGradients = Callable[[], Sequence[bool]]


def zero_parameters(model: nn.Module, exclude: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters whose elements are all zero, by path, each once."""
    skipped = set(map(id, exclude))
    plain = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in skipped
        and type(parameter) is nn.Parameter
        and parameter.is_floating_point()
    }
    return {
        name: parameter
        for name, parameter in plain.items()
        if parameter.numel() and not parameter.is_meta and not bool(parameter.any())
    }


def blocking_weights(
    zeros: dict[str, nn.Parameter], have_gradients: HaveGradients
) -> list[tuple[str, ...]]:
    """For each checked change, the names of the zero weights that block its gradient; empty if
    zeros are not the reason."""
    with _fill_zeros(zeros.values()):
        without_zeros = list(have_gradients())
    if not any(without_zeros):
        return [() for _ in without_zeros]
    # A parameter that is only added, such as a bias that starts at zero, blocks nothing: the
    # gradient appears whether it is zero or not.
    blocking: list[list[str]] = [[] for _ in without_zeros]
    for name in zeros if len(zeros) <= MAX_TESTED else ():
        with _fill_zeros(parameter for key, parameter in zeros.items() if key != name):
            for names, with_this_zero, without in zip(
                blocking, have_gradients(), without_zeros, strict=True
            ):
                if without and not with_this_zero:
                    names.append(name)
    # If two parallel paths to the output each have a zero, no single one blocks the gradient. Then
    # all are reported.
    all_names = tuple(
        name for name, parameter in zeros.items() if parameter.ndim > 1 or not name.endswith("bias")
    ) or tuple(zeros)
    return [
        (tuple(names) or all_names) if without else ()
        for names, without in zip(blocking, without_zeros, strict=True)
    ]


def _fill_zeros(parameters: Iterable[nn.Parameter]) -> Any:
    """A block in which small random numbers replace the zeros."""
    generator = torch.Generator().manual_seed(0)
    return replace_data(
        parameters,
        lambda data: (torch.randn(data.shape, generator=generator) * FILL_STD).to(
            data.device, data.dtype
        ),
    )


@contextmanager
def replace_data(tensors: Iterable[Tensor], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A block in which each tensor's ``data`` is ``make(data)``. Afterwards each tensor has its
    former memory."""
    originals = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in originals:
            tensor.data = make(data)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
