"""An adapter in memory, in the form that a bank's calls need.

    parts       what runs instead of a layer's forward, by the key of the layer's ``LayerState``
        ResolvedLowRank     for a linear layer: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias
        LayerAdapter        for any other change

The tensors of all ``ResolvedLowRank`` of an adapter are views of one block of memory in the dtype
of the base, which is freed at once. DoRA's gain and PiSSA's products are computed once, when the
adapter is loaded, because neither the base nor the adapter changes afterwards.
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

#: the largest ratio of the resolved factors' size to the adapter parameters' size: a variant that
#: trains few values at a large rank stays a ``LayerAdapter``
SWELL = 2.0
#: approximate bytes of the Python objects of one part
OVERHEAD = 1 << 10

_COUNT = itertools.count()


@dataclass(frozen=True, eq=False, slots=True)
class ResolvedLowRank:
    """The change of a layer that is a matrix product: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias.

    Fields:
        A, B: [r, in] and [r, out]; B is multiplied by the scale and the gain.
        gain: [out], for the rows of W; None for 1.
        bias: [out], which replaces the layer's bias; None keeps that.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layer: Any
    name: str
    dims: Dims

    read_below = {}
    read_below_by_method = {}
    storage = BASES["plain"]
    # for calls without batched products (under autocast, with gradients): runs the layer on W + ΔW
    run = run_on_view

    @property
    def changes(self) -> dict[str, ResolvedLowRank]:
        return {self.name: self}

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        yield id(self)

    def below(self, method: str) -> Mapping[ModulePath, Any]:
        return {}

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}

    def stacks(self, module: nn.Module) -> None:
        """As ``LayerAdapter.stacks``: nothing to do for a layer with one matrix."""

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
    """An adapter in memory. ``uid``: never used again; ``parts``: the table of its
    ``ActiveAdapter``; ``nbytes``: bytes of tensors and Python objects; ``rank``: the largest one;
    ``general``: keys of the parts that are not ``ResolvedLowRank``; ``invocation_tokens``: those of
    its config."""

    path: Path
    variant: str
    parts: Mapping[Any, Any]
    nbytes: int
    rank: int
    general: frozenset[Any]
    invocation_tokens: tuple[int, ...] = ()
    uid: int = field(default_factory=_COUNT.__next__)


def expected_bytes(path: Path) -> int:
    """A lower estimate of the bytes of an adapter in memory: half of its file, since a 16-bit base
    stores a float32 adapter in half the bytes."""
    file = path / peft.TENSORS
    return file.stat().st_size // 2 if file.is_file() else 0


@torch.inference_mode(False)  # these tensors are used by calls in any mode
def load_resident(
    model: nn.Module,
    path: Path,
    *,
    dtype: torch.dtype | None,
    verify_base: bool,
    cache: MatchCache,
    recipes: Recipes,
) -> ResidentAdapter:
    """Verify an adapter folder against a model and build its parts. The modules that they change
    get an adapted class.

    Args:
        dtype: dtype of the factors; None takes that of each weight.
        cache, recipes: results for this model and for earlier adapters; new results are added.

    Raises:
        AdapterError, BaseMismatchError: as ``veneer.load``.
        SelectionError: an adapter is merged into the weights, so they are not the base's.
    """
    attached = adapters_of(model)
    if attached is not None and attached.merged is not None:
        problem = f"{attached.merged!r} merged into the weights, while an adapter is loaded"
        raise SelectionError(problem, "an unmerged model", "call veneer.unmerge(model) first")
    load_plan, names = match(model, path, [], verify_base=verify_base, cache=cache), cache.names
    config, low = load_plan.saved.config, load_plan.plans.low
    recipe = recipes.get(id(low))  # ``cache`` holds this very tuple, so its id is unique
    if recipe is not None and not load_plan.full and recipe.config == config:
        tables = recipe.table(load_plan.adapter_parameters, dtype)
        return _resident(path, config, tables, [], len(tables))
    layer_adapters = build_layer_adapters(
        names, load_plan.plans, trainable=False, parameters=load_plan.adapter_parameters
    )
    load_plan.fill(layer_adapters)
    table = adapt_modules(names, load_plan.plans, layer_adapters)
    resolved_low, general = _split_adapters(names, layer_adapters, dtype)
    tables = {
        key: resolved_low.get(id(layer_adapter), layer_adapter)
        for key, layer_adapter in table.items()
    }
    modules = [names.modules[entry.path] for entry in low]
    plain = not (general or load_plan.full or VARIANTS[config.variant].derived) and len(
        table
    ) == len(low)
    if plain and all(map(_ordinary, low, modules)):
        recipes[id(low)] = Recipe(config, low, modules)
    return _resident(path, config, tables, general, len(layer_adapters))


