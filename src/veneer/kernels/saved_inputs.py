"""Save an input for backward: as it is, or as the tensors from which it can be recomputed, if
autograd saves these anyway.

    x = a · b          the input of a gated MLP's last layer; the product's node saves a and b
                       saved: a, b
    x = act(g) · b     the product's node would save act(g) too, and the activation's node saves g
                       saved: g, b
    x = (h · r) · w    the output of a norm; the node of h · r saves h and r, and w is frozen
                       saved: h, r, w

In each case, backward recomputes x with the same bits, by one or two passes over memory. In the
second case, act(g) is also removed from the product's node, which gets the recomputed one. The
cases are recognised in the autograd graph, independently of the model's module names. Small inputs
are saved as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.switch import on

_C: Any = torch._C

#: the fewest numbers in x for which the graph is examined
MANY = 1 << 16
#: activations by the names of autograd nodes that save their input
ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "GeluBackward0": lambda node: lambda g: F.gelu(g, approximate=node._saved_approximate),
}


class Gate:
    """An activation that is recomputed in backward. ``output`` is kept for the node that needs it
    next; if a backward ends before that, until the next backward or the end of the graph."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation
        self.output: Tensor | None = None

    def hide(self, saved: Any, node: Any) -> None:
        """Remove act(g) from the saved tensors of the product's node; ``node`` is the
        activation's."""

        def recompute(_: None) -> Tensor:
            output, self.output = self.output, None
            return self.activation(node._saved_self.detach()) if output is None else output

        saved.register_hooks(lambda _: None, recompute)


class SavedInput(NamedTuple):
    """x, or its factors in order. If ``gate`` is set, it computes the first factor from
    ``first``."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None
    gate: Gate | None = None


def input_to_save(x: Tensor, piece: bool = False) -> SavedInput:
    """What to save for an input of a function with a graph. ``piece``: x is one of many small
    inputs, which together are worth saving as factors; a gate is not used for them, because it
    takes longer than the product."""
    node: Any = x.grad_fn
    if (
        node is None
        or not (piece or x.numel() > MANY)
        or not on("saved_inputs")
        or node.name() != "MulBackward0"
    ):
        return SavedInput(x)
    if _C._autograd._top_saved_tensors_default_hooks(True) is not None:
        # checkpointing would recompute the tensors that autograd saved in order to read them
        return SavedInput(x)
    try:
        factors = _plain_factors(node, x) if piece and x.numel() <= MANY else _factors(node, x)
    except RuntimeError:  # a backward has freed the tensors, or they were modified in place
        return SavedInput(x)
    return SavedInput(x) if factors is None else factors


def restore_input(saved: SavedInput, needs_gradient: bool) -> Tensor:
    """x from what was saved. ``needs_gradient``: whether backward goes on to the product that made
    x; its node then reuses act(g) from the gate."""
    first, second, third, gate = saved
    if second is None:
        return first
    if gate is not None:
        first = gate.activation(first)
        if needs_gradient and not torch.is_grad_enabled():
            gate.output = first
    product = first * second
    if third is not None:
        product = product * third if torch.is_grad_enabled() else product.mul_(third)
    return product


def _plain_factors(node: Any, x: Tensor) -> SavedInput | None:
    first_factor, second_factor = _saved_factor(node, 0), _saved_factor(node, 1)
    if (
        first_factor is None
        or second_factor is None
        or not first_factor.shape == second_factor.shape == x.shape
    ):
        return None
    return (
        SavedInput(first_factor, second_factor)
        if first_factor.dtype == second_factor.dtype == x.dtype
        else None
    )


def _factors(node: Any, x: Tensor) -> SavedInput | None:
    if Gate in node.metadata:  # another function reads the same x
        side, gate = node.metadata[Gate]
        return SavedInput(
            node.next_functions[side][0]._saved_self, _saved_factor(node, 1 - side), None, gate
        )
    first_factor, second_factor = _saved_factor(node, 0), _saved_factor(node, 1)
    if first_factor is not None and second_factor is not None:
        return (
            _gate_factors(node, first_factor, second_factor)
            if _makes(x, first_factor, second_factor)
            else None
        )
    # the node's input needs no gradient, so the node saved no other factor
    weight = second_factor if first_factor is None else first_factor
    inner: Any = node.next_functions[0 if first_factor is None else 1][0]
    if weight is None or inner is None or inner.name() != "MulBackward0":
        return None
    first_factor, second_factor = _saved_factor(inner, 0), _saved_factor(inner, 1)
    if (
        first_factor is None
        or second_factor is None
        or not _makes(x, first_factor, second_factor)
        or not _makes(x, x, weight)
    ):
        return None
    return SavedInput(first_factor, second_factor, weight)


def _saved_factor(node: Any, side: int) -> Tensor | None:
    """The factor that the node of a product has saved."""
    return node._saved_other if side else node._saved_self


def _makes(x: Tensor, first_factor: Tensor, second_factor: Tensor) -> bool:
    """Whether the product of these factors has the shape and dtype of x."""
    try:
        shape = torch.broadcast_shapes(first_factor.shape, second_factor.shape)
    except RuntimeError:
        return False
    return shape == x.shape and first_factor.dtype == second_factor.dtype == x.dtype


def _gate_factors(node: Any, first_factor: Tensor, second_factor: Tensor) -> SavedInput:
    """The factors of a product, in which the output of an activation is replaced by the
    activation's input."""
    for side, value in enumerate((second_factor, first_factor)):
        above: Any = node.next_functions[side][0]
        if (
            above is not None
            and above.name() in ACTIVATIONS
            and first_factor.shape == second_factor.shape
        ):
            first, gate = above._saved_self, Gate(ACTIVATIONS[above.name()](above))
            gate.hide(node._raw_saved_other if side else node._raw_saved_self, above)
            node.metadata[Gate] = side, gate
            return SavedInput(first, value, None, gate)
    return SavedInput(first_factor, second_factor)
