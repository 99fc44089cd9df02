"""Put planned adapters into a model, and take them out again.

install(model, name, plans)     makes all adapter parameters first, then puts them into the layers
build, place                    the two halves of it, for who keeps the parts outside of the model (a bank)
detach(model)                   gives back the very model: classes, modules, parameters, ``requires_grad``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import (
    enter,
    layer_states,
    own_class,
    set_child,
    state_of,
    uninstall,
    walk,
    weight_of,
)
from veneer.attach.adapted_module import install as make_adapted
from veneer.attach.change import Change
from veneer.attach.dtypes import at_least_float32
from veneer.attach.first_step import watch_first_step
from veneer.attach.fused_linear import Together
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import adapters_of, need_adapters, parameter_path, unwrap
from veneer.attach.method_overrides import take_back
from veneer.attach.plan import LowRankPlan, Plans
from veneer.attach.refusals import kind_for, name_problems
from veneer.attach.source_analysis import same_input
from veneer.attach.state import ADAPTERS, ActiveAdapter, LayerState, ModelAdapters, in_turn
from veneer.attach.targets import Names, ParamRef
from veneer.attach.token_rows import ROWS, start
from veneer.attach.weight_readers import bound, switched, switches
from veneer.attach.weight_tying import tie_again
from veneer.bases import BASES, storage_of, without_gradient
from veneer.config import LoraConfig, torch_dtype
from veneer.distributed import whole
from veneer.errors import MergeError, TargetError, raise_all
from veneer.layers import kind_of
from veneer.layers._base import factors
from veneer.variants import VARIANTS, InitContext

Calibration = Callable[[LowRankPlan], Mapping[str, Callable[[], Tensor]]]


@in_turn
@torch.inference_mode(False)  # the parameters can be trained later, wherever this is called
def install(
    model: nn.Module,
    name: str,
    plans: Plans,
    *,
    trainable: bool = True,
    parameters: Mapping[ParamRef, Mapping[str, Tensor]] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Put a planned adapter in place and freeze the base. All memory is allocated before the model
    is touched. ``parameters``: the adapter parameters of each weight; made anew without.
    ``calibration``: what a variant may look at of one weight besides the weight itself, by name."""
    problems = list(name_problems(model, name))  # another thread may have been faster
    raise_all(TargetError, "Nothing was attached", problems)
    names = Names(model)
    parts = build(names, plans, trainable=trainable, parameters=parameters, calibration=calibration)
    attached = enlist(model)
    selected = place(names, attached, plans, parts)
    for path, part in parts.items():
        layer_state: Any = state_of(names.modules[path])
        set_child(layer_state, name, part)
    attached.set_adapters(
        {**attached.configs, name: plans.config},
        {**attached.selections, name: ActiveAdapter(name, selected, on=attached.merged)},
    )
    watch_first_step(
        model, name, (parameter for part in parts.values() for parameter in part.parameters())
    )


def build(
    names: Names,
    plans: Plans,
    *,
    trainable: bool,
    parameters: Mapping[ParamRef, Mapping[str, Tensor]] | None = None,
    calibration: Calibration | None = None,
) -> dict[str, LayerAdapter]:
    """The parts of a planned adapter by the path of their module. The model does not know them yet.
    ``TargetError``: a variant cannot start from these weights."""
    modules, given = names.modules, parameters or {}
    for entry in plans.low:
        entry.storage.prepare(modules[entry.path])
    problems: list[str] = []
    parts: defaultdict[str, LayerAdapter] = defaultdict(LayerAdapter)
    for entry in plans.low:
        try:
            change = make_change(
                entry, modules, plans.config, given.get(entry.ref, {}), calibration
            )
        except _BadStartError as error:
            problems.append(str(error))
            continue
        parts[entry.path].low._modules[entry.weight] = change
        for path, weight in entry.holders:
            parts[path].changes[weight] = change
    for entry in plans.low if problems else ():
        if state_of(modules[entry.path]) is None:
            entry.storage.release(modules[entry.path])
    raise_all(TargetError, "Nothing was attached", problems)
    _copy_full(parts, modules, plans)
    # who reads past a weight's holder is told of its part, and each module with a fused fast path
    # has one
    readers = [reader for entry in plans.low for reader in entry.weight_readers]
    for reader in (*readers, *plans.full_readers):
        below = parts[names.canonical[".".join((reader.path, *reader.below)).strip(".")]]
        part = parts[reader.path]
        if reader.method == "forward":
            part.read_below[reader.below] = below
        else:
            part.entries.setdefault(reader.method, {})[reader.below] = below
    for path in list(parts):
        for above in switched(names, path):
            parts[above]  # makes it
    for path, module in modules.items():
        if without_gradient(module):
            parts[path]  # for what is below
    for path, part in parts.items():
        part.requires_grad_(trainable).train(modules[path].training)
    return {path: parts[path] for path in modules if path in parts}