@torch.inference_mode(False)
def resident_of(
    model: nn.Module, path: Path, name: str, *, dtype: torch.dtype | None
) -> ResidentAdapter | None:
    """As ``load_resident`` of a folder whose values equal those of the attached adapter ``name``:
    the tensors are copied from that adapter. None if a part is no ``ResolvedLowRank``, because such
    a part would follow further training."""
    attached = need_adapters(model, name)
    layer_adapters = {
        module_path: layer_adapter for module_path, _, layer_adapter in adapters(model, name)
    }
    resolved_low, general = _split_adapters(Names(model), layer_adapters, dtype)
    table = {
        key: entry.layer_adapter if isinstance(entry, InvokedAdapter) else entry
        for key, entry in attached.selections[name].usable_layer_adapters.items()
    }
    if general or any(id(layer_adapter) not in resolved_low for layer_adapter in table.values()):
        return None
    tables = {key: resolved_low[id(layer_adapter)] for key, layer_adapter in table.items()}
    return _resident(path, attached.configs[name], tables, [], len(tables))


@dataclass(frozen=True, eq=False)
class Recipe:
    """The plan of an adapter whose parts are all ``ResolvedLowRank``. Another adapter with the same
    plan can be loaded without building modules."""

    config: LoraConfig
    low: tuple[LowRankPlan, ...]
    modules: Sequence[nn.Module]

    @torch.no_grad()
    def table(
        self, parameters: Mapping[ParamRef, Mapping[str, Tensor]], dtype: torch.dtype | None
    ) -> dict[Any, ResolvedLowRank]:
        variant = VARIANTS[self.config.variant]
        resolved = []
        for entry, module in throttle(zip(self.low, self.modules, strict=True)):
            weight: Any = weight_of(module, entry.weight)
            trained = trained_dtype(self.config, weight.dtype)
            trained_values = {
                name: value.to(weight.device, trained)
                for name, value in parameters[entry.ref].items()
            }
            low, gain = variant.resolve(
                trained_values,
                variant.scale(entry.alpha, entry.rank),
                lambda e=entry, w=weight: e.layer.unfold(e.storage.dense(w), e.dims),
            )
            wanted = weight.dtype if dtype is None else dtype
            resolved.append((module, entry.dims, [*_flatten_factors(low, gain, wanted), None]))
        resolved_low = _in_one_block(resolved)
        layer_states: list[Any] = [state_of(module) for module in self.modules]
        return {
            layer_state.key: change
            for layer_state, change in zip(layer_states, resolved_low, strict=True)
        }


#: by the id of ``LoadPlan.plans.low``
Recipes = dict[int, Recipe]


def _ordinary(entry: LowRankPlan, module: nn.Module) -> bool:
    """Whether a change covers all outputs and inputs of its weight, and the weight has the layout
    of its layer kind."""
    layer_state = state_of(module)
    lies = layer_state is not None and not layer_state.transposed
    return lies and entry.rows is entry.tokens is None and entry.layer.frozen_input(module) is None


def _resident(
    path: Path,
    config: LoraConfig,
    tables: Mapping[Any, Any],
    general: Sequence[LayerAdapter],
    part_count: int,
) -> ResidentAdapter:
    low = {key: change for key, change in tables.items() if isinstance(change, ResolvedLowRank)}
    tensors = [
        value
        for change in low.values()
        for value in (change.A, change.B, change.gain, change.bias)
        if value is not None
    ]
    tensors += [
        value
        for layer_adapter in general
        for value in (*layer_adapter.parameters(), *layer_adapter.buffers())
    ]
    size = sum(value.nbytes for value in {id(value): value for value in tensors}.values())
    rank = max((len(change.A) for change in low.values()), default=0)
    return ResidentAdapter(
        path,
        config.variant,
        tables,
        size + OVERHEAD * part_count,
        rank,
        frozenset(tables.keys() - low.keys()),
        tuple(config.invocation_tokens),
    )


