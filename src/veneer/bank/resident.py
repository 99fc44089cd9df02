"""Load an adapter into the memory of a bank, in the form that a bank's calls need.

    layer_changes   what runs instead of a layer's forward, by the key of the layer's ``LayerState``
        ResolvedLowRank     for a linear layer: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias
        LayerAdapter        for any other change

A ``ResolvedLowRank`` holds final factors: DoRA's gain and PiSSA's products are computed once, when
the adapter is loaded, because neither the base nor the adapter changes afterwards. The tensors of
all ``ResolvedLowRank`` of an adapter are views of one block of memory (for each dtype and device),
so that evicting the adapter frees one block.
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
    ModulePath,
    Names,
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

#: the largest ratio of the number of elements of A and B to the number of the adapter's parameters
#: at a layer. A variant that trains few values at a large rank (VeRA) exceeds it, so its changes
#: stay ``LayerAdapter``s.
MAX_GROWTH = 2.0
#: approximate size in bytes of the Python objects that the change of one layer consists of
BYTES_PER_CHANGE = 1 << 10

#: the source of the numbers ``ResidentAdapter.uid``
_UIDS = itertools.count()


@dataclass(frozen=True, eq=False, slots=True)
class ResolvedLowRank:
    """The change of a layer that is a matrix product: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias.

    Fields:
        A: [r, in].
        B: [r, out], already multiplied by the scale and the gain.
        gain: [out], a factor for each row of W; None stands for 1.
        bias: [out], which replaces the layer's bias; None keeps the layer's bias.
        layer: the layer kind of the module (``layers/``).
        name: the name of W in the module.
        dims: how the layer kind unfolds W into a matrix.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layer: Any
    name: str
    dims: Dims

    submodule_adapters = {}
    submodule_adapters_by_method = {}
    storage = BASES["plain"]
    # calls without batched products (under autocast, or with gradients) run the layer's own forward
    # with the changed weight of ``changed_weights``
    run = run_on_view

    @property
    def changes(self) -> dict[str, ResolvedLowRank]:
        return {self.name: self}

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        yield id(self)

    def adapters_read_by(self, method: str) -> Mapping[ModulePath, Any]:
        return {}

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}

    def stacks(self, module: nn.Module) -> None:
        """As ``LayerAdapter.stacks``, but returns None, because a linear layer has no stack of
        matrices."""

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """As ``LayerAdapter.changed_weights``."""
        weight: Any = weight_of(module, self.name)
        dense = weight.to(at_least_float32(weight.dtype))
        if self.gain is not None:
            dense = dense * self.layer.spread(self.gain.to(dense.dtype), self.dims, dense.shape)
        delta = LowRank(self.A[None], self.B.mT[None], 1.0).delta(dense.dtype)
        dense = dense + self.layer.fold(delta, dense.shape)
        return {self.name: dense if wide else dense.to(weight.dtype)}


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter in memory.

    Fields:
        path: the adapter folder.
        variant: the name of the adapter's variant.
        layer_changes: {key of a layer: what runs instead of its forward}.
        nbytes: bytes of the tensors and the Python objects.
        rank: the largest rank of its ``ResolvedLowRank``, 0 if it has none.
        unresolved_keys: keys of the layers whose change is no ``ResolvedLowRank``.
        invocation_tokens: the invocation tokens of its config.
        uid: a number that no other ``ResidentAdapter`` of the process has.
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
    """A low estimate of the bytes of an adapter in memory: half the size of its file, because the
    factors of a float32 file are stored in 16 bits if the base is in 16 bits."""
    file = path / peft.TENSORS
    return file.stat().st_size // 2 if file.is_file() else 0


@torch.inference_mode(False)  # later calls use the tensors, also outside of inference mode
def load_resident(
    model: nn.Module,
    path: Path,
    *,
    dtype: torch.dtype | None,
    verify_base: bool,
    cache: MatchCache,
    resolve_plans: ResolvePlans,
) -> ResidentAdapter:
    """Verify an adapter folder against a model, and load the adapter. The modules that it changes
    get an adapted class.

    Args:
        dtype: dtype of the factors; None takes the dtype of each weight.
        cache: results of verifying earlier adapters against this model; new results are added.
        resolve_plans: how the changes of earlier adapters were turned into ``ResolvedLowRank``.
            These plans are reused for an adapter that changes the same weights in the same way. A
            new plan is added if all changes of the adapter become ``ResolvedLowRank``.

    Raises:
        AdapterError, BaseMismatchError: as for ``veneer.load``.
        SelectionError: an adapter is merged into the model's weights, which therefore differ from
            the weights of the base.
    """
    attached = adapters_of(model)
    if attached is not None and attached.merged is not None:
        raise SelectionError(
            f"{attached.merged!r} merged into the weights, while an adapter is loaded",
            "an unmerged model",
            "call veneer.unmerge(model) first",
        )
    load_plan, names = match(model, path, [], verify_base=verify_base, cache=cache), cache.names
    config, low_rank_plans = load_plan.adapter_files.config, load_plan.plans.low_rank_plans
    # ``cache`` keeps the tuple ``low_rank_plans``, so no other object gets its id
    resolve_plan = resolve_plans.get(id(low_rank_plans))
    if resolve_plan is not None and not load_plan.full and resolve_plan.config == config:
        layer_changes = resolve_plan.resolve(load_plan.adapter_parameters, dtype)
        return _make_resident(path, config, layer_changes, [], len(layer_changes))
    layer_adapters = build_layer_adapters(
        names, load_plan.plans, trainable=False, parameters=load_plan.adapter_parameters
    )
    load_plan.fill(layer_adapters)
    table = adapt_modules(names, layer_adapters)
    changes_by_adapter_id, unresolved = _split_adapters(names, layer_adapters, dtype)
    layer_changes = {
        key: changes_by_adapter_id.get(id(layer_adapter), layer_adapter)
        for key, layer_adapter in table.items()
    }
    modules = [names.modules[entry.path] for entry in low_rank_plans]
    all_resolved = not (unresolved or load_plan.full or VARIANTS[config.variant].derived) and len(
        table
    ) == len(low_rank_plans)
    if all_resolved and all(map(_covers_weight, low_rank_plans, modules)):
        resolve_plans[id(low_rank_plans)] = ResolvePlan(config, low_rank_plans, modules)
    return _make_resident(path, config, layer_changes, unresolved, len(layer_adapters))


