"""The contract of a kind of layer: the only place that knows how a weight is used.

    y = op(x; W) + bias        update(x) = op(x; ΔW)
    ΔW: [g, out, in], folded into the shape of the weight

A kind says which weights a module has (``weights``), how large a ΔW is (``dims``) and how it lies
in the weight (``fold`` and ``unfold``). That is enough: the module's own forward then runs on W +
ΔW. A kind whose output is linear in its one weight also offers ``op`` and ``update``, and gets the
factored path. How to add one: CONTRIBUTING.md.
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
    """The size of a change: ``groups`` products of [out, rank] and [rank, in]."""

    groups: int
    out: int
    in_: int

    @property
    def max_rank(self) -> int:
        return min(self.out, self.in_)


class Layer(ABC):
    """One kind of layer, without state. Subclasses are abstract or final; the registry holds one
    instance of each."""

    name: str
    #: the weight's name in a module with one weight
    weight: str = "weight"
    #: the axis of the weight that counts outputs
    out_axis: int = 0
    #: keys of A and B in a PEFT file, after the module's path; None where PEFT has no such layer
    file_keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    #: False where inputs are indices: dropout then drops whole tokens of the update
    drops_input: bool = True
    #: whether the words "all-linear", "attention" and "mlp" mean this kind
    linear: bool = False
    #: whether forward is y = x Wᵀ + bias and nothing else (W lies transposed if out_axis is 1)
    product: bool = False
    #: whether each position of the one input is computed alone, so that the axes before the last
    #: may be any
    by_position: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return layer_named, (self.name,)

    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes of this kind. Their subclasses are of this kind too."""

    @abstractmethod
    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        """Small modules of this kind with an input each (a tensor, or a tuple of arguments), one
        for every option that changes the arithmetic."""

    def weights(self, module: Any) -> tuple[str, ...]:
        """The names of the weights that a low-rank change fits."""
        return (self.weight,)

    def vectors(self, module: Any) -> tuple[str, ...]:
        """The names of the vectors that are changed along with the weights, at their full shape."""
        return ()

    def below(self, module: Any) -> tuple[str, ...]:
        """The names of children that belong to this layer: a target that matches the layer
        includes them."""
        return ()

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        """The size of a change of a weight of this shape (the dense weight's, however it is
        stored): by default that of a matrix [out, in], or [in, out] if ``out_axis`` is 1."""
        return Dims(1, *(shape[::-1] if self.out_axis else shape))

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        """ΔW [g, out, in] in the weight's shape."""
        return delta[0].mT if self.out_axis else delta.reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        """A tensor of the weight's shape as [g, out, in]: the inverse of ``fold``."""
        return weight.mT[None] if self.out_axis else weight.reshape(dims)

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        """One value an output, [g · out], shaped to broadcast over the weight."""
        axes = [1] * len(shape)
        axes[self.out_axis] = -1
        return values.reshape(axes)

    def fan_in(self, dims: Dims) -> int:
        """How many inputs meet in one row of A, for its Kaiming initialisation."""
        return dims.in_

    def frozen_input(self, module: Any) -> int | None:
        """The input (a column of ΔW) that never changes, such as a padding token; None if there is
        none."""
        return None

    def apply_forward_rewrite(self, module: Any, weight: Tensor) -> Tensor:
        """The weight after the rewrite that forward applies when it reads it (such as a weight
        standardisation); a merge writes this."""
        return weight

    def refuses(self, module: Any) -> str | None:
        """Why this module cannot carry an adapter, or None."""
        return None

    def _undefined(self, method: str) -> NotImplementedError:
        problem = f"the layer kind {self.name!r}, whose class defines no {method}()"
        return NotImplementedError(
            sentence(problem, "one that its forward needs", f"define it in {type(self).__name__}")
        )

    # The factored path: a kind that is linear in its one weight overrides `op` and `update`.

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The class's own forward, on ``weight`` and ``bias`` in place of the module's."""
        raise self._undefined("op")

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        """``y + op(x; ΔW)`` through the bottleneck (``op(x; ΔW)`` alone if y is None), in the dtype
        of x."""
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
        """``update(drop(x), low, op(x, weight, bias))``, with ``drops`` the probability, as one
        function of ``kernels``, or None where there is none for this call. Only where
        ``fused.applies`` does."""
        return None

    def factors(self, module: Any) -> bool:
        """Whether ``update`` equals ``op(x; ΔW)`` for this module, gradients included, whatever its
        options are."""
        return True

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        """A vector over outputs, [g · out], shaped to broadcast over y."""
        return values

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        """The rows that ΔW of this weight (of a child's by its path below) multiplies in a call
        with these arguments, [g, tokens, in]."""
        raise self._undefined("inputs")

    # The materialised path runs the module's own forward on a view of it.

    def bind(self, view: Any, values: Any) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Put changed weights, ``values.get(name)``, where a view's forward looks for them, if that
        is not under their names."""

    # Rows of a batch that use different adapters.

    def take(
        self, module: Any, args: tuple, kwargs: dict, rows: Tensor, count: int
    ) -> tuple[tuple, dict]:
        """The arguments of a call that holds only these rows of a batch of ``count``.

        Raises:
            LookupError: nothing in the arguments has ``count`` rows.
        """
        matched = False

        def pick(value: Any) -> Any:
            nonlocal matched
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != count:
                return value
            matched = True
            return value.index_select(0, rows.to(value.device))

        selected = pytree.tree_map(pick, (args, kwargs))
        if not matched:
            raise LookupError
        return selected

    def put(self, module: Any, outputs: list[Any], order: Tensor) -> Any:
        """The outputs of such calls, one after the other, as that of the whole batch in its
        order."""
        return joined(outputs, order, lambda _: 0)

    # The layout of a PEFT file.

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A and B in the shapes of a PEFT file; groups, of which PEFT has none here, one below the
        other."""
        return low.A.flatten(0, 1), low.B.flatten(0, 1)

    def pack_vector(self, values: Tensor, shape: torch.Size) -> Tensor:
        """One value an output, [g · out], in the shape of a PEFT file."""
        return values

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        """A [g, r, in] and B [g, out, r] from the shapes of a PEFT file; None if those do not fit
        this layer."""
        groups, out, in_ = self.dims(module, shape)
        rank = B.shape[1] if B.dim() == 2 else 0
        fits = A.shape == (groups * rank, in_) and B.shape == (groups * out, rank)
        return (
            (A.reshape(groups, rank, in_), B.reshape(groups, out, rank)) if fits and rank else None
        )


def joined(outputs: list[Any], order: Tensor, axis_of: Any) -> Any:
    """Concatenate nested outputs tensor by tensor, each along ``axis_of(its position)``, and
    reorder that axis."""
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
    """The registered layer of this name; a pickle holds this call, so that a copy is the one
    instance."""
    return LAYERS[name]


def register(kind: type[Layer]) -> type[Layer]:
    """Class decorator: put one instance into the registry. The kinds that are registered last are
    asked first."""
    LAYERS.add(kind.name, kind())
    return kind


#: the kind of everything that has parameters of its own and no kind of its own
GENERAL = "parameter"


#: (path of a module, name of one of its parameters)
ParamRef = tuple[str, str]


def parameter_path(path: str, name: str) -> str:
    """The path of a parameter of the module at ``path``."""
    return f"{path}.{name}" if path else name


def kind_of(module: Any) -> Layer | None:
    """The kind of a module with something to change; a user's own kind comes before ours, as it was
    registered later. None for a module without parameters of its own."""
    kind = next(
        (kind for kind in reversed(tuple(LAYERS)) if isinstance(module, kind.types())),
        LAYERS[GENERAL],
    )
    return kind if kind.weights(module) or kind.vectors(module) else None


def kind_for(module: nn.Module, name: str) -> Any:
    """The layer kind that describes one parameter: its module's, or the general kind for a
    parameter that the module's kind does not list."""
    kind = kind_of(module)
    return kind if kind is not None and name in kind.weights(module) else LAYERS[GENERAL]


def factors(
    kind: Layer, module: Any, base: type[nn.Module], trusted: tuple[type[nn.Module], ...] = ()
) -> bool:
    """Whether the factored form is right for ``module``: its class runs the forward that
    ``kind.op`` mirrors (or one of ``trusted``), not one of its own."""
    if type(kind).update is Layer.update or not kind.factors(module):
        return False
    return any(base.forward is stock.forward for stock in (*kind.types(), *trusted))