def _copy_full(
    parts: defaultdict[str, LayerAdapter], modules: Mapping[str, nn.Module], plans: Plans
) -> None:
    """Give the parts copies of what is trained in full; tied parameters have one, but for those in
    ``apart``. A frozen base keeps its running statistics too: what training would move becomes a
    copy that the adapter owns."""
    plain = {
        path: module
        for path, module in modules.items()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    moving = {
        path: ()
        for path, module in plain.items()
        if module._buffers.get("running_mean") is not None
    }
    copies: dict[Any, nn.Parameter] = {}
    for path, parameters in {**moving, **plans.full}.items():
        full, module = parts[path].full, modules[path]
        # in the module's order, wherever the names come from: an optimiser's state goes by the
        # order of parameters
        for name, held in module._parameters.items():
            if name not in parameters:
                continue
            own: Any = _no_bias(module) if held is None else held
            key: Any = (path, name) if held is None or (path, name) in plans.apart else id(held)
            if key not in copies:
                copies[key] = nn.Parameter(
                    whole(own.detach()).to(trained_dtype(plans.config, own.dtype), copy=True)
                )
            full.register_parameter(name, copies[key])
        for name, own in module._buffers.items() if path in plans.whole or path in moving else ():
            if own is not None and name not in module._non_persistent_buffers_set:
                full.register_buffer(name, own.detach().clone())


def _no_bias(module: nn.Module) -> Tensor:
    """The bias of a layer without one, which an adapter may have: zeros."""
    kind: Any = kind_of(module)
    weight: Any = weight_of(module, kind.weight)
    dims = kind.dims(module, weight.shape)
    return weight.detach().new_zeros(dims.groups * dims.out)


def enlist(model: nn.Module) -> ModelAdapters:
    """The ``ModelAdapters`` of a model; where it had none, a new one, and a frozen base."""
    attached = adapters_of(model)
    if attached is None:
        attached = ModelAdapters()
        attached.required_grad = {path: p.requires_grad for path, p in model.named_parameters()}
        model.__dict__[ADAPTERS] = attached
        attached.claim(model)
        for parameter in model.parameters():
            parameter.requires_grad = False  # the method refuses a parameter that has no shape yet
    return attached


def place(
    names: Names, attached: ModelAdapters, plans: Plans, parts: Mapping[str, LayerAdapter]
) -> dict[Any, LayerAdapter]:
    """Make the modules adapted; return the parts as ``ActiveAdapter`` has them. No layer state
    holds them yet."""
    modules = names.modules
    holders = [(entry, path) for entry in plans.low for path, _ in entry.holders]
    transposed = {
        p
        for entry, p in holders
        if kind_for(modules[p], entry.weight).out_axis != entry.layer.out_axis
    }
    selected: dict[Any, LayerAdapter] = {}
    for path, part in parts.items():
        module = modules[path]
        layer_state = state_of(module)
        if layer_state is None:
            kind = kind_of(module)
            storage = storage_of(weight_of(module, kind.weight)) if kind is not None else None
            trusted = storage.modules() if storage is not None else ()
            factored = kind is not None and factors(kind, module, type(module), trusted)
            product = factored and kind.product and storage is not None and storage.name == "plain"
            layer_state = LayerState(attached, kind, factored, switches(module), product)
            attached.paths[layer_state.key] = path
            layer_state.stock = kind is not None and own_class(module) in kind.types()
            layer_state.train(module.training)
            own = storage is not None and storage.opaque
            layer_state.opaque = BASES["opaque"] if own or without_gradient(module) else None
            make_adapted(module, layer_state)
            layer_state.bound = tuple(bound(module))
        layer_state.transposed = layer_state.transposed or path in transposed
        part.finalize(module, layer_state)
        enter(module, part.entries)
        selected.update(dict.fromkeys(part.keys(layer_state), part))
    share(names, parts)
    return selected


def share(names: Names, parts: Mapping[str, LayerAdapter]) -> None:
    for path, module in names.modules.items():
        for children in same_input(own_class(module)):
            by_size: defaultdict[Any, list[tuple[nn.Module, LayerAdapter]]] = defaultdict(list)
            for p in dict.fromkeys(
                names.canonical.get(parameter_path(path, child), "") for child in children
            ):
                part = parts.get(p) if p != path else None
                if part is not None and part.direct is not None and part.together is None:
                    change = part.direct.change
                    by_size[change.dims.in_, change.dropout].append((names.modules[p], part))
            for members in by_size.values():
                together = Together(members) if len(members) > 1 else None
                for _, part in members:
                    part.together = together


class _BadStartError(TargetError):
    """Numbers from which a variant starts are not finite, or too near to that for linear
    algebra."""


def _starting(entry: LowRankPlan, variant: str, what: str, read: Callable[[], Tensor]) -> Tensor:
    """What is read, if a variant can start from it."""
    values = read()
    if values.is_meta or values.isfinite().all():
        return values
    problem = f"the {'weight' if what == 'base' else f'{what} of'} {entry.where!r}"
    do = (
        "repair the base or the data, exclude the layer, or use a variant that starts from neither,"
        " such as lora"
    )
    raise _BadStartError(
        f"{problem} with NaN or infinity",
        f"finite numbers, from which variant {variant!r} starts",
        do,
    )


def make_change(
    entry: LowRankPlan,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    given: Mapping[str, Tensor],
    calibration: Calibration | None,
) -> Change:
    """The change of one weight, with its parameters on its device: those that are given, or their
    start."""
    module = modules[entry.path]
    weight = weight_of(module, entry.weight)
    own = {name: value for name, value in given.items() if name != ROWS}
    parameters = _variant_parameters(entry, weight, config, own, calibration) if entry.rank else {}
    tokens = None if entry.tokens is None else torch.tensor(entry.tokens, device="cpu")
    if tokens is not None:
        rows = given[ROWS] if ROWS in given else start(entry.storage.dense(weight), tokens)
        dtype = trained_dtype(config, entry.storage.dtype(weight))
        parameters[ROWS] = rows.to(entry.storage.device(weight), dtype, copy=True)
    return Change(
        parameters, layer=entry.layer, variant=VARIANTS[config.variant], storage=entry.storage, dims=entry.dims,
        rank=entry.rank, alpha=entry.alpha, dropout=0.0 if tokens is not None else config.dropout, rows=_rows(entry),
        tokens=tokens, frozen_input=entry.layer.frozen_input(module), module_only=entry.module_only,
    )  # fmt: skip


def _rows(entry: LowRankPlan) -> Tensor | None:
    return None if entry.rows is None else torch.tensor(entry.rows, device="cpu")


def _variant_parameters(
    entry: LowRankPlan,
    weight: Any,
    config: LoraConfig,
    given: Mapping[str, Tensor],
    calibration: Calibration | None,
) -> dict[str, Tensor]:
    """What the variant trains or holds of one weight: what is given, or how it starts."""
    layer, variant, rows = entry.layer, VARIANTS[config.variant], _rows(entry)

    def base() -> Tensor:
        dense = entry.storage.dense(weight)
        dense = layer.unfold(dense.to(at_least_float32(dense.dtype)), entry.dims)
        return dense if rows is None else dense[:, rows.to(dense.device)]

    dims = entry.start_dims
    found = calibration(entry) if calibration is not None and not given else {}
    seen: Any = {
        name: partial(_starting, entry, variant.name, name, read)
        for name, read in {"base": base, **found}.items()
    }
    begin = InitContext(
        dims.groups, dims.out, dims.in_, entry.rank, layer.fan_in(entry.dims), **seen
    )
    device = entry.storage.device(weight)
    parameters = {name: value.to(device) for name, value in given.items()}
    if not given or variant.derived:
        try:
            with torch.no_grad(), torch.device(device):
                begun = variant.init(begin)  # where its data are: of float64, not on every device
            parameters = {**{name: value.to(device) for name, value in begun.items()}, **parameters}
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  # numbers that are finite, and yet too large
            found = f"{entry.where!r}, from which variant {variant.name!r} cannot start ({error})"
            do = "exclude the layer, or use a variant that does not start from it, such as lora"
            raise _BadStartError(found, "numbers that have a decomposition", do) from error
    dtype = trained_dtype(config, entry.storage.dtype(weight))
    for name in parameters.keys() - variant.derived:
        parameters[name] = parameters[name].to(
            dtype, copy=bool(given), memory_format=torch.contiguous_format
        )
    return parameters


def trained_dtype(config: LoraConfig, base: torch.dtype) -> torch.dtype:
    """What is trained for a weight of dtype ``base`` has the config's dtype, else float32 or, if
    wider, ``base``."""
    return torch_dtype(config.dtype) if config.dtype else at_least_float32(base)


@in_turn
def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Remove the adapter ``name`` (None: all of them). With the last one, the model is again the
    very object graph that it was: classes, modules, parameters, ``requires_grad``.

    Args:
        keep_merged: leave the weights of a merged adapter merged, and with them a plain model.

    Raises:
        SelectionError: there is no such adapter.
        MergeError: the adapter is merged and ``keep_merged`` is False, or it is merged on top of
            another that stays, or one that stays was attached while it was merged, which it no
            longer is. Nothing was changed.
    """
    model = unwrap(model)
    attached = need_adapters(model, name)
    names = list(attached.configs) if name is None else [name]
    _may_go(attached, names, keep_merged)
    if any(map(names.__contains__, attached.merges())):
        attached.untied = ()  # what is merged into weights of their own stays in them
    for adapter in names:
        attached.selections[adapter].parts = None  # an error for calls that still select it
    for _, _, layer_state in layer_states(model):
        for adapter in names:
            set_child(layer_state, adapter, None)
    kept = [key for key in attached.configs if key not in names]
    for selected in attached.selections.values():
        if selected.on in names:  # what is merged stays in the weights, and is theirs from here on
            selected.on = None
    attached.chain = tuple(merged for merged in attached.chain if merged not in names)
    attached.set_adapters(
        {key: attached.configs[key] for key in kept},
        {key: attached.selections[key] for key in kept},
    )
    for _, module in walk(model) if not kept else ():
        take_back(module)
    abandon(model, attached)


def _may_go(attached: ModelAdapters, names: list[str], keep_merged: bool) -> None:
    """Raise a MergeError where adapters cannot be detached now."""
    merged = attached.merges()
    for number, name in enumerate(merged):
        if name not in names:
            continue
        below = next((other for other in merged[number + 1 :] if other not in names), None)
        if not keep_merged:
            do = (
                "call veneer.unmerge(model) first, or detach(model, keep_merged=True) to keep the"
                " merged weights"
            )
            raise MergeError(f"{name!r} is merged into the weights", "an unmerged model", do)
        if below is not None:
            problem = f"{name!r} merged on top of {below!r}, which stays"
            do = f"detach {below!r} with keep_merged=True first, or call veneer.unmerge(model)"
            raise MergeError(problem, "the one that was merged first", do)
    for adapter, selected in attached.selections.items():
        if selected.on in names and selected.on not in merged and adapter not in names:
            problem = f"{adapter!r}, attached while {selected.on!r} was merged, which is to go"
            raise MergeError(
                problem, f"{selected.on!r} merged, or {adapter!r} detached", "detach that one first"
            )


def abandon(model: nn.Module, attached: ModelAdapters) -> None:
    """Give modules without an adapter their class and storage back, and a model without adapters
    its ``requires_grad``: unless a bank needs them."""
    if attached.banks:
        return
    for _, module, layer_state in list(layer_states(model)):
        if not layer_state._modules:
            uninstall(module)
            for name in layer_state.layer.weights(module) if layer_state.layer is not None else ():
                storage = storage_of(weight_of(module, name))
                if storage is not None:
                    storage.release(module)
    if not attached.configs:
        for untied in reversed(attached.untied):
            tie_again(model, untied)
        for path, parameter in model.named_parameters():
            parameter.requires_grad = attached.required_grad.get(path, parameter.requires_grad)
        del model.__dict__[ADAPTERS]
