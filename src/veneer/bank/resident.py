"""Load an adapter into the memory of a bank, in the form that a bank's calls need.

    ResidentAdapter.layer_changes   by layer, the object that runs instead of the layer's forward
        ResolvedLowRank     for a linear layer: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias
        LayerAdapter        for any other change

A ``ResolvedLowRank`` is resolved: its A, B and gain are the tensors of the formula above, whatever
the variant. For example, DoRA's gain is computed once, when the adapter is loaded, because neither
the base nor the adapter changes afterwards. The tensors of all ``ResolvedLowRank`` of an adapter
are views of one block of memory (for each dtype and device), so that evicting the adapter frees one
block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapter_files.match_model import MatchCache, match
from veneer.attach import (
    InvokedAdapter,
    LayerAdapter,
    LowRankPlan,
    ModelIndex,
    ModulePath,
    adapt_modules,
    adapters,
    adapters_of,
    build_layer_adapters,
    need_adapters,
    run_on_view,
    state_of,
)
from veneer.bases import BASES, weight_of
from veneer.config import LoraConfig, trained_dtype
from veneer.errors import SelectionError
from veneer.fileio.throttle import throttle
from veneer.formats import peft
from veneer.layers import Dims, ParamRef
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS

#: how many times as many elements A and B of a ``ResolvedLowRank`` may have as the adapter has
#: parameters at the layer. A variant that trains few values at a large rank (VeRA) exceeds this, so
#: its changes stay ``LayerAdapter``s, which need less memory.
MAX_GROWTH = 2.0
#: approximate size in bytes of the Python objects (without tensors) for the change of one layer
BYTES_PER_CHANGE = 1 << 10

#: yields the next ``ResidentAdapter.uid``
_UIDS = itertools.count()


@dataclass(frozen=True, eq=False, slots=True)
class ResolvedLowRank:
    """The low-rank change of a linear layer, which then computes gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias.
    It has the members of a ``LayerAdapter`` that a selection needs.

    Fields:
        A: [r, in].
        B: [r, out], already multiplied by the scale and the gain.
        gain: [out], DoRA's factor for each output; None stands for 1.
        bias: [out], which replaces the layer's bias; None keeps the layer's bias.
        layer: the layer kind of the module, an instance of ``layers.Layer``.
        weight_name: the name of W in the module.
        dims: the sizes of ΔW as a matrix.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layer: Any
    weight_name: str
    dims: Dims

    submodule_adapters = {}
    submodule_adapters_by_method = {}
    storage = BASES["plain"]
    # for calls that ``BatchedLayer`` does not compute (under autocast, or with gradients): runs the
    # layer's own forward on a view of the module with the weight from ``changed_weights``
    run = run_on_view

    @property
    def changes(self) -> dict[str, ResolvedLowRank]:
        return {self.weight_name: self}

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        yield id(self)

    def adapters_read_by(self, method: str) -> Mapping[ModulePath, Any]:
        return {}

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}

    def stacks(self, module: nn.Module) -> None:
        """As ``LayerAdapter.stacks``, which returns the changes of stacks of matrices (of experts).
        Here always None, because the weight of a linear layer is one matrix."""

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """gain ⊙ W + ΔW, by the name of the weight: in at least float32 if ``wide``, else in the
        dtype of the weight."""
        weight: Any = weight_of(module, self.weight_name)
        dense = weight.to(at_least_float32(weight.dtype))
        if self.gain is not None:
            dense = dense * self.layer.spread(self.gain.to(dense.dtype), self.dims, dense.shape)
        delta = LowRank(self.A[None], self.B.mT[None], 1.0).delta(dense.dtype)
        dense = dense + self.layer.fold(delta, dense.shape)
        return {self.weight_name: dense if wide else dense.to(weight.dtype)}


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter in memory.

    Fields:
        path: the adapter folder.
        variant: the name of the adapter's variant.
        layer_changes: by ``LayerState.key``, the ``ResolvedLowRank`` or ``LayerAdapter`` that runs
            instead of the layer's forward.
        nbytes: bytes of the tensors and the Python objects.
        rank: the largest rank of its ``ResolvedLowRank``, 0 if it has none.
        unresolved_keys: keys of the layers whose change is no ``ResolvedLowRank``.
        invocation_tokens: the invocation tokens of its config, from which on the adapter acts;
            empty if it acts on every token.
        uid: a number that no other ``ResidentAdapter`` of the process ever has.
    """

    path: Path
    variant: str
    layer_changes: Mapping[Any, Any]
    nbytes: int
    rank: int
    unresolved_keys: frozenset[Any]
    invocation_tokens: tuple[int, ...] = ()
    uid: int = field(default_factory=_UIDS.__next__)


def expected_bytes(path: Path) -> int:
    """A low estimate of the bytes of an adapter in memory: half the size of its tensor file,
    because a float32 file is loaded in 16 bits if the base is in 16 bits. 0 if there is no such
    file."""
    tensors_path = path / peft.TENSORS
    return tensors_path.stat().st_size // 2 if tensors_path.is_file() else 0


@torch.inference_mode(False)  # because later calls outside of inference mode use the tensors
def load_resident(
    model: nn.Module,
    path: Path,
    *,
    dtype: torch.dtype | None,
    verify_base: bool,
    cache: MatchCache,
    resolve_plans: ResolvePlans,
) -> ResidentAdapter:
    """Verify an adapter folder against a model, and load the adapter. The class of each module that
    the adapter changes is replaced by an adapted class, unless an earlier adapter did that.

    Args:
        dtype: dtype of the factors; None takes the dtype of each weight.
        verify_base: whether the base must have the weights on which the adapter was trained.
        cache: results of verifying earlier adapters against this model; new results are added.
        resolve_plans: how to compute the ``ResolvedLowRank`` of an adapter that changes the same
            weights, with the same config, as an earlier one. A new plan is added if all changes of
            this adapter become ``ResolvedLowRank``.

    Raises:
        AdapterError, BaseMismatchError: as for ``veneer.load``.
        SelectionError: an adapter is merged into the model's weights, which therefore differ from
            the weights of the base.
    """
    model_adapters = adapters_of(model)
    if model_adapters is not None and model_adapters.merged is not None:
        raise SelectionError(
            f"{model_adapters.merged!r} merged into the weights, while an adapter is loaded",
            "an unmerged model",
            "call veneer.unmerge(model) first",
        )
    load_plan, model_index = (
        match(model, path, [], verify_base=verify_base, cache=cache),
        cache.model_index,
    )
    config, low_rank_plans = load_plan.adapter_files.config, load_plan.plans.low_rank_plans
    # ``cache`` returns the same tuple for the same targets and keeps it, so its id identifies it
    resolve_plan = resolve_plans.get(id(low_rank_plans))
    if resolve_plan is not None and not load_plan.full and resolve_plan.config == config:
        layer_changes = resolve_plan.resolve(load_plan.adapter_parameters, dtype)
        return _make_resident(path, config, layer_changes, [], len(layer_changes))
    layer_adapters = build_layer_adapters(
        model_index, load_plan.plans, trainable=False, parameters=load_plan.adapter_parameters
    )
    load_plan.fill(layer_adapters)
    for layer_adapter in layer_adapters.values():
        layer_adapter.eval()  # no child of the model, so no ``model.eval()`` reaches it
    layer_adapter_by_key = adapt_modules(model_index, layer_adapters)
    changes_by_adapter_id, unresolved = _split_adapters(model_index, layer_adapters, dtype)
    layer_changes = {
        key: changes_by_adapter_id.get(id(layer_adapter), layer_adapter)
        for key, layer_adapter in layer_adapter_by_key.items()
    }
    modules = [model_index.modules[low_rank_plan.path] for low_rank_plan in low_rank_plans]
    all_resolved = not (unresolved or load_plan.full or VARIANTS[config.variant].derived) and len(
        layer_adapter_by_key
    ) == len(low_rank_plans)
    if all_resolved and all(map(_covers_weight, low_rank_plans, modules)):
        resolve_plans[id(low_rank_plans)] = ResolvePlan(config, low_rank_plans, modules)
    return _make_resident(path, config, layer_changes, unresolved, len(layer_adapters))


@torch.inference_mode(False)
def resident_of(
    model: nn.Module, path: Path, name: str, *, dtype: torch.dtype | None
) -> ResidentAdapter | None:
    """The adapter that ``load_resident`` would load from the folder ``path``, without reading the
    folder: its tensors are copied from the attached adapter ``name``, whose values must equal the
    folder's.

    Returns None if the change of some layer cannot be a ``ResolvedLowRank``. The bank would have to
    use the ``LayerAdapter`` of the attached adapter, which further training changes."""
    model_adapters = need_adapters(model, name)
    layer_adapters = {
        module_path: layer_adapter for module_path, _, layer_adapter in adapters(model, name)
    }
    changes_by_adapter_id, unresolved = _split_adapters(ModelIndex(model), layer_adapters, dtype)
    layer_adapter_by_key = {
        key: computation.layer_adapter if isinstance(computation, InvokedAdapter) else computation
        for key, computation in model_adapters.selections[name].usable_layer_adapters.items()
    }
    if unresolved or any(
        id(layer_adapter) not in changes_by_adapter_id
        for layer_adapter in layer_adapter_by_key.values()
    ):
        return None
    layer_changes = {
        key: changes_by_adapter_id[id(layer_adapter)]
        for key, layer_adapter in layer_adapter_by_key.items()
    }
    return _make_resident(path, model_adapters.configs[name], layer_changes, [], len(layer_changes))


@dataclass(frozen=True, eq=False)
class ResolvePlan:
    """How to compute all ``ResolvedLowRank`` of an adapter from its parameters. Adapters with the
    same config that change the same weights are loaded by one plan, which is faster than creating a
    ``LayerAdapter`` for each layer.

    Fields:
        config: the config of these adapters.
        low_rank_plans: the plan of each low-rank change.
        modules: for each plan in ``low_rank_plans``, the module with the changed weight.
    """

    config: LoraConfig
    low_rank_plans: tuple[LowRankPlan, ...]
    modules: Sequence[nn.Module]

    @torch.no_grad()
    def resolve(
        self, parameters: Mapping[ParamRef, Mapping[str, Tensor]], dtype: torch.dtype | None
    ) -> dict[Any, ResolvedLowRank]:
        """{``LayerState.key``: ``ResolvedLowRank``} of one adapter. ``parameters``: by changed
        weight, the adapter's parameters (A, B, …) by name. ``dtype``: dtype of the factors; None
        takes the dtype of each weight."""
        variant = VARIANTS[self.config.variant]
        resolved_tensors = []
        for low_rank_plan, module in throttle(zip(self.low_rank_plans, self.modules, strict=True)):
            weight: Any = weight_of(module, low_rank_plan.weight)
            parameter_dtype = trained_dtype(self.config, weight.dtype)
            weight_parameters = {
                name: value.to(weight.device, parameter_dtype)
                for name, value in parameters[low_rank_plan.ref].items()
            }
            low_rank, gain = variant.resolve(
                weight_parameters,
                variant.scale(low_rank_plan.alpha, low_rank_plan.rank),
                lambda low_rank_plan=low_rank_plan, weight=weight: low_rank_plan.layer.unfold(
                    low_rank_plan.storage.dense(weight), low_rank_plan.dims
                ),
            )
            factor_dtype = weight.dtype if dtype is None else dtype
            resolved_tensors.append(
                (
                    module,
                    low_rank_plan.dims,
                    [*_flatten_factors(low_rank, gain, factor_dtype), None],
                )
            )
        resolved_changes = _join_in_memory(resolved_tensors)
        layer_states: list[Any] = [state_of(module) for module in self.modules]
        return {
            layer_state.key: change
            for layer_state, change in zip(layer_states, resolved_changes, strict=True)
        }


#: each ``ResolvePlan`` by the ``id`` of its tuple ``low_rank_plans``, which adapters that change
#: the same weights share
ResolvePlans = dict[int, ResolvePlan]


def _covers_weight(low_rank_plan: LowRankPlan, module: nn.Module) -> bool:
    """Whether a change covers all outputs and inputs of its weight. False if it is limited to some
    output rows or tokens, or leaves out an input such as a padding token."""
    return (
        low_rank_plan.rows is low_rank_plan.tokens is None
        and low_rank_plan.layer.frozen_input(module) is None
    )


def _make_resident(
    path: Path,
    config: LoraConfig,
    layer_changes: Mapping[Any, Any],
    unresolved: Sequence[LayerAdapter],
    change_count: int,
) -> ResidentAdapter:
    resolved_changes = {
        key: change for key, change in layer_changes.items() if isinstance(change, ResolvedLowRank)
    }
    tensors = [
        tensor
        for change in resolved_changes.values()
        for tensor in (change.A, change.B, change.gain, change.bias)
        if tensor is not None
    ]
    tensors += [
        tensor
        for layer_adapter in unresolved
        for tensor in (*layer_adapter.parameters(), *layer_adapter.buffers())
    ]
    tensor_bytes = sum(
        tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )
    largest_rank = max((len(change.A) for change in resolved_changes.values()), default=0)
    return ResidentAdapter(
        path,
        config.variant,
        layer_changes,
        tensor_bytes + BYTES_PER_CHANGE * change_count,
        largest_rank,
        frozenset(layer_changes.keys() - resolved_changes.keys()),
        tuple(config.invocation_tokens),
    )


def _split_adapters(
    model_index: ModelIndex, layer_adapters: Mapping[str, LayerAdapter], dtype: torch.dtype | None
) -> tuple[dict[int, ResolvedLowRank], list[LayerAdapter]]:
    """Compute the ``ResolvedLowRank`` of each layer adapter that can have one.

    Args:
        model_index: the modules of the model, by path.
        layer_adapters: by the path of their module.
        dtype: dtype of the factors; None takes the dtype of each weight.

    Returns:
        The ``ResolvedLowRank`` by the ``id`` of their layer adapter, and the other layer adapters.
    """
    resolved_tensors: list[tuple[nn.Module, Dims, list[Tensor | None]]] = []
    resolved_ids, unresolved = [], []
    # the forward of a module above reads these as ``LayerAdapter``s, so they cannot be resolved
    ids_below = {
        id(layer_adapter_below)
        for layer_adapter in layer_adapters.values()
        for adapters_below in (
            layer_adapter.submodule_adapters,
            *layer_adapter.submodule_adapters_by_method.values(),
        )
        for layer_adapter_below in adapters_below.values()
    }
    for path, layer_adapter in layer_adapters.items():
        module = model_index.modules[path]
        tensors = (
            None
            if id(layer_adapter) in ids_below
            else _resolve_adapter(layer_adapter, module, dtype)
        )
        if tensors is None:
            unresolved.append(layer_adapter)
        else:
            (change,) = layer_adapter.changes.values()
            resolved_ids.append(id(layer_adapter))
            resolved_tensors.append((module, change.dims, tensors))
    return dict(zip(resolved_ids, _join_in_memory(resolved_tensors), strict=True)), unresolved


def _join_in_memory(
    resolved_tensors: Sequence[tuple[nn.Module, Dims, Sequence[Tensor | None]]],
) -> list[ResolvedLowRank]:
    """A ``ResolvedLowRank`` for each (module, dims, [A, B, gain, bias]). Its tensors are copies
    that lie in one block of memory, so that freeing the adapter frees one block."""
    copies = _copy_to_one_block(
        [value for *_, tensors in resolved_tensors for value in tensors if value is not None]
    )
    changes = []
    for module, dims, tensors in throttle(resolved_tensors):
        A, B, gain, bias = cast(Any, [None if value is None else next(copies) for value in tensors])
        layer_state: Any = state_of(module)
        changes.append(
            ResolvedLowRank(A, B, gain, bias, layer_state.layer, layer_state.layer.weight, dims)
        )
    return changes


@torch.no_grad()
def _resolve_adapter(
    layer_adapter: LayerAdapter, module: nn.Module, dtype: torch.dtype | None
) -> list[Tensor | None] | None:
    """[A, B, gain, bias] for a ``ResolvedLowRank`` that computes the same as ``layer_adapter``;
    None if there is none, because the layer is not linear or its change is more than one matrix
    product, a gain and a bias, or because A and B would take too much memory (``MAX_GROWTH``)."""
    layer_state = state_of(module)
    is_product = (
        layer_state is not None and layer_state.is_plain_product and len(layer_adapter.changes) == 1
    )
    if (
        not is_product
        or layer_adapter.submodule_adapters
        or layer_adapter.submodule_adapters_by_method
        or layer_adapter.full._buffers
        or layer_adapter.full._parameters.keys() - {"bias"}
    ):
        return None
    ((name, change),) = layer_adapter.changes.items()
    weight: Any = weight_of(module, name)
    if layer_adapter.full._parameters and module._parameters["bias"] is None:
        return None
    low_rank, gain = change.resolve(weight)
    layer_kind: Any = layer_state.layer
    if (change.is_transposed_in(layer_kind) and gain is not None) or len(low_rank.A) > 1:
        return None
    parameters, derived = change.adapter_parameters, change.variant.derived
    parameter_count = sum(value.numel() for key, value in parameters.items() if key not in derived)
    if low_rank.A.numel() + low_rank.B.numel() > MAX_GROWTH * parameter_count:
        return None
    factor_dtype: torch.dtype = weight.dtype if dtype is None else dtype
    bias = layer_adapter.full._parameters.get("bias")
    return [
        *_flatten_factors(change.as_read_by(layer_kind, low_rank), gain, factor_dtype),
        None if bias is None else bias.to(factor_dtype),
    ]


def _flatten_factors(
    low_rank: LowRank, gain: Tensor | None, dtype: torch.dtype
) -> list[Tensor | None]:
    """[A [r, in], B [r, out], gain [out] or None] for a ``ResolvedLowRank``, in ``dtype``. B is
    transposed, and multiplied by the scale of ``low_rank`` and by the gain."""
    if gain is not None:
        low_rank = low_rank.scale_rows(gain.view(1, -1))
    B = (low_rank.B[0].to(at_least_float32(low_rank.B.dtype)) * low_rank.scale).mT
    return [
        factor if factor is None else factor.detach().to(dtype)
        for factor in (low_rank.A[0], B, gain)
    ]


def _copy_to_one_block(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield a copy of each tensor. All copies of one dtype and device lie in one block of memory,
    each aligned to 64 bytes."""
    block_sizes: dict[Any, int] = {}  # in values, by (dtype, device)
    block_starts = []
    for tensor in tensors:
        block_key, alignment = (tensor.dtype, tensor.device), 64 // tensor.element_size()
        block_starts.append((block_key, block_sizes.get(block_key, 0)))
        padded_size = -(-tensor.numel() // alignment) * alignment
        block_sizes[block_key] = block_starts[-1][1] + padded_size
    blocks = {
        (dtype, device): torch.empty(size, dtype=dtype, device=device)
        for (dtype, device), size in block_sizes.items()
    }
    for tensor, (block_key, start) in zip(tensors, block_starts, strict=True):
        yield blocks[block_key][start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
