"""An adapter in memory: what it does at each layer, without the model's knowing it.

    parts       what runs in the place of a layer's forward: by the key of its ``LayerState``
        ResolvedLowRank     a linear layer's change, resolved once: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias
        LayerAdapter        everything else there is

A ``ResolvedLowRank`` is a few views of one block of memory that holds all factors of the adapter in
the dtype of the base, and gives it back at once. What is resolved here (the gain of DoRA, the
products of PiSSA) is not resolved again in every call: the base is frozen, and nothing trains here.
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
    CHANGING,
    LayerAdapter,
    LowRankPlan,
    ModulePath,
    Names,
    ParamRef,
    adapt_modules,
    adapters,
    adapters_of,
    build_layer_adapters,
    ensure_adapters,
    need_adapters,
    run_on_view,
    state_of,
    trained_dtype,
    weight_of,
)
from veneer.bases import BASES
from veneer.config import LoraConfig
from veneer.errors import SelectionError
from veneer.fileio.throttle import throttle
from veneer.formats import peft
from veneer.layers import Dims
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS

# : how much larger than the adapter parameters the factors that they resolve to may be: a variant
# that trains little for
#: a large rank stays as it is
SWELL = 2.0
#: bytes that Python takes for a part besides its tensors, about
OVERHEAD = 1 << 10

_COUNT = itertools.count()


@dataclass(frozen=True, eq=False, slots=True)
class ResolvedLowRank:
    """What an adapter does at a layer that is a matrix product: gain ⊙ (x Wᵀ) + (x Aᵀ) B + bias.

    Fields:
        A, B: [r, in] and [r, out]; B holds the scale, and the gain too.
        gain: [out] of rows of W, None for 1.
        bias: [out] in place of the layer's own, None for that.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layer: Any
    name: str
    dims: Dims

    read_below = {}
    entries = {}
    storage = BASES["plain"]
    run = run_on_view  # for calls that the batched products are not for (autocast, gradients): on W + ΔW, formed

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
        """As ``LayerAdapter.stacks``: this is a layer of one matrix."""

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
    """An adapter in memory. ``uid`` is never used again; ``parts`` is a table as ``ActiveAdapter``
    has it. ``nbytes`` counts tensors and Python's parts, ``rank`` is the largest, ``general`` are
    the keys of what is no ``ResolvedLowRank``."""

    path: Path
    variant: str
    parts: Mapping[Any, Any]
    nbytes: int
    rank: int
    general: frozenset[Any]
    uid: int = field(default_factory=_COUNT.__next__)


def expected_bytes(path: Path) -> int:
    """Bytes that an adapter will take at least about: those of its file, of which a 16-bit base
    keeps half."""
    file = path / peft.TENSORS
    return file.stat().st_size // 2 if file.is_file() else 0


@torch.inference_mode(False)  # calls of any mode use what is made here
def load_resident(
    model: nn.Module,
    path: Path,
    *,
    dtype: torch.dtype | None,
    verify_base: bool,
    cache: MatchCache,
    recipes: Recipes,
) -> ResidentAdapter:
    """Verify an adapter folder against a model and make its parts; the modules that they are for
    become adapted.

    Args:
        dtype: of the factors; None takes that of each weight.
        cache, recipes: what is known of the model and of such adapters already; what is found out
            is added.

    Raises:
        AdapterError, BaseMismatchError: as ``veneer.load``.
        SelectionError: an adapter is merged into the weights, which are not the base's then.
    """
    attached = adapters_of(model)
    if attached is not None and attached.merged is not None:
        problem = f"{attached.merged!r} merged into the weights, while an adapter is loaded"
        raise SelectionError(problem, "an unmerged model", "call veneer.unmerge(model) first")
    load_plan, names = match(model, path, [], verify_base=verify_base, cache=cache), cache.names
    config, low = load_plan.saved.config, load_plan.plans.low
    recipe = recipes.get(id(low))  # that very tuple is kept in ``cache``
    if recipe is not None and not load_plan.full and recipe.config == config:
        tables = recipe.table(load_plan.adapter_parameters, dtype)
        return _resident(path, config.variant, tables, [], len(tables))
    layer_adapters = build_layer_adapters(
        names, load_plan.plans, trainable=False, parameters=load_plan.adapter_parameters
    )
    load_plan.fill(layer_adapters)
    with CHANGING:
        table = adapt_modules(names, ensure_adapters(model), load_plan.plans, layer_adapters)
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
    return _resident(path, config.variant, tables, general, len(layer_adapters))


