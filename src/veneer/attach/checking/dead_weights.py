"""Find the zero weights that block the gradient between an adapter and the output.

Some models multiply a branch by a trained factor that starts at zero (LayerScale, ReZero, zero
convolutions, adaLN-Zero). The gradient of every layer in that branch is zero until the factor has
trained, so the output seems not to depend on an adapter there. To find such factors, weights that
are all zero are replaced by random numbers: if the gradient appears, the zeros blocked it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: the largest number of all-zero parameters that are tested one by one; if there are more, the
#: error names all of them
MAX_TESTED_WEIGHTS = 64
#: the standard deviation of the normally distributed numbers that replace zeros
FILL_STD = 0.02

#: a function that runs the model and returns, for each checked change, whether its gradient is
#: nonzero
HaveGradients = Callable[[], Sequence[bool]]


def zero_parameters(model: nn.Module, exclude: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters whose elements are all zero, by path, without those in ``exclude``. A tied
    parameter is listed once."""
    excluded_ids = set(map(id, exclude))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in excluded_ids
        and type(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and parameter.numel()
        and not parameter.is_meta
        and not bool(parameter.any())
    }


def blocking_weights(
    zeros: dict[str, nn.Parameter], have_gradients: HaveGradients
) -> list[tuple[str, ...]]:
    """For each checked change, the names of the all-zero parameters that block its gradient; none
    if zeros do not block it. The parameters are filled with random numbers meanwhile, then
    restored.

    Args:
        zeros: all parameters whose elements are all zero, by name.
    """
    with _fill_zeros(zeros.values()):
        flags_when_filled = list(have_gradients())
    if not any(flags_when_filled):
        return [() for _ in flags_when_filled]
    # Test each parameter while all others are filled. One that is only added, such as a bias that
    # starts at zero, blocks nothing: the gradient appears whether it is zero or not.
    blocking_names: list[list[str]] = [[] for _ in flags_when_filled]
    for name in zeros if len(zeros) <= MAX_TESTED_WEIGHTS else ():
        with _fill_zeros(parameter for key, parameter in zeros.items() if key != name):
            for names_of_change, has_gradient, has_gradient_when_filled in zip(
                blocking_names, have_gradients(), flags_when_filled, strict=True
            ):
                if has_gradient_when_filled and not has_gradient:
                    names_of_change.append(name)
    # If each of two parallel paths to the output has an all-zero parameter, neither parameter alone
    # blocks the gradient. The result then names all of them, if possible without biases, which
    # rarely block a gradient.
    fallback_names = tuple(
        name for name, parameter in zeros.items() if parameter.ndim > 1 or not name.endswith("bias")
    ) or tuple(zeros)
    return [
        (tuple(names_of_change) or fallback_names) if has_gradient_when_filled else ()
        for names_of_change, has_gradient_when_filled in zip(
            blocking_names, flags_when_filled, strict=True
        )
    ]


def _fill_zeros(parameters: Iterable[nn.Parameter]) -> Any:
    """A context manager in which small random numbers from a fixed seed replace the values of
    ``parameters``, which are all zero."""
    generator = torch.Generator().manual_seed(0)
    return replace_data(
        parameters,
        lambda data: (torch.randn(data.shape, generator=generator) * FILL_STD).to(
            data.device, data.dtype
        ),
    )


@contextmanager
def replace_data(
    tensors: Iterable[Tensor], make_data: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """A context manager in which each tensor's ``data`` is ``make_data(data)``. Afterwards each
    tensor has its original memory."""
    originals = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in originals:
            tensor.data = make_data(data)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