@torch.inference_mode(False)
def resident_of(
    model: nn.Module, path: Path, name: str, *, dtype: torch.dtype | None
) -> ResidentAdapter | None:
    """The adapter that ``load_resident`` would load from the folder ``path``. Its tensors are
    copied from the attached adapter ``name``, whose values must equal the folder's.

    Returns None if the change of some layer is no ``ResolvedLowRank``. Such a change would share
    its tensors with the attached adapter, so that further training of the attached adapter would
    change it."""
    attached = need_adapters(model, name)
    layer_adapters = {
        module_path: layer_adapter for module_path, _, layer_adapter in adapters(model, name)
    }
    changes_by_adapter_id, unresolved = _split_adapters(Names(model), layer_adapters, dtype)
    table = {
        key: entry.layer_adapter if isinstance(entry, InvokedAdapter) else entry
        for key, entry in attached.selections[name].usable_layer_adapters.items()
    }
    if unresolved or any(
        id(layer_adapter) not in changes_by_adapter_id for layer_adapter in table.values()
    ):
        return None
    layer_changes = {
        key: changes_by_adapter_id[id(layer_adapter)] for key, layer_adapter in table.items()
    }
    return _make_resident(path, attached.configs[name], layer_changes, [], len(layer_changes))


@dataclass(frozen=True, eq=False)
class ResolvePlan:
    """How to compute all ``ResolvedLowRank`` of an adapter. Another adapter that changes the same
    weights in the same way can be loaded by this plan, without building modules.

    Fields:
        config: the config that an adapter must have.
        low_rank_plans: the plan of each low-rank change.
        modules: for each of these, the module with the changed weight.
    """

    config: LoraConfig
    low_rank_plans: tuple[LowRankPlan, ...]
    modules: Sequence[nn.Module]

    @torch.no_grad()
    def resolve(
        self, parameters: Mapping[ParamRef, Mapping[str, Tensor]], dtype: torch.dtype | None
    ) -> dict[Any, ResolvedLowRank]:
        """{key of a layer: its ``ResolvedLowRank``} for the adapter parameters of each weight.
        ``dtype``: dtype of the factors; None takes the dtype of each weight."""
        variant = VARIANTS[self.config.variant]
        resolved = []
        for entry, module in throttle(zip(self.low_rank_plans, self.modules, strict=True)):
            weight: Any = weight_of(module, entry.weight)
            parameter_dtype = trained_dtype(self.config, weight.dtype)
            weight_parameters = {
                name: value.to(weight.device, parameter_dtype)
                for name, value in parameters[entry.ref].items()
            }
            low_rank, gain = variant.resolve(
                weight_parameters,
                variant.scale(entry.alpha, entry.rank),
                lambda entry=entry, weight=weight: entry.layer.unfold(
                    entry.storage.dense(weight), entry.dims
                ),
            )
            factor_dtype = weight.dtype if dtype is None else dtype
            resolved.append(
                (module, entry.dims, [*_flatten_factors(low_rank, gain, factor_dtype), None])
            )
        resolved_changes = _join_in_memory(resolved)
        layer_states: list[Any] = [state_of(module) for module in self.modules]
        return {
            layer_state.key: change
            for layer_state, change in zip(layer_states, resolved_changes, strict=True)
        }


#: by the id of ``LoadPlan.plans.low_rank_plans``, the tuple with the plans of an adapter's low-rank
#: changes
ResolvePlans = dict[int, ResolvePlan]


def _covers_weight(entry: LowRankPlan, module: nn.Module) -> bool:
    """Whether a change covers all outputs and inputs of its weight."""
    return entry.rows is entry.tokens is None and entry.layer.frozen_input(module) is None