@torch.inference_mode(False)
def resident_of(
    model: nn.Module, path: Path, name: str, *, dtype: torch.dtype | None
) -> ResidentAdapter | None:
    """What ``load_resident`` makes of an adapter folder whose numbers the model's own adapter
    ``name`` has: copied from there. None where a part is no ``ResolvedLowRank``, which would go on
    to follow what trains."""
    attached = need_adapters(model, name)
    layer_adapters = {
        module_path: layer_adapter for module_path, _, layer_adapter in adapters(model, name)
    }
    resolved_low, general = _split_adapters(Names(model), layer_adapters, dtype)
    table = attached.selections[name].table
    if general or any(id(layer_adapter) not in resolved_low for layer_adapter in table.values()):
        return None
    tables = {key: resolved_low[id(layer_adapter)] for key, layer_adapter in table.items()}
    return _resident(path, attached.configs[name].variant, tables, [], len(tables))


@dataclass(frozen=True, eq=False)
class Recipe:
    """An adapter that was all ``ResolvedLowRank``: another of the same plan needs no modules made
    for training."""

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
                trained_values, variant.scale(entry.alpha, entry.rank),
                lambda e=entry, w=weight: e.layer.unfold(e.storage.dense(w), e.dims),
            )  # fmt: skip
            wanted = weight.dtype if dtype is None else dtype
            resolved.append((module, entry.dims, [*_flatten_factors(low, gain, wanted), None]))
        resolved_low = _in_one_block(resolved)
        layer_states: list[Any] = [state_of(module) for module in self.modules]
        return {
            layer_state.key: change
            for layer_state, change in zip(layer_states, resolved_low, strict=True)
        }


#: by the identity of a plan
Recipes = dict[int, Recipe]


def _ordinary(entry: LowRankPlan, module: nn.Module) -> bool:
    """Whether a change is of all outputs and inputs of its weight, which lies as its layer has
    it."""
    layer_state = state_of(module)
    lies = layer_state is not None and not layer_state.transposed
    return lies and entry.rows is entry.tokens is None and entry.layer.frozen_input(module) is None


def _resident(
    path: Path,
    variant: str,
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
        variant,
        tables,
        size + OVERHEAD * part_count,
        rank,
        frozenset(tables.keys() - low.keys()),
    )


def _split_adapters(
    names: Names, layer_adapters: Mapping[str, LayerAdapter], dtype: torch.dtype | None
) -> tuple[dict[int, ResolvedLowRank], list[LayerAdapter]]:
    """The ``ResolvedLowRank`` parts by the identity of what they were made of, and the parts that
    stay."""
    resolved: list[tuple[nn.Module, Dims, list[Tensor | None]]] = []
    split, general = [], []
    below = {
        id(nested)
        for layer_adapter in layer_adapters.values()
        for table in (layer_adapter.read_below, *layer_adapter.entries.values())
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
    """The parts of modules with these dims and [A, B, gain, bias], whose tensors lie together."""
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
    """[A, B, gain, bias] of a part that is one product and perhaps a bias, or None for any other
    part."""
    layer_state = state_of(module)
    plain = layer_state is not None and layer_state.product and len(layer_adapter.changes) == 1
    if (
        not plain
        or layer_adapter.read_below
        or layer_adapter.entries
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
    """[A, B, gain] as a ``ResolvedLowRank`` has them."""
    if gain is not None:
        low = low.scale_rows(gain.view(1, -1))
    B = (low.B[0].to(at_least_float32(low.B.dtype)) * low.scale).mT
    return [
        factor if factor is None else factor.detach().to(dtype) for factor in (low.A[0], B, gain)
    ]


def _copy_together(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies, one after the other in one block of memory a dtype and device, each at a multiple of
    64 bytes."""
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
