"""Prove on a live model that every attached adapter is seen. Three proofs, each naming what fails:

    reached     one pass in eval mode without gradients, where fast paths are taken, runs every adapted layer
    gradient    one pass in the model's own mode gives every change a finite gradient that is not zero, at the start or
                once all that trains has moved
    equal       the gradients are those of the plain model with W + ΔW in place of W, whoever reads it

Rounding may move a gradient far: that of a key in a saturated softmax, in float32. So who seems to
differ is judged in float64, where the model runs there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach import dead_weights
from veneer.attach.adapted_module import layer_states, own_class, walk
from veneer.attach.blend import Blend
from veneer.attach.change import Change
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import adapters, changes, need_adapters, only_name, parameter_path, unwrap
from veneer.attach.recompute import Reads, Recomputed
from veneer.attach.select import selected
from veneer.attach.state import STATE, ActiveAdapter
from veneer.attach.views import view
from veneer.bases import is_opaque
from veneer.distributed import is_spread, reshard, spread_problem, together
from veneer.errors import CheckError, listing, raise_all, sentence
from veneer.fileio.tensors import cpu_copy
from veneer.layers import kind_of
from veneer.precision import double, place

#: how far the gradient of a change may be from that of the definition, by the size of the weight's
#: elements in bytes.
#: Who reads another weight is off by its own size; corners of ReLUs and roundings are off by this
#: at most.
TOLERANCE = {8: 1e-3, 4: 0.1, 2: 0.5}
#: gradients that much smaller than the largest are rounding errors of zero, such as that of a
#: key's bias
NOISE = 1e-4
DEPENDS, REACH = (
    "a layer that the output depends on",
    "exclude it, or give an example that reaches it",
)


@dataclass(frozen=True)
class CheckReport:
    """Which weights were proven to be seen; ``compared`` (those not stored packed) also to the
    definition."""

    adapter: str
    weights: tuple[str, ...]
    compared: int

    def __str__(self) -> str:
        seen = f"all {len(self.weights)} changes reach the output and receive a gradient"
        return f"adapter {self.adapter!r}: {seen}, {self.compared} of them that of W + ΔW"


@dataclass(frozen=True)
class _Item:
    """Something that must be seen: a change, or what is trained in full of a module."""

    where: str
    module: nn.Module
    ids: frozenset[int]
    parameters: tuple[nn.Parameter, ...]

    def problem(self, what: str, expected: str = DEPENDS, do: str = REACH) -> str:
        return sentence(f"{self.where!r} ({own_class(self.module).__name__}) {what}", expected, do)


def check(
    model: nn.Module, example: Any, name: str | Mapping[str, float] | None = None
) -> CheckReport:
    """Run ``example`` through ``model`` and prove that each of the adapter's changes is part of
    what comes out.

    The model's modes, gradients, parameters and random state are as they were afterwards. It must
    not run elsewhere meanwhile.

    Args:
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        name: the adapter, None takes the only one; or a blend {name: weight}, as ``use`` takes it,
            whose changes are all proven through it (also those that do not train: an old adapter
            below a new one). Comparing that with its definition takes as much memory as the weights
            that change.

    Raises:
        CheckError: names every layer that is not seen, and how.
    """
    model = unwrap(model)
    attached = need_adapters(model)
    chosen = selected(model, name if isinstance(name, Mapping) else only_name(model, name))
    if attached.merged != chosen.on:
        found = f"{attached.merged!r} merged into the weights, where {chosen.name!r} does not run"
        raise CheckError(
            found, "the weights that it was attached to", "call veneer.unmerge(model) first"
        )
    modules = (module for _, module in walk(model))
    do = "check the model in one process, before it is sharded"
    if not together() and (problem := spread_problem(modules, "a check", do)):
        raise CheckError(problem)
    if isinstance(example, Mapping):
        call = partial(model, **example)
    else:
        call = partial(model, *example) if isinstance(example, tuple) else partial(model, example)
    names = (
        [key for key, weight in name.items() if weight]
        if isinstance(name, Mapping)
        else [str(chosen.name)]
    )
    if not names:
        raise CheckError(
            "a blend in which no adapter has a weight", "something to check", "give one a weight"
        )
    items = [item for own in names for item in _items(model, own)]
    trained = list(dict.fromkeys(p for item in items for p in item.parameters))
    devices = list({p.device for p in trained if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        problems, compared = _prove(call, chosen, names, items, trained)
    raise_all(CheckError, f"The output does not see all of adapter {chosen.name!r}", problems)
    return CheckReport(str(chosen.name), tuple(item.where for item in items), compared)


@contextmanager
def _using(model: nn.Module, selection: ActiveAdapter) -> Iterator[None]:
    uid = need_adapters(model).uid
    with context.changed({uid: selection}):
        yield


def _prove(
    call: partial,
    chosen: ActiveAdapter,
    names: list[str],
    items: list[_Item],
    trained: list[nn.Parameter],
) -> tuple[list[str], int]:
    """(problems, how many changes were compared with the definition)."""
    model: Any = call.func
    reached: set[int] = set()
    with _as_it_was(model, trained), _using(model, chosen):
        first = _gradients(call, trained)
        with context.changed(reached=reached), torch.no_grad():
            model.eval()
            call()
    problems, silent = [], []
    for item in items:
        found = [first[p] for p in item.parameters if first[p] is not None]
        if not item.ids & reached:
            problems.append(item.problem("is not reached in eval mode"))
        elif not _is_there(found):
            silent.append(item)
        elif not all(gradient.isfinite().all() for gradient in found):
            problems.append(item.problem("receives a gradient that is not finite"))
    problems += _without_gradient(call, chosen, silent, trained) if silent else []
    packed = _packed(model, names[0])
    if len(names) > 1 and any(_packed(model, own) != {} for own in names):
        packed = None
    if problems or packed is None:
        return problems, 0
    left_out = {id(change) for part in packed.values() for change in part.changes.values()}
    compared = [item for item in items if not item.ids & left_out]
    problems = _differences(call, chosen, compared, trained, packed)
    floats = [one for one in (*model.parameters(), *model.buffers()) if one.is_floating_point()]
    narrow = all(type(one) in (Tensor, nn.Parameter) and one.element_size() < 8 for one in floats)
    if problems and narrow and not packed:
        try:
            with dead_weights.replaced((*model.parameters(), *model.buffers()), _doubled):
                args, kwargs = pytree.tree_map_only(Tensor, _doubled, (call.args, call.keywords))
                call = partial(model, *args, **kwargs)
                problems = _differences(call, chosen, compared, trained, packed)
        except (
            RuntimeError
        ) as error:  # a forward that casts by itself, or no memory: the first judgement holds
            problems[0] = (
                f"{problems[0]} (In float64, which would tell rounding apart, it does not run:"
                f" {error})"
            )
    return problems, len(compared)


def _is_there(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _without_gradient(
    call: partial, chosen: ActiveAdapter, items: list[_Item], trained: list[nn.Parameter]
) -> Iterator[str]:
    """A problem for each of these without a gradient at the start, unless it comes once the
    parameters have moved."""

    def ask() -> list[bool]:
        gradients = _gradients(call, trained)
        return [_is_there(gradients[p] for p in item.parameters) for item in items]

    model: Any = call.func
    with _as_it_was(model, trained), _using(model, chosen):
        _perturb(trained)
        later = ask()
        found = {} if all(later) else dead_weights.zeros(model, trained)
        behind = dead_weights.blocking(found, ask) if found else [() for _ in items]
    for item, there, names in zip(items, later, behind, strict=True):
        if names and not there:
            zeros = listing(map(repr, names))
            what = (
                "receives no gradient: every way from it to the output goes through weights that"
                " are exactly zero"
            )
            do = (
                "load the weights that belong there, train them too (targets=, train_also=), or"
                " leave this layer out"
            )
            found = f"{what} and do not train: {zeros}"
            yield item.problem(found, "a way that is not multiplied by zero", do)
        elif not there:
            yield item.problem("receives no gradient")


def _differences(
    call: partial, chosen: ActiveAdapter, items: list[_Item], trained: list[nn.Parameter], packed
) -> list[str]:
    """A problem for each item whose gradient is not that of the definition, in the dtype that the
    model has now."""
    model: Any = call.func
    # cuDNN's RNNs have no backward in eval mode
    with _as_it_was(model, trained), torch.backends.cudnn.flags(enabled=False):
        model.eval()
        _perturb(trained)
        with _using(model, chosen):
            ours = _gradients(call, trained)
        with _defined(model, chosen, packed):
            theirs = _gradients(call, trained)

    def whole(gradients: Mapping, item: _Item) -> Tensor:
        own = (
            torch.zeros_like(p) if gradients[p] is None else gradients[p] for p in item.parameters
        )
        return torch.cat([double(gradient.flatten()).cpu() for gradient in own])

    problems, largest = [], max((whole(theirs, item).norm().item() for item in items), default=0.0)
    for item in items:
        expected = whole(theirs, item)
        error = (whole(ours, item) - expected).norm().item() / max(
            expected.norm().item(), NOISE * largest, 1e-30
        )
        size = min((p.element_size() for p in item.module.parameters(recurse=False)), default=4)
        if not error < TOLERANCE.get(size, 0.5):
            problem = f"has another gradient than W + ΔW in its place ({error:.0%} off)"
            way = (
                "a weight that is read through its layer's forward, or directly by a module"
                " above it"
            )
            problems.append(
                item.problem(
                    problem, way, "exclude it: something else reads this weight past its layer"
                )
            )
    return problems


def _doubled(tensor: Tensor) -> Tensor:
    """A number of the model's, or an argument of it, where it runs in float64."""
    return double(tensor) if tensor.is_floating_point() else tensor.to(place(tensor.device))


