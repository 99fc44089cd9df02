"""Run adapted linear layers through the fused kernel, one at a time or several that read the same
input:

    self.q_proj(x), self.k_proj(x), self.v_proj(x)      the first call computes all three outputs

Only plain changes are supported here: ΔW = scale · B A without a gain, for all outputs of a weight
that is an ordinary parameter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels import cost_model, device, fused
from veneer.kernels.dropout import new_seed
from veneer.layers import Layer


@dataclass(frozen=True, eq=False)
class FusedChange:
    """One plain low-rank change, ΔW = scale · B A, of a layer that is a matrix product.

    Fields:
        change: the ``Change``. Its A and B are read at each call, because they may be replaced.
        weight, bias: the names of the layer's parameters. ``bias`` is None for a layer that cannot
            have a bias.
        is_transposed: whether the weight is stored transposed, as [in, out].
        max_factored_tokens: the number of tokens above which W + ΔW is formed
            (``cost_model.max_factored_tokens``).
    """

    change: Any
    weight: str
    bias: str | None
    is_transposed: bool
    max_factored_tokens: float

    @property
    def active_dropout(self) -> float:
        """The dropout probability that applies now: 0 outside of training mode."""
        return self.change.dropout if self.change.training else 0.0

    def can_compute_early(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the layer's output for x may be computed before the layer is called: the kernel
        supports x and the weight, which is still a parameter, and no hook of the layer replaces its
        input."""
        weight: Any = module._parameters.get(self.weight)
        hooks = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        return not hooks and (fused.applies(x, weight) or device.applies(x, weight))

    def base_parameters(self, module: nn.Module) -> tuple[Any, Any]:
        """(the layer's weight [out, in], its bias or None)."""
        parameters = module._parameters
        weight: Any = parameters[self.weight]
        bias = None if self.bias is None else parameters[self.bias]
        return weight.mT if self.is_transposed else weight, bias

    def dependency_key(self, module: nn.Module) -> tuple[Any, ...]:
        """A key of everything besides x that the layer's output and its graph depend on. For one x,
        equal keys mean equal outputs."""
        factors, parameters = self.change._parameters, module._parameters
        tensors = (
            parameters[self.weight],
            parameters[self.bias] if self.bias else None,
            factors["A"],
            factors["B"],
        )
        settings = torch.is_grad_enabled(), self.active_dropout, self.change.scale
        return *settings, *tensor_versions(tensors)


def tensor_versions(tensors: Iterable[Tensor | None]) -> Iterator[tuple[int, int]]:
    """The ``id`` and version of each tensor that is not None. The ``id`` changes when a tensor is
    replaced, the version when it is written in place."""
    return ((id(tensor), tensor._version) for tensor in tensors if tensor is not None)


class PendingOutputs(threading.local):
    """Outputs that the call of one layer has computed for layers that read the same x and are
    called later.

    Each thread holds the outputs for one x at a time. Outputs that are never taken, for
    example because of an exception, are dropped when the next outputs are stored.
    """

    def __init__(self) -> None:
        # (x, the version of x, the outputs for x by key)
        self._pending: tuple[Any, int, dict[Any, Any]] = None, 0, {}

    def put(self, x: Tensor, outputs: dict[Any, Any]) -> None:
        self._pending = x, x._version, outputs

    def take(self, x: Tensor, key: Any) -> Any:
        """Remove and return the output for this x and ``key``. None if there is none, or if x has
        been written since the output was computed."""
        pending_x, version, outputs = self._pending
        if pending_x is not x or version != x._version or key not in outputs:
            return None
        output = outputs.pop(key)
        if not outputs:
            self._pending = None, 0, {}
        return output


def bias_is_parameter(module: nn.Module) -> bool:
    """Whether the bias of a module, if it has one, is a parameter. Any other bias (pruned,
    parametrised, a buffer) can only be read as the attribute ``bias``."""
    return "bias" in module._parameters or getattr(module, "bias", None) is None


def make_fused_change(change: Any, module: nn.Module, layer: Layer) -> FusedChange:
    """The ``FusedChange`` of a plain change of ``module``, whose kind is ``layer``. If the module
    has a bias, it must be a parameter."""
    weight: Any = module._parameters[layer.weight]
    bias = "bias" if "bias" in module._parameters else None
    _, out, in_ = change.dims
    max_factored_tokens = cost_model.max_factored_tokens(out, in_, change.rank, weight.dtype)
    return FusedChange(change, layer.weight, bias, layer.out_axis == 1, max_factored_tokens)


