"""Save the input x of a layer for backward: x itself, or tensors from which it can be recomputed,
if autograd saves these anyway.

    x = a · b          the input of a gated MLP's last layer: the node of the product saves a and b
                       saved here: a, b
    x = act(g) · b     the node of the product would save act(g) too; the activation's node saves g
                       saved here: g, b
    x = (h · r) · w    the output of a norm: the node of h · r saves h and r, and w is frozen
                       saved here: h, r, w

Backward recomputes x bit by bit, in one or two passes over memory. In the second case, act(g) is
also removed from the product's node, which later gets the recomputed act(g). The cases are
recognised by the nodes of the autograd graph, not by the names of the model's modules. A small x is
saved itself, and so is an x that was written to after its product: the factors no longer give it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.switch import is_on

_C: Any = torch._C

#: the most numbers in x for which x itself is saved
SMALL_INPUT_SIZE = 1 << 16
#: activations whose autograd node saves their input, by the name of that node
ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "GeluBackward0": lambda node: lambda g: F.gelu(g, approximate=node._saved_approximate),
}


class Gate:
    """An activation that backward recomputes. ``output`` keeps its result until the product's node
    needs it. If a backward does not reach that node, it is kept until the next backward, or until
    the graph is freed."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation
        self.output: Tensor | None = None

    def hide(self, saved: Any, node: Any) -> None:
        """Remove act(g) from the saved tensors of the product's node, and recompute it when that
        node needs it. ``node`` is the node of the activation."""

        def recompute(_: None) -> Tensor:
            output, self.output = self.output, None
            return self.activation(node._saved_self.detach()) if output is None else output

        saved.register_hooks(lambda _: None, recompute)


class SavedInput(NamedTuple):
    """x, or the factors of x in order. If ``gate`` is set, the first factor is the output of the
    activation ``gate`` for the input ``first``."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None
    gate: Gate | None = None


def input_to_save(x: Tensor, is_slice: bool = False) -> SavedInput:
    """The tensors to save for an input x, which may have an autograd graph. ``is_slice``: x is one
    of many inputs (the rows of one expert, say). Then two factors are saved in place of a small x,
    too, because together they save memory; but no gate is made for a small x, because that would
    take longer than the layer's products."""
    node: Any = x.grad_fn
    if (
        node is None
        or x._version  # written to since; under no_grad its node stays that of the product
        or not (is_slice or x.numel() > SMALL_INPUT_SIZE)
        or not is_on("saved_inputs")
        or node.name() != "MulBackward0"
    ):
        return SavedInput(x)
    if _C._autograd._top_saved_tensors_default_hooks(True) is not None:
        # under checkpointing, reading the saved tensors of a node would recompute them
        return SavedInput(x)
    try:
        is_small = x.numel() <= SMALL_INPUT_SIZE
        factors = _two_factors(node, x) if is_slice and is_small else _factors(node, x)
    except RuntimeError:  # a backward has freed the tensors, or they were modified in place
        return SavedInput(x)
    return SavedInput(x) if factors is None else factors


def restore_input(saved: SavedInput, needs_gradient: bool) -> Tensor:
    """x, recomputed if necessary. ``needs_gradient``: whether backward continues to the product
    that computed x; the node of that product then gets act(g) from the gate."""
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


def _two_factors(node: Any, x: Tensor) -> SavedInput | None:
    """The two factors of the product x, if its node has saved them and none is broadcast."""
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
    """The saved factors of the product x, in one of the three cases; else None."""
    if Gate in node.metadata:  # another function, which read the same x before, made a gate
        gate_side, gate = node.metadata[Gate]
        return SavedInput(
            node.next_functions[gate_side][0]._saved_self,
            _saved_factor(node, 1 - gate_side),
            None,
            gate,
        )
    first_factor, second_factor = _saved_factor(node, 0), _saved_factor(node, 1)
    if first_factor is not None and second_factor is not None:
        return (
            _gate_factors(node, first_factor, second_factor)
            if _is_product(x, first_factor, second_factor)
            else None
        )
    # w needs no gradient, so the node has saved only w, not the other factor
    weight = second_factor if first_factor is None else first_factor
    inner_node: Any = node.next_functions[0 if first_factor is None else 1][0]
    if weight is None or inner_node is None or inner_node.name() != "MulBackward0":
        return None
    first_factor, second_factor = _saved_factor(inner_node, 0), _saved_factor(inner_node, 1)
    if (
        first_factor is None
        or second_factor is None
        or not _is_product(x, first_factor, second_factor)
        or not _is_product(x, x, weight)
    ):
        return None
    return SavedInput(first_factor, second_factor, weight)


def _saved_factor(node: Any, side: int) -> Tensor | None:
    """The first (``side`` 0) or second (1) factor that the node of a product has saved, or None."""
    return node._saved_other if side else node._saved_self


def _is_product(x: Tensor, first_factor: Tensor, second_factor: Tensor) -> bool:
    """Whether the product of these factors has the shape and dtype of x."""
    try:
        shape = torch.broadcast_shapes(first_factor.shape, second_factor.shape)
    except RuntimeError:
        return False
    return shape == x.shape and first_factor.dtype == second_factor.dtype == x.dtype


def _gate_factors(node: Any, first_factor: Tensor, second_factor: Tensor) -> SavedInput:
    """The factors of a product to save. If one factor is the output of an activation, this is the
    input of the activation instead, and a gate."""
    for side, other_factor in enumerate((second_factor, first_factor)):
        activation_node: Any = node.next_functions[side][0]
        if (
            activation_node is not None
            and activation_node.name() in ACTIVATIONS
            and first_factor.shape == second_factor.shape
        ):
            gate = Gate(ACTIVATIONS[activation_node.name()](activation_node))
            gate.hide(node._raw_saved_other if side else node._raw_saved_self, activation_node)
            node.metadata[Gate] = side, gate
            return SavedInput(activation_node._saved_self, other_factor, None, gate)
    return SavedInput(first_factor, second_factor)