def _split_adapters(
    names: Names, layer_adapters: Mapping[str, LayerAdapter], dtype: torch.dtype | None
) -> tuple[dict[int, ResolvedLowRank], list[LayerAdapter]]:
    """Resolve the layer adapters that can be a ``ResolvedLowRank``. Returns these by the id of the
    layer adapter, and the other layer adapters."""
    resolved: list[tuple[nn.Module, Dims, list[Tensor | None]]] = []
    split, general = [], []
    below = {
        id(nested)
        for layer_adapter in layer_adapters.values()
        for table in (layer_adapter.read_below, *layer_adapter.read_below_by_method.values())
        for nested in table.values()
    }
    for path, layer_adapter in layer_adapters.items():
        module = names.modules[path]
        tensors = (
            None if id(layer_adapter) in below else _resolve_adapter(layer_adapter, module, dtype)
        )
        if tensors is None:
            general.append(layer_adapter)
        else:
            (change,) = layer_adapter.changes.values()
            split.append(id(layer_adapter))
            resolved.append((module, change.dims, tensors))
    return dict(zip(split, _in_one_block(resolved), strict=True)), general


def _in_one_block(
    resolved: Sequence[tuple[nn.Module, Dims, Sequence[Tensor | None]]],
) -> list[ResolvedLowRank]:
    """A ``ResolvedLowRank`` for each (module, dims, [A, B, gain, bias]), with copies of the tensors
    in one block of memory."""
    flat = _copy_together(
        [value for *_, tensors in resolved for value in tensors if value is not None]
    )
    changes = []
    for module, dims, tensors in throttle(resolved):
        A, B, gain, bias = cast(Any, [None if value is None else next(flat) for value in tensors])
        layer_state: Any = state_of(module)
        changes.append(
            ResolvedLowRank(A, B, gain, bias, layer_state.layer, layer_state.layer.weight, dims)
        )
    return changes


@torch.no_grad()
def _resolve_adapter(
    layer_adapter: LayerAdapter, module: nn.Module, dtype: torch.dtype | None
) -> list[Tensor | None] | None:
    """[A, B, gain, bias] of a layer adapter that is one product and perhaps a bias; None for any
    other."""
    layer_state = state_of(module)
    plain = (
        layer_state is not None and layer_state.is_plain_product and len(layer_adapter.changes) == 1
    )
    if (
        not plain
        or layer_adapter.read_below
        or layer_adapter.read_below_by_method
        or layer_adapter.full._buffers
        or layer_adapter.full._parameters.keys() - {"bias"}
    ):
        return None
    ((name, change),) = layer_adapter.changes.items()
    weight: Any = weight_of(module, name)
    if layer_adapter.full._parameters and module._parameters["bias"] is None:
        return None
    low, gain = change.resolve(weight)
    if (layer_state.transposed and gain is not None) or len(low.A) > 1:
        return None
    parameters, derived = change.adapter_parameters, change.variant.derived
    trained = sum(value.numel() for key, value in parameters.items() if key not in derived)
    if low.A.numel() + low.B.numel() > SWELL * trained:
        return None
    wanted: torch.dtype = weight.dtype if dtype is None else dtype
    bias = layer_adapter.full._parameters.get("bias")
    return [
        *_flatten_factors(low.T if layer_state.transposed else low, gain, wanted),
        None if bias is None else bias.to(wanted),
    ]


def _flatten_factors(low: LowRank, gain: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    """[A, B, gain] in the form of a ``ResolvedLowRank``."""
    if gain is not None:
        low = low.scale_rows(gain.view(1, -1))
    B = (low.B[0].to(at_least_float32(low.B.dtype)) * low.scale).mT
    return [
        factor if factor is None else factor.detach().to(dtype) for factor in (low.A[0], B, gain)
    ]


def _copy_together(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies of tensors, consecutive in one block of memory for each dtype and device, each aligned
    to 64 bytes."""
    starts: dict[Any, int] = {}
    offsets = []
    for value in values:
        kind, step = (value.dtype, value.device), 64 // value.element_size()
        offsets.append((kind, starts.get(kind, 0)))
        starts[kind] = offsets[-1][1] + -(-value.numel() // step) * step
    blocks = {
        kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in starts.items()
    }
    for value, (kind, start) in zip(values, offsets, strict=True):
        yield blocks[kind][start : start + value.numel()].view(value.shape).copy_(value)
