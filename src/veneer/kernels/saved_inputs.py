"""Save the input x of a layer for backward: x itself, or factors from which x can be recomputed, if
autograd saves these factors anyway.

    x = a · b          the input of a gated MLP's last layer: the node of the product saves a and b
                       saved here: a, b
    x = act(g) · b     the node of the product would save act(g) too; the activation's node saves g
                       saved here: g, b
    x = (h · r) · w    the output of a norm: the node of h · r saves h and r, and w is frozen
                       saved here: h, r, w

Backward recomputes x, bitwise equal, in one or two passes over memory. In the second case, act(g)
is also removed from the product's node, and recomputed when that node needs it. The cases are
recognised by the nodes of the autograd graph, not by the names of the model's modules. A small x is
saved itself. So is an x that was modified in place after its product, because the product of its
factors no longer equals it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.switch import is_on

_C: Any = torch._C

#: the largest number of elements of x for which x itself is saved
SMALL_INPUT_SIZE = 1 << 16
#: activations whose autograd node saves their input, by the name of that node
ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "GeluBackward0": lambda node: lambda g: F.gelu(g, approximate=node._saved_approximate),
}


class Gate:
    """An activation act whose output act(g) is recomputed in backward instead of saved, in a
    product x = act(g) · b. ``output`` keeps the recomputed act(g) until the autograd node of the
    product needs it. If a backward does not reach that node, ``output`` is kept until the next
    backward, or until the graph is freed."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation
        self.output: Tensor | None = None

    def hide(self, saved_factor: Any, activation_node: Any) -> None:
        """Free the act(g) that the autograd node of the product act(g) · b has saved, and recompute
        it when that node needs it. ``saved_factor`` is the node's ``SavedTensor`` of act(g);
        ``activation_node`` is the autograd node of act, which has saved g."""

        def recompute(_: None) -> Tensor:
            output, self.output = self.output, None
            return (
                self.activation(activation_node._saved_self.detach()) if output is None else output
            )

        saved_factor.register_hooks(lambda _: None, recompute)


class SavedInput(NamedTuple):
    """What is saved of a layer's input x: x itself in ``first``, or the two or three factors whose
    product is x. If ``gate`` is set, the first factor of x is not ``first`` but its activation,
    ``gate.activation(first)``."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None
    gate: Gate | None = None


def has_saved_tensor_hooks() -> bool:
    """Whether hooks replace the tensors that autograd saves. Under activation checkpointing they
    do: to read the saved tensors of a node would then recompute the block."""
    return _C._autograd._top_saved_tensors_default_hooks(True) is not None


def input_to_save(x: Tensor, is_one_of_many: bool = False) -> SavedInput:
    """The tensors to save for backward in place of a layer's input x: factors of x that autograd
    has saved anyway, if x is a large product that the autograd graph shows, else x itself.

    ``is_one_of_many``: x is one of many inputs, such as the rows of one expert. Then two factors
    are saved in place of a small x too, because the many small tensors would take much memory
    together. But a small x gets no ``Gate`` (which recomputes an activation), because making it
    would take longer than the layer's products."""
    product_node: Any = x.grad_fn
    if (
        product_node is None
        or x._version  # modified in place; under no_grad, grad_fn is still the product's node
        or not (is_one_of_many or x.numel() > SMALL_INPUT_SIZE)
        or not is_on("saved_inputs")
        or product_node.name() != "MulBackward0"
    ):
        return SavedInput(x)
    if has_saved_tensor_hooks():
        return SavedInput(x)
    try:
        is_small = x.numel() <= SMALL_INPUT_SIZE
        factors = (
            _two_factors(product_node, x)
            if is_one_of_many and is_small
            else _factors(product_node, x)
        )
    except RuntimeError:  # a backward has freed the node's tensors, or they were modified in place
        return SavedInput(x)
    return SavedInput(x) if factors is None else factors


def restore_input(saved: SavedInput, continues_to_product: bool) -> Tensor:
    """The layer's input x, recomputed if only its factors were saved. ``continues_to_product``:
    whether backward goes on to the product that computed x. Then the recomputed activation is kept
    in ``saved.gate.output``, from which the node of that product takes it."""
    first, second, third, gate = saved
    if second is None:
        return first
    if gate is not None:
        first = gate.activation(first)
        if continues_to_product and not torch.is_grad_enabled():
            gate.output = first
    product = first * second
    if third is not None:
        product = product * third if torch.is_grad_enabled() else product.mul_(third)
    return product


def _two_factors(product_node: Any, x: Tensor) -> SavedInput | None:
    """The two factors of the product x, if ``product_node``, its autograd node, has saved both and
    each has the shape and dtype of x. Else None."""
    first_factor, second_factor = _saved_factor(product_node, 0), _saved_factor(product_node, 1)
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


def _factors(product_node: Any, x: Tensor) -> SavedInput | None:
    """The factors to save in place of the product x, whose autograd node is ``product_node``: a and
    b of x = a · b; g and b of x = act(g) · b, with a ``Gate``; or h, r and w of x = (h · r) · w,
    with a frozen w. None if autograd has not saved them, or if their product has another shape or
    dtype than x."""
    if Gate in product_node.metadata:  # made by a layer that read the same x before
        gated_factor_index, gate = product_node.metadata[Gate]
        return SavedInput(
            product_node.next_functions[gated_factor_index][0]._saved_self,
            _saved_factor(product_node, 1 - gated_factor_index),
            None,
            gate,
        )
    first_factor, second_factor = _saved_factor(product_node, 0), _saved_factor(product_node, 1)
    if first_factor is not None and second_factor is not None:
        return (
            _gate_factors(product_node, first_factor, second_factor)
            if _is_product(x, first_factor, second_factor)
            else None
        )
    # w needs no gradient, so the node has saved only w, not the other factor
    weight = second_factor if first_factor is None else first_factor
    inner_node: Any = product_node.next_functions[0 if first_factor is None else 1][0]
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


def _saved_factor(product_node: Any, factor_index: int) -> Tensor | None:
    """The first (``factor_index`` 0) or second (1) factor that the autograd node of a product has
    saved; None if it has not saved this factor."""
    return product_node._saved_other if factor_index else product_node._saved_self


def _is_product(x: Tensor, first_factor: Tensor, second_factor: Tensor) -> bool:
    """Whether the two factors have the dtype of x, and their product has the shape of x."""
    try:
        shape = torch.broadcast_shapes(first_factor.shape, second_factor.shape)
    except RuntimeError:
        return False
    return shape == x.shape and first_factor.dtype == second_factor.dtype == x.dtype


def _gate_factors(product_node: Any, first_factor: Tensor, second_factor: Tensor) -> SavedInput:
    """The tensors to save for a product of two factors, whose autograd node is ``product_node``. If
    one factor is the output act(g) of an activation, they are g, the other factor, and a ``Gate``
    that recomputes act(g); the gate removes act(g) from the node. Else they are the two factors."""
    for factor_index, other_factor in enumerate((second_factor, first_factor)):
        activation_node: Any = product_node.next_functions[factor_index][0]
        if (
            activation_node is not None
            and activation_node.name() in ACTIVATIONS
            and first_factor.shape == second_factor.shape
        ):
            gate = Gate(ACTIVATIONS[activation_node.name()](activation_node))
            gate.hide(
                product_node._raw_saved_other if factor_index else product_node._raw_saved_self,
                activation_node,
            )
            product_node.metadata[Gate] = factor_index, gate
            return SavedInput(activation_node._saved_self, other_factor, None, gate)
    return SavedInput(first_factor, second_factor)
