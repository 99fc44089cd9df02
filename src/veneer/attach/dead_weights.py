"""Which weights that are exactly zero stand between an adapter and the output.

A gate that starts at zero (LayerScale, ReZero, zero convolutions, adaLN-Zero) multiplies every
gradient of what lies before it by zero. That looks as if the output did not depend on the adapter;
it will, once the gate moves. No code shows it, so it is tried: the gradient comes back if the zeros
are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: how many zero weights are tried one by one; of more, all are named
MOST = 64
#: the size of the numbers in place of zeros
SIZE = 0.02

#: for each of the questions, whether its gradient is there now
Ask = Callable[[], Sequence[bool]]


def zeros(model: nn.Module, but: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that are zero throughout, by path, each once."""
    skipped = set(map(id, but))
    plain = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in skipped
        and type(parameter) is nn.Parameter
        and parameter.is_floating_point()
    }
    return {
        name: one
        for name, one in plain.items()
        if one.numel() and not one.is_meta and not bool(one.any())
    }


def blocking(found: dict[str, nn.Parameter], ask: Ask) -> list[tuple[str, ...]]:
    """For each question, the zero weights without which its answer would be yes; none where they
    are not the reason."""
    with _filled(found.values()):
        there = list(ask())
    if not any(there):
        return [() for _ in there]
    # What only adds (a bias that starts at zero) blocks nothing: without it the gradient is there
    # all the same.
    needed: list[list[str]] = [[] for _ in there]
    for name in found if len(found) <= MOST else ():
        with _filled(one for other, one in found.items() if other != name):
            for names, now, before in zip(needed, ask(), there, strict=True):
                if before and not now:
                    names.append(name)
    # Two ways side by side, each with a zero of its own: neither alone is needed, so all are named.
    every = tuple(
        name for name, one in found.items() if one.ndim > 1 or not name.endswith("bias")
    ) or tuple(found)
    return [tuple(names) or every if was else () for names, was in zip(needed, there, strict=True)]


def _filled(parameters: Iterable[nn.Parameter]) -> Any:
    """A block with small random numbers in place of the zeros."""
    generator = torch.Generator().manual_seed(0)
    return replaced(
        parameters,
        lambda data: (torch.randn(data.shape, generator=generator) * SIZE).to(
            data.device, data.dtype
        ),
    )


@contextmanager
def replaced(tensors: Iterable[Tensor], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A block in which tensors have other numbers; afterwards each has the memory that it had."""
    held = [(one, one.data) for one in tensors]
    try:
        for one, data in held:
            one.data = make(data)
        yield
    finally:
        for one, data in held:
            one.data = data
