"""The interface of a layer kind, which alone knows how a class of layers uses its weights.

    y = op(x; W) + bias        update(x) = op(x; ΔW)        op: the layer's operation
    ΔW: [g, out, in], folded into the shape of the weight W; g is the number of matrices in W, such
    as groups of a convolution or experts, and 1 for a linear layer

A kind says which weights a module has (``weights``), how large a ΔW is (``dims``) and how ΔW is
arranged in the weight (``fold`` and ``unfold``). With only these methods, the module's own forward
runs on W + ΔW. A kind whose output is linear in its one weight also defines ``op`` and ``update``.
Its layers then compute op(x; W) + op(x; ΔW) without forming W + ΔW, which is called the factored
path. How to add a kind: CONTRIBUTING.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer.errors import sentence
from veneer.lowrank import LowRank
from veneer.registry import Registry


class Dims(NamedTuple):
    """The size of ΔW, the low-rank change of a weight: ``groups`` matrices [out, in], each a
    product of [out, rank] and [rank, in]."""

    groups: int
    out: int
    in_: int

    @property
    def max_rank(self) -> int:
        return min(self.out, self.in_)


class Layer(ABC):
    """One kind of layer: how modules of certain classes use their weights. It has no state.
    Subclasses are abstract or final. ``LAYERS`` holds one instance of each final subclass."""

    name: str
    #: the weight's name in a module with one weight
    weight: str = "weight"
    #: the axis of the weight that runs over outputs
    out_axis: int = 0
    #: keys of A and B in a PEFT file, after the module's path
    file_keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    #: whether dropout is applied to the inputs; False if the inputs are indices: dropout then sets
    #: the update of whole tokens to zero instead
    drops_input: bool = True
    #: whether the targets "all-linear", "attention" and "mlp" include this kind
    linear: bool = False
    #: whether forward is y = x Wᵀ + bias and nothing else (with Wᵀ stored if ``out_axis`` is 1)
    product: bool = False
    #: whether the layer has one input, and computes each of its vectors (for an embedding: each of
    #: its indices) independently of the others
    by_position: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return layer_named, (self.name,)

    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes of this kind. Modules of subclasses are of this kind too."""

    @abstractmethod
    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        """Small modules for the tests, each with an input of its forward (a tensor, or a tuple of
        arguments): one for every option of this kind that changes the arithmetic."""

    def weights(self, module: Any) -> tuple[str, ...]:
        """The names of the module's parameters that can have a low-rank change."""
        return (self.weight,)

    def vectors(self, module: Any) -> tuple[str, ...]:
        """The names of the module's parameters that are trained at their full shape if the module
        is a target, because a low-rank change of a vector would not be smaller."""
        return ()

    def below(self, module: Any) -> tuple[str, ...]:
        """The names of submodules whose weights the module's forward reads without calling them,
        such as ``out_proj`` of ``nn.MultiheadAttention``. If the module is a target, these are
        too."""
        return ()

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        """(g, out, in) of ΔW for a weight with this ``shape`` (the shape of the dense weight, in
        whatever way it is stored). By default the weight is a matrix [out, in], or [in, out] if
        ``out_axis`` is 1."""
        return Dims(1, *(shape[::-1] if self.out_axis else shape))

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        """Rearrange ``delta``, which is ΔW as [g, out, in], to the ``shape`` of the weight."""
        return delta[0].mT if self.out_axis else delta.reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        """Rearrange ``weight``, a tensor of the weight's shape, to [g, out, in]: the inverse of
        ``fold``."""
        return weight.mT[None] if self.out_axis else weight.reshape(dims)

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        """``values`` [g · out], one for each output, in a shape that broadcasts over a weight of
        ``shape``. ``dims``: (g, out, in) of ΔW, which only overriding methods need."""
        sizes = [1] * len(shape)
        sizes[self.out_axis] = -1
        return values.reshape(sizes)

    def fan_in(self, dims: Dims) -> int:
        """The fan-in for A's Kaiming initialisation: by default, the number of A's columns."""
        return dims.in_

    def frozen_input(self, module: Any) -> int | None:
        """The index of the one input, such as a padding token, whose column of ΔW stays zero; None
        if there is none."""
        return None

    def apply_forward_rewrite(self, module: Any, weight: Tensor) -> Tensor:
        """The weight after the rewrite that forward applies when it reads the weight (such as a
        weight standardisation). A merge writes the rewritten weight."""
        return weight

    def refuses(self, module: Any) -> str | None:
        """The reason why this module cannot carry an adapter; None if it can."""
        return None

    def _missing_method_error(self, method_name: str) -> NotImplementedError:
        problem = f"the layer kind {self.name!r}, whose class defines no {method_name}()"
        return NotImplementedError(
            sentence(problem, "one that its forward needs", f"define it in {type(self).__name__}")
        )

    # The factored path computes op(x; W) + op(x; ΔW) without forming W + ΔW. A kind whose output is
    # linear in its one weight overrides `op` and `update` for it.

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """op(x; ``weight``) + ``bias``: the forward of the module's class, with these tensors in
        place of the module's own."""
        raise self._missing_method_error("op")

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        """``y + op(x; ΔW)``, or ``op(x; ΔW)`` if y is None, in the dtype of x. ``low`` holds the
        factors A and B of ΔW. The result is computed from them, without forming ΔW."""
        raise self._missing_method_error("update")

    def fused(
        self,
        module: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: LowRank,
        dropout: float,
    ) -> Tensor | None:
        """The result of ``update(dropout(x), low, op(x, weight, bias))``, computed by one fused
        function of ``kernels``; None if there is no fused function for this call.

        Args:
            dropout: the probability with which each entry of x is dropped for the update.

        This method is called only if ``kernels.fused.applies(x, weight)`` or
        ``kernels.device.applies_without_cast(x, weight)`` is True.
        """
        return None

    def factors(self, module: Any) -> bool:
        """Whether ``update`` equals ``op(x; ΔW)`` with the options of this module, gradients
        included. If False, the module's own forward runs on W + ΔW instead."""
        return True

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        """``values`` [g · out], one for each output, in a shape that broadcasts over the output
        y."""
        return values

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        """The vectors that ΔW multiplies in a call of the module with the positional arguments
        ``args``, [g, tokens, in]. ``weight_name``: the name of the changed weight in the module, or
        its path if it is in a submodule ("out_proj.weight")."""
        raise self._missing_method_error("inputs")

    # If a kind has no factored path, the module's own forward runs on a view of the module: an
    # object with the same class and attributes, but with W + ΔW in place of the weight.

    def bind(self, view: Any, values: Any) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Prepare a view of a module (an object with the module's class and attributes) for its
        forward on changed weights. ``values.get(name)``: the tensor that replaces the parameter
        or buffer ``name`` of the module, or None. A kind overrides this method if other attributes
        of the view must change too, such as a list of the weights that forward reads."""

    # If the rows of a batch use different adapters, a layer may be called once for each adapter.
    # ``take`` selects the rows for one of these calls, and ``put`` joins the outputs.

    def take(
        self, module: Any, args: tuple, kwargs: dict, row_indices: Tensor, batch_size: int
    ) -> tuple[tuple, dict]:
        """The arguments (args, kwargs) of a call of the module, reduced to some rows of the batch.
        By default, a tensor whose first axis has ``batch_size`` entries holds the rows.

        Args:
            row_indices: the indices of the rows to keep, int64 [n].
            batch_size: the number of rows in ``args`` and ``kwargs``.

        Raises:
            LookupError: no argument has ``batch_size`` rows.
        """
        has_rows = False

        def select_rows(argument: Any) -> Any:
            nonlocal has_rows
            is_tensor = isinstance(argument, Tensor)
            if not is_tensor or argument.dim() == 0 or argument.shape[0] != batch_size:
                return argument
            has_rows = True
            return argument.index_select(0, row_indices.to(argument.device))

        selected = pytree.tree_map(select_rows, (args, kwargs))
        if not has_rows:
            raise LookupError
        return selected

    def put(self, module: Any, outputs: list[Any], order: Tensor) -> Any:
        """The ``outputs`` of several calls, joined to the output of the whole batch. ``order``: for
        each row of the batch, its index in the concatenated outputs."""
        return join_outputs(outputs, order, lambda _: 0)

    # The next three methods convert between Veneer's shapes and those in a PEFT file.

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """LoRA's A and B, in the shapes of a PEFT file, for a weight with this ``shape``. By
        default, the g matrices are concatenated along the first axis, because PEFT has no groups:
        A [g · r, in], B [g · out, r]."""
        return low.A.flatten(0, 1), low.B.flatten(0, 1)

    def pack_vector(self, values: Tensor, shape: torch.Size) -> Tensor:
        """``values`` [g · out], one for each output, in the shape of a PEFT file."""
        return values

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        """LoRA's A [g, r, in] and B [g, out, r], from A and B in the shapes of a PEFT file; None if
        these shapes do not fit a weight with this ``shape``. The inverse of ``pack``."""
        groups, out, in_ = self.dims(module, shape)
        rank = B.shape[1] if B.dim() == 2 else 0
        has_expected_shapes = A.shape == (groups * rank, in_) and B.shape == (groups * out, rank)
        return (
            (A.reshape(groups, rank, in_), B.reshape(groups, out, rank))
            if has_expected_shapes and rank
            else None
        )


def join_outputs(outputs: list[Any], order: Tensor, axis_of: Callable[[int], int]) -> Any:
    """Concatenate the outputs of several calls (trees of the same structure), tensor by tensor, and
    reorder the rows. Scalars, and values that are not tensors, are taken from the first output.

    Args:
        order: for each row of the result, its index in the concatenated outputs.
        axis_of: takes the index of a tensor in a tree, and returns the axis along which this tensor
            holds the rows.
    """
    structure, joined_leaves = pytree.tree_structure(outputs[0]), []
    for tensor_index, tensors in enumerate(zip(*map(pytree.tree_leaves, outputs), strict=True)):
        if not isinstance(tensors[0], Tensor) or tensors[0].dim() == 0:
            joined_leaves.append(tensors[0])
            continue
        axis = axis_of(tensor_index)
        joined_leaves.append(
            torch.cat(tensors, axis).index_select(axis, order.to(tensors[0].device))
        )
    return pytree.tree_unflatten(joined_leaves, structure)


LAYERS: Registry[Layer] = Registry("layer kind")


def layer_named(name: str):
    """The registered layer kind of this name. A kind is pickled as a call of this function
    (``Layer.__reduce__``), so that unpickling gives the registered instance."""
    return LAYERS[name]


def register(kind: type[Layer]) -> type[Layer]:
    """Class decorator: register one instance of the class. If a module is of several kinds, the
    kind that was registered last is used."""
    LAYERS.add(kind.name, kind())
    return kind


#: the name of the kind of all modules that have parameters, but no kind of their own
GENERAL_KIND_NAME = "parameter"


#: (path of a module, name of one of its parameters)
ParamRef = tuple[str, str]


def parameter_path(path: str, name: str) -> str:
    """The path of a parameter of the module at ``path``."""
    return f"{path}.{name}" if path else name


def kind_of(module: Any) -> Layer | None:
    """The kind of a module; None if the kind lists no parameter of the module that can be trained
    (no ``weights`` and no ``vectors``). A user's kind takes precedence over Veneer's, because it is
    registered later."""
    kind = next(
        (kind for kind in reversed(tuple(LAYERS)) if isinstance(module, kind.types())),
        LAYERS[GENERAL_KIND_NAME],
    )
    return kind if kind.weights(module) or kind.vectors(module) else None


def kind_for(module: nn.Module, name: str) -> Any:
    """The layer kind for the parameter ``name`` of a module: the module's kind, or the general kind
    if the ``weights`` of the module's kind do not include the parameter."""
    kind = kind_of(module)
    return kind if kind is not None and name in kind.weights(module) else LAYERS[GENERAL_KIND_NAME]


def can_factor(
    kind: Layer,
    module: Any,
    base_class: type[nn.Module],
    trusted_classes: tuple[type[nn.Module], ...] = (),
) -> bool:
    """Whether the factored path, op(x; W) + op(x; ΔW) without forming W + ΔW, is correct for
    ``module``: its forward is that of a class of the kind, which ``kind.op`` computes, or that of a
    class in ``trusted_classes``.

    Args:
        base_class: the class of ``module`` without adapters.
        trusted_classes: classes whose forward computes the same as the kind's own class.
    """
    if type(kind).update is Layer.update or not kind.factors(module):
        return False
    return any(
        base_class.forward is known_class.forward
        for known_class in (*kind.types(), *trusted_classes)
    )
