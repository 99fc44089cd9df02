"""The interface of a layer kind, which alone knows how a class of layers uses its weights.

    y = op(x; W) + bias        update(x) = op(x; ΔW)
    ΔW: [g, out, in], folded into the shape of the weight; g is the number of matrices in it, such
    as groups of a convolution or experts, and 1 for a linear layer

A kind says which weights a module has (``weights``), how large a ΔW is (``dims``) and how ΔW is
arranged in the weight (``fold`` and ``unfold``). With only these methods, the module's own forward
runs on W + ΔW. A kind whose output is linear in its one weight also defines ``op`` and ``update``.
Its layers then compute op(x; W) + op(x; ΔW) without forming W + ΔW, which is called the factored
path. How to add a kind: CONTRIBUTING.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer.errors import sentence
from veneer.lowrank import LowRank
from veneer.registry import Registry


class Dims(NamedTuple):
    """The size of a change: ``groups`` matrices [out, in], each a product of [out, rank] and [rank,
    in]."""

    groups: int
    out: int
    in_: int

    @property
    def max_rank(self) -> int:
        return min(self.out, self.in_)


class Layer(ABC):
    """One kind of layer, without state. Subclasses are abstract or final. The registry holds one
    instance of each final subclass."""

    name: str
    #: the weight's name in a module with one weight
    weight: str = "weight"
    #: the axis of the weight that runs over outputs
    out_axis: int = 0
    #: keys of A and B in a PEFT file, after the module's path
    file_keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    #: whether dropout is applied to the inputs; False if these are indices, because dropout then
    #: drops the update of whole tokens
    drops_input: bool = True
    #: whether the targets "all-linear", "attention" and "mlp" include this kind
    linear: bool = False
    #: whether forward is y = x Wᵀ + bias and nothing else (with Wᵀ stored if ``out_axis`` is 1)
    product: bool = False
    #: whether the layer has one input [*, in] and computes each vector of it independently
    by_position: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return layer_named, (self.name,)

    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes of this kind. Subclasses of these are of this kind too."""

    @abstractmethod
    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        """Small modules of this kind, each with an input (a tensor, or a tuple of arguments): one
        for every option that changes the arithmetic."""

    def weights(self, module: Any) -> tuple[str, ...]:
        """The names of the weights that can have a low-rank change."""
        return (self.weight,)

    def vectors(self, module: Any) -> tuple[str, ...]:
        """The names of the vectors that are trained at their full shape if the module is a
        target."""
        return ()

    def below(self, module: Any) -> tuple[str, ...]:
        """The names of submodules whose weights this layer uses in its own computation. Targets
        that match the layer include them."""
        return ()

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        """The size of a change of a weight with this ``shape`` (the shape of the dense weight, in
        whatever way it is stored). By default the weight is a matrix [out, in], or [in, out] if
        ``out_axis`` is 1."""
        return Dims(1, *(shape[::-1] if self.out_axis else shape))

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        """ΔW, given as [g, out, in], in the ``shape`` of the weight."""
        return delta[0].mT if self.out_axis else delta.reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        """A tensor of the weight's shape as [g, out, in]: the inverse of ``fold``."""
        return weight.mT[None] if self.out_axis else weight.reshape(dims)

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        """``values`` [g · out], one for each output, in a shape that broadcasts over a weight of
        ``shape``."""
        axes = [1] * len(shape)
        axes[self.out_axis] = -1
        return values.reshape(axes)

    def fan_in(self, dims: Dims) -> int:
        """The number of inputs that reach a row of A at a time, for A's Kaiming initialisation."""
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

    def _undefined(self, method: str) -> NotImplementedError:
        problem = f"the layer kind {self.name!r}, whose class defines no {method}()"
        return NotImplementedError(
            sentence(problem, "one that its forward needs", f"define it in {type(self).__name__}")
        )

    # The factored path: a kind that is linear in its one weight overrides `op` and `update`.

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The forward of the class, with ``weight`` and ``bias`` in place of the module's."""
        raise self._undefined("op")

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        """``y + op(x; ΔW)``, or ``op(x; ΔW)`` if y is None, in the dtype of x. It is computed with
        A and B, without forming ΔW."""
        raise self._undefined("update")

    def fused(
        self,
        module: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: LowRank,
        drops: float,
    ) -> Tensor | None:
        """``update(drop(x), low, op(x, weight, bias))`` as one function of ``kernels``, or None if
        there is no such function for this call. ``drops`` is the probability of dropout. It is
        called only if ``kernels.fused.applies(x, weight)`` or
        ``kernels.device.applies_without_cast(x, weight)`` is True."""
        return None

    def factors(self, module: Any) -> bool:
        """Whether ``update`` equals ``op(x; ΔW)`` with the options of this module, gradients
        included."""
        return True

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        """``values`` [g · out], one for each output, in a shape that broadcasts over the output
        y."""
        return values

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        """The vectors that ΔW multiplies in a call with these arguments, [g, tokens, in].
        ``weight`` names a weight of the module, or of a submodule by its path."""
        raise self._undefined("inputs")

    # The materialised path runs the module's own forward on a view of it.

    def bind(self, view: Any, values: Any) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Prepare a view of a module for its forward. ``values.get(name)`` is a changed weight. A
        kind needs this if its forward does not read weights by their names on the module."""

    # Rows of a batch that use different adapters.

    def take(
        self, module: Any, args: tuple, kwargs: dict, rows: Tensor, count: int
    ) -> tuple[tuple, dict]:
        """The arguments of a call, of which only ``rows`` of a batch of ``count`` rows remain.

        Raises:
            LookupError: no argument has ``count`` rows.
        """
        has_rows = False

        def select_rows(argument: Any) -> Any:
            nonlocal has_rows
            is_tensor = isinstance(argument, Tensor)
            if not is_tensor or argument.dim() == 0 or argument.shape[0] != count:
                return argument
            has_rows = True
            return argument.index_select(0, rows.to(argument.device))

        selected = pytree.tree_map(select_rows, (args, kwargs))
        if not has_rows:
            raise LookupError
        return selected

    def put(self, module: Any, outputs: list[Any], order: Tensor) -> Any:
        """The ``outputs`` of several calls, joined to the output of the whole batch. ``order``: for
        each row of the batch, its row in the joined outputs."""
        return join_outputs(outputs, order, lambda _: 0)

    # The layout of a PEFT file.

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A and B in the shapes of a PEFT file. PEFT has no groups in these layers, so the g
        matrices are concatenated along the first axis: A [g · r, in], B [g · out, r]."""
        return low.A.flatten(0, 1), low.B.flatten(0, 1)

    def pack_vector(self, values: Tensor, shape: torch.Size) -> Tensor:
        """``values`` [g · out], one for each output, in the shape of a PEFT file."""
        return values

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        """A [g, r, in] and B [g, out, r] from the shapes of a PEFT file; None if the shapes do not
        fit this layer."""
        groups, out, in_ = self.dims(module, shape)
        rank = B.shape[1] if B.dim() == 2 else 0
        fits = A.shape == (groups * rank, in_) and B.shape == (groups * out, rank)
        return (
            (A.reshape(groups, rank, in_), B.reshape(groups, out, rank)) if fits and rank else None
        )