def fused_outputs(
    members: Sequence[tuple[nn.Module, FusedChange]], x: Tensor, seed: int | None = None
) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input x [*, in] that they all read. ``members`` are the
    (module, fused change) pairs of the layers. All layers use the dropout mask of ``seed``; if it
    is None, a seed is drawn."""
    weights, biases, A, B = [], [], [], []
    on_cpu = x.is_cpu
    for module, fused_change in members:
        weight, bias = fused_change.base_parameters(module)
        weights.append(weight)
        biases.append(bias)
        factors = (
            fused_change.change._parameters if on_cpu else fused_change.change.adapter_parameters
        )
        A.append(factors["A"])
        B.append(factors["B"])
    dropout = members[0][1].active_dropout
    if not dropout:
        seed = 0
    elif seed is None:
        seed = new_seed()
    scales = tuple(fused_change.change.scale for _, fused_change in members)
    if not on_cpu:
        return device.linears(scales, x, weights, biases, A, B, None, dropout, seed)
    token_count = x.numel() // x.shape[-1]
    forms_weight = (
        not dropout
        and x.dtype.itemsize >= 4
        and all(token_count > fused_change.max_factored_tokens for _, fused_change in members)
    )
    settings = fused.Settings(scales, dropout, seed, forms_weight)
    return fused.linears(settings, x, weights, biases, A, B)


class SharedInputLayers:
    """Layers of one module that read the same input, such as q_proj, k_proj and v_proj. The call
    of the first layer computes the outputs of all of them; the calls of the other layers return
    these shared outputs.

    Shared outputs come from one autograd node. A ``backward`` through one of them frees the tensors
    that the node has saved, so a second ``backward``, through another output, fails. If x has a
    graph, the second ``backward`` would fail without sharing too, because the first one has freed
    the graph of x. Outputs are therefore shared only if x has a graph. With dropout they are shared
    without a graph too: all layers use one dropout mask, and checkpointing, which runs the layers
    without a graph first, must draw the same masks in both runs.

    ``members`` are (module, layer adapter) pairs in the order of their calls. An output is valid
    only while the tensors that it was computed from are unchanged, so their identities and versions
    are compared when the output is taken.
    """

    def __init__(self, members: list[tuple[nn.Module, Any]]) -> None:
        self.members = members

    @staticmethod
    def can_share_outputs(fused_change: FusedChange, x: Tensor) -> bool:
        """Whether the outputs for x may be shared (see the class) in the present gradient mode."""
        if torch.is_grad_enabled():
            return x.grad_fn is not None or (x.requires_grad and fused_change.active_dropout > 0)
        # not for an inference tensor: it has no version, so a later write to it would go unnoticed
        return fused_change.active_dropout > 0 and not x.is_inference()

    def output(self, module: nn.Module, layer_adapter: Any, x: Tensor) -> Tensor:
        """The output of ``module`` with its layer adapter for x [*, in]: one that an earlier call
        has computed, or a new one. ``can_share_outputs`` must be True."""
        pending_output = _PENDING_OUTPUTS.take(x, id(layer_adapter))
        if pending_output is not None:
            y, dependency_key = pending_output
            if dependency_key == layer_adapter.fused_change.dependency_key(module) and (
                x.is_cpu or y.dtype == device.product_dtype(x)
            ):
                return y
        fused_change = layer_adapter.fused_change
        if layer_adapter is not self.members[0][1] or not fused_change.can_compute_early(module, x):
            return fused_outputs([(module, fused_change)], x)[0]
        later_members = [
            (later_module, later_adapter)
            for later_module, later_adapter in self.members[1:]
            if later_adapter.fused_change.can_compute_early(later_module, x)
            and later_adapter.fused_change.active_dropout == fused_change.active_dropout
        ]
        later_changes = [
            (later_module, later_adapter.fused_change)
            for later_module, later_adapter in later_members
        ]
        y, *later_outputs = fused_outputs([(module, fused_change), *later_changes], x)
        if later_outputs:
            _PENDING_OUTPUTS.put(
                x,
                {
                    id(later_adapter): (
                        later_y,
                        later_adapter.fused_change.dependency_key(later_module),
                    )
                    for (later_module, later_adapter), later_y in zip(
                        later_members, later_outputs, strict=True
                    )
                },
            )
        return y

    def seed(self, module: nn.Module, layer_adapter: Any, x: Tensor) -> int:
        """The dropout seed of ``module`` for x, for a call that computes this output alone. The
        first member draws a seed for all members, so that they use one dropout mask, as in
        ``output``. Several adapters may each have seeds for later members at once, because each
        adapter may have rows of x."""
        seeded_x, version, seeds = getattr(_PENDING_SEEDS, "seeds", (None, 0, {}))
        if seeded_x is not x or version != x._version:
            seeds = {}
        seed = seeds.pop(id(layer_adapter), None)
        if seed is None:
            fused_change, seed = layer_adapter.fused_change, new_seed()
            if layer_adapter is self.members[0][1] and fused_change.can_compute_early(module, x):
                seeds |= {
                    id(later_adapter): seed
                    for later_module, later_adapter in self.members[1:]
                    if later_adapter.fused_change.can_compute_early(later_module, x)
                    and later_adapter.fused_change.active_dropout == fused_change.active_dropout
                }
        _PENDING_SEEDS.seeds = (x, x._version, seeds) if seeds else (None, 0, {})
        return seed


def shared_dropout_seed(module: nn.Module, layer_adapter: Any, x: Tensor) -> int:
    """The dropout seed for x of a layer adapter that has a ``FusedChange``. Layers that read the
    same x get the same seed, unless x is an inference tensor, whose writes cannot be detected."""
    shared_layers = layer_adapter.shared_input_layers
    return (
        new_seed()
        if shared_layers is None or x.is_inference()
        else shared_layers.seed(module, layer_adapter, x)
    )


#: what the first of several layers that read the same x has computed or drawn for the later ones
_PENDING_OUTPUTS, _PENDING_SEEDS = PendingOutputs(), threading.local()