def _make_resident(
    path: Path,
    config: LoraConfig,
    layer_changes: Mapping[Any, Any],
    unresolved: Sequence[LayerAdapter],
    change_count: int,
) -> ResidentAdapter:
    resolved = {
        key: change for key, change in layer_changes.items() if isinstance(change, ResolvedLowRank)
    }
    tensors = [
        tensor
        for change in resolved.values()
        for tensor in (change.A, change.B, change.gain, change.bias)
        if tensor is not None
    ]
    tensors += [
        tensor
        for layer_adapter in unresolved
        for tensor in (*layer_adapter.parameters(), *layer_adapter.buffers())
    ]
    size = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
    rank = max((len(change.A) for change in resolved.values()), default=0)
    return ResidentAdapter(
        path,
        config.variant,
        layer_changes,
        size + BYTES_PER_CHANGE * change_count,
        rank,
        frozenset(layer_changes.keys() - resolved.keys()),
        tuple(config.invocation_tokens),
    )


def _split_adapters(
    names: Names, layer_adapters: Mapping[str, LayerAdapter], dtype: torch.dtype | None
) -> tuple[dict[int, ResolvedLowRank], list[LayerAdapter]]:
    """Resolve the layer adapters that can be a ``ResolvedLowRank``. Returns (each
    ``ResolvedLowRank`` by the id of its layer adapter, the layer adapters that could not be
    resolved)."""
    resolved: list[tuple[nn.Module, Dims, list[Tensor | None]]] = []
    resolved_ids, unresolved = [], []
    nested_ids = {
        id(nested)
        for layer_adapter in layer_adapters.values()
        for table in (
            layer_adapter.submodule_adapters,
            *layer_adapter.submodule_adapters_by_method.values(),
        )
        for nested in table.values()
    }
    for path, layer_adapter in layer_adapters.items():
        module = names.modules[path]
        tensors = (
            None
            if id(layer_adapter) in nested_ids
            else _resolve_adapter(layer_adapter, module, dtype)
        )
        if tensors is None:
            unresolved.append(layer_adapter)
        else:
            (change,) = layer_adapter.changes.values()
            resolved_ids.append(id(layer_adapter))
            resolved.append((module, change.dims, tensors))
    return dict(zip(resolved_ids, _join_in_memory(resolved), strict=True)), unresolved


def _join_in_memory(
    resolved: Sequence[tuple[nn.Module, Dims, Sequence[Tensor | None]]],
) -> list[ResolvedLowRank]:
    """A ``ResolvedLowRank`` for each (module, dims, [A, B, gain, bias]), with copies of the tensors
    in one block of memory."""
    copies = _copy_to_one_block(
        [value for *_, tensors in resolved for value in tensors if value is not None]
    )
    changes = []
    for module, dims, tensors in throttle(resolved):
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
    """[A, B, gain, bias] of a layer adapter that adds one matrix product and perhaps a bias; None
    for any other layer adapter."""
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
    kind: Any = layer_state.layer
    if (change.is_transposed_in(kind) and gain is not None) or len(low_rank.A) > 1:
        return None
    parameters, derived = change.adapter_parameters, change.variant.derived
    parameter_count = sum(value.numel() for key, value in parameters.items() if key not in derived)
    if low_rank.A.numel() + low_rank.B.numel() > MAX_GROWTH * parameter_count:
        return None
    factor_dtype: torch.dtype = weight.dtype if dtype is None else dtype
    bias = layer_adapter.full._parameters.get("bias")
    return [
        *_flatten_factors(change.as_read_by(kind, low_rank), gain, factor_dtype),
        None if bias is None else bias.to(factor_dtype),
    ]


def _flatten_factors(
    low_rank: LowRank, gain: Tensor | None, dtype: torch.dtype
) -> list[Tensor | None]:
    """[A, B, gain] in the form of a ``ResolvedLowRank``: B is transposed and multiplied by the
    scale and the gain."""
    if gain is not None:
        low_rank = low_rank.scale_rows(gain.view(1, -1))
    B = (low_rank.B[0].to(at_least_float32(low_rank.B.dtype)) * low_rank.scale).mT
    return [
        factor if factor is None else factor.detach().to(dtype)
        for factor in (low_rank.A[0], B, gain)
    ]


def _copy_to_one_block(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies of tensors. All copies of one dtype and device lie in one block of memory, each
    aligned to 64 bytes."""
    block_sizes: dict[Any, int] = {}  # in values, by (dtype, device)
    offsets = []
    for tensor in tensors:
        block, alignment = (tensor.dtype, tensor.device), 64 // tensor.element_size()
        offsets.append((block, block_sizes.get(block, 0)))
        padded_size = -(-tensor.numel() // alignment) * alignment
        block_sizes[block] = offsets[-1][1] + padded_size
    blocks = {
        (dtype, device): torch.empty(size, dtype=dtype, device=device)
        for (dtype, device), size in block_sizes.items()
    }
    for tensor, (block, start) in zip(tensors, offsets, strict=True):
        yield blocks[block][start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