def join_outputs(outputs: list[Any], order: Tensor, axis_of: Any) -> Any:
    """Concatenate the outputs of several calls (trees of the same structure), tensor by tensor, and
    bring the rows into the given order. ``axis_of(i)`` is the axis of the i-th tensor that holds
    the rows; ``order`` is as in ``Layer.put``."""
    spec, leaves = pytree.tree_structure(outputs[0]), []
    for position, tensors in enumerate(zip(*map(pytree.tree_leaves, outputs), strict=True)):
        if not isinstance(tensors[0], Tensor) or tensors[0].dim() == 0:
            leaves.append(tensors[0])
            continue
        axis = axis_of(position)
        leaves.append(torch.cat(tensors, axis).index_select(axis, order.to(tensors[0].device)))
    return pytree.tree_unflatten(leaves, spec)


LAYERS: Registry[Layer] = Registry("layer kind")


def layer_named(name: str):
    """The registered layer kind of this name. A pickled kind holds this call, so that unpickling
    gives the registered instance."""
    return LAYERS[name]


def register(kind: type[Layer]) -> type[Layer]:
    """Class decorator: register one instance. Kinds that are registered later take precedence."""
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
    """The kind of a module; None if the module has no parameters of its own. A user's kind takes
    precedence over Veneer's, because it is registered later."""
    kind = next(
        (kind for kind in reversed(tuple(LAYERS)) if isinstance(module, kind.types())),
        LAYERS[GENERAL_KIND_NAME],
    )
    return kind if kind.weights(module) or kind.vectors(module) else None


def kind_for(module: nn.Module, name: str) -> Any:
    """The layer kind for one parameter of a module: the module's kind, or the general kind if the
    module's kind does not list the parameter."""
    kind = kind_of(module)
    return kind if kind is not None and name in kind.weights(module) else LAYERS[GENERAL_KIND_NAME]


def can_factor(
    kind: Layer, module: Any, base: type[nn.Module], trusted: tuple[type[nn.Module], ...] = ()
) -> bool:
    """Whether the factored path is correct for ``module``, whose class without adapters is
    ``base``: the forward of ``base`` is that of a class of the kind, which ``kind.op`` computes, or
    that of a class in ``trusted``."""
    if type(kind).update is Layer.update or not kind.factors(module):
        return False
    return any(base.forward is stock.forward for stock in (*kind.types(), *trusted))