def _items(model: nn.Module, name: str) -> list[_Item]:
    items = [
        _Item(
            parameter_path(path, weight),
            module,
            frozenset([id(change)]),
            tuple(change.parameters()),
        )
        for path, module, weight, change in changes(model, name)
    ]
    parts = list(adapters(model, name))
    holders: dict[int, set[int]] = {}
    for _, _, part in parts:
        for parameter in part.full.parameters():
            holders.setdefault(id(parameter), set()).add(id(part))
    for path, module, part in parts:
        for own, parameter in part.full.named_parameters():
            items.append(
                _Item(
                    parameter_path(path, own),
                    module,
                    frozenset(holders[id(parameter)]),
                    (parameter,),
                )
            )
    unique = {item.parameters: item for item in reversed(items) if item.parameters}
    return [item for item in items if unique.get(item.parameters) is item]


@contextmanager
def _as_it_was(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Restore modes, the numbers and their ``requires_grad``, and buffers that a pass in training
    mode moves."""
    modes = {module: module.training for module in model.modules()}
    required = [p.requires_grad for p in trained]
    values = [p.detach().clone() for p in trained]
    # the adapter's own (what some variants start from, and do not train) stay, and so do quantised
    # weights that are buffers: both may be as large as the model
    large = (
        module for module in model.modules() if isinstance(module, Change) or is_opaque(module)
    )
    fixed = {id(one) for module in large for one in module.buffers()}
    buffers = [(buffer, cpu_copy(buffer)) for buffer in model.buffers() if id(buffer) not in fixed]
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        reshard(model)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for parameter, value, flag in zip(trained, values, required, strict=True):
                parameter.requires_grad_(flag)
                parameter.copy_(value)
            for buffer, value in buffers:
                buffer.copy_(value)


def _perturb(trained: list[nn.Parameter]) -> None:
    """Move the numbers off their start, where ΔW is zero and would hide who does not see it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            size = double(parameter.detach()).square().mean().sqrt().item() or 1.0
            noise = torch.randn(parameter.shape, generator=generator) * 0.02 * size
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def _gradients(call: partial, trained: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
    torch.manual_seed(0)
    with torch.enable_grad():
        # A random projection: a plain sum is constant after a softmax or a layer norm, and would
        # hide a gradient.
        projected = (
            (y.float() * torch.randn(y.shape).to(y.device)).sum().cpu() for y in _floats(call())
        )
        total = sum(projected, torch.zeros(()))
    if not total.requires_grad:
        return dict.fromkeys(trained)
    return dict(zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True))


def _packed(model: nn.Module, name: str) -> dict[int, LayerAdapter] | None:
    """The parts of weights that cannot be replaced, by their state's key; None if they share a
    module with others."""
    packed: dict[int, LayerAdapter] = {}
    read_below: set[int] = set()
    for _, module, part in adapters(model, name):
        kinds = {change.storage.name == "plain" for change in part.changes.values()}
        layer_state: Any = module._modules[STATE]
        read_below.update(id(below) for below in part.read_below.values())
        if kinds == {False}:
            packed[layer_state.key] = part
        elif len(kinds) == 2:
            return None
    return None if read_below & {id(part) for part in packed.values()} else packed


@contextmanager
def _defined(
    model: nn.Module, chosen: ActiveAdapter, packed: Mapping[int, LayerAdapter]
) -> Iterator[None]:
    """The plain model with W + ΔW in place of every W, differentiable, one weight at a time."""
    undo: list[tuple[dict, Any, Any]] = []

    def put(where: dict, key: Any, value: Any) -> None:
        undo.append((where, key, where[key]))
        where[key] = value

    packed_parts = set(map(id, packed.values()))
    made, spread = Recomputed(), is_spread(model.modules())
    reshard(model)
    try:
        modules = {layer_state.key: module for _, module, layer_state in layer_states(model)}
        for key, part in chosen.table.items():
            # that of a method is that of its layer
            if key not in modules or id(part) in packed_parts:
                continue
            module = modules[key]
            full = part.replacements(module)
            for own, value in full.items():
                put(
                    module._parameters if own in module._parameters else module._buffers, own, value
                )
            makers: dict[str, Any] = {
                weight: partial(made.read, change) for weight, change in part.changes.items()
            }
            if isinstance(part, Blend):
                makers = {
                    weight: partial(_blended, part, view(module, own_class(module), {}), weight)
                    for weight in makers
                }
            if spread:  # FSDP2 puts what it gathers where the adapter's own would be
                makers |= {own: lambda _, value=value: value for own, value in full.items()}
            reads = Reads(module._parameters, makers, spread)
            put(module.__dict__, "_parameters", reads)
            kind = kind_of(module)
            if kind is not None and (full or makers):
                before = dict(module.__dict__)
                kind.bind(module, reads.kept())
                undo.extend(
                    (module.__dict__, own, before[own])
                    for own in before
                    if module.__dict__[own] is not before[own]
                )
        with _using(model, ActiveAdapter(chosen.name, packed, chosen.on)), made.saving():
            yield
    finally:
        reshard(model)
        for where, key, value in reversed(undo):
            where[key] = value


def _blended(part: Blend, module: nn.Module, weight: str, _: Any) -> Tensor:
    return part.changed(module, wide=False)[weight]


def _floats(value: Any):
    """Every floating-point tensor with a gradient in an output of nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.requires_grad:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(item)
