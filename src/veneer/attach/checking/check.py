"""Prove on a live model that its output depends on every change of an adapter, as it should.

There are three checks. The error names each layer that fails one:

    reached     one pass in eval mode without gradients runs every adapted layer
    gradient    one pass in the model's mode gives every change a finite gradient that is not zero,
                either before training or after all trained parameters were perturbed
    equal       the gradients equal those of a plain model that reads W + ΔW wherever it read W

Rounding errors in a gradient can be large, such as in that of a key projection below a saturated
softmax in float32. So if a gradient differs and the model can run in float64, it is compared again
in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach.checking import dead_weights
from veneer.attach.checking.recompute import ComputedParameters, ParametersComputedOnce, Recomputed
from veneer.attach.layer.adapted_module import layer_states, walk
from veneer.attach.layer.change import Change
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.lookup import adapters, changes, name_or_default, need_adapters, unwrap
from veneer.attach.layer.state import LAYER_STATE_NAME, ActiveAdapter
from veneer.attach.layer.views import view
from veneer.attach.rows.blend import Blend
from veneer.attach.select import active_adapter
from veneer.bases import is_opaque
from veneer.distributed import base_class, is_spread, reshard, spread_problem, within_joint_work
from veneer.errors import CheckError, listing, raise_all, sentence
from veneer.fileio.tensors import cpu_copy
from veneer.layers import kind_of, parameter_path
from veneer.precision import compute_device, double

#: The largest relative error of a change's gradient against that of a plain model of W + ΔW, by the
#: size of the weight's elements in bytes. If a layer's ΔW is not read, the error is about 1. Kinks
#: of ReLUs and rounding errors stay below these limits.
TOLERANCE_BY_ELEMENT_SIZE = {8: 1e-3, 4: 0.1, 2: 0.5}
#: Gradients smaller than this share of the largest one are rounding errors of zero, such as the
#: gradient of a key projection's bias.
NOISE_SHARE = 1e-4
#: in most error texts of ``_CheckedChange.problem``: what is expected, and what to do
EXPECTED_LAYER = "a layer that the output depends on"
HOW_TO_REACH = "exclude it, or give an example that reaches it"


@dataclass(frozen=True)
class CheckReport:
    """The result of a check that passed.

    Fields:
        adapter: the name of the adapter, or of the blend.
        weights: paths of the weights whose changes reach the output.
        compared: the number of changes whose gradients were also compared with those of a plain
            model of W + ΔW. Packed weights and adapters with invocation tokens are not compared.
    """

    adapter: str
    weights: tuple[str, ...]
    compared: int

    def __str__(self) -> str:
        result = f"all {len(self.weights)} changes reach the output and receive a gradient"
        return f"adapter {self.adapter!r}: {result}, {self.compared} of them that of W + ΔW"


@dataclass(frozen=True)
class _CheckedChange:
    """A change that must reach the output: a low-rank change of a weight, or a parameter that is
    trained in full.

    Fields:
        path: the path of the weight or parameter.
        ids: if one of these is in ``Context.reached_ids``, the change took part in a call.
        parameters: the adapter parameters of the change.
    """

    path: str
    module: nn.Module
    ids: frozenset[int]
    parameters: tuple[nn.Parameter, ...]

    def problem(
        self, description: str, expected: str = EXPECTED_LAYER, do: str = HOW_TO_REACH
    ) -> str:
        subject = f"{self.path!r} ({base_class(self.module).__name__}) {description}"
        return sentence(subject, expected, do)


def check(
    model: nn.Module, example: Any, name: str | Mapping[str, float] | None = None
) -> CheckReport:
    """Run ``example`` through ``model`` and prove that the output depends on each of the adapter's
    changes.

    The model's modes, gradients, parameters and random state are restored afterwards. The model
    must not run in another thread meanwhile.

    Args:
        example: the inputs of a call: a tensor, a tuple of positional arguments or a mapping of
            keyword arguments.
        name: the adapter; None stands for the default one, or the only one. Or a blend
            {name: weight}, as ``use`` takes it. Then the changes of all its adapters are checked in
            the blend, also of adapters that do not train. Comparing the gradients of a blend takes
            as much memory as the weights that change.

    Raises:
        CheckError: some changes do not reach the output, or reach it wrongly. The error lists each
            of them with the reason.
    """
    model = unwrap(model)
    model_adapters = need_adapters(model)
    active = active_adapter(
        model, name if isinstance(name, Mapping) else name_or_default(model, name)
    )
    if model_adapters.merged != active.merged_at_attach:
        raise CheckError(
            f"{model_adapters.merged!r} merged into the weights, on which {active.name!r} does not"
            " run",
            "the weights that it was attached to",
            "call veneer.unmerge(model) first",
        )
    modules = (module for _, module in walk(model))
    do = "check the model in one process, before it is sharded"
    if not within_joint_work() and (problem := spread_problem(modules, "a check", do)):
        raise CheckError(problem)
    if isinstance(example, Mapping):
        call = partial(model, **example)
    else:
        call = partial(model, *example) if isinstance(example, tuple) else partial(model, example)
    names = (
        [key for key, weight in name.items() if weight]
        if isinstance(name, Mapping)
        else [str(active.name)]
    )
    if not names:
        raise CheckError(
            "a blend in which no adapter has a weight",
            "at least one adapter to check",
            "give an adapter a weight that is not zero",
        )
    checked = [change for adapter_name in names for change in _checked_changes(model, adapter_name)]
    trained = list(dict.fromkeys(p for change in checked for p in change.parameters))
    devices = list({p.device for p in trained if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        problems, compared = _prove_changes(call, active, names, checked, trained)
    raise_all(CheckError, f"The output does not see all of adapter {active.name!r}", problems)
    return CheckReport(str(active.name), tuple(change.path for change in checked), compared)


def _use_selection(model: nn.Module, selection: ActiveAdapter) -> AbstractContextManager[None]:
    """A context manager in which calls of the model use this selection."""
    return context.override({need_adapters(model).uid: selection})


def _prove_changes(
    call: partial,
    active: ActiveAdapter,
    names: list[str],
    checked: list[_CheckedChange],
    trained: list[nn.Parameter],
) -> tuple[list[str], int]:
    """(problems, the number of changes whose gradients were compared with those of W + ΔW).
    ``names`` are the adapters that ``active`` selects, ``checked`` their changes, ``trained`` the
    parameters of these changes."""
    model: Any = call.func
    reached_ids: set[int] = set()
    with _preserve_state(model, trained), _use_selection(model, active):
        gradient_of = _gradients(call, trained)
        with context.override(reached_ids=reached_ids), torch.no_grad():
            model.eval()
            call()
    problems, without_gradient = [], []
    for change in checked:
        gradients = [gradient_of[p] for p in change.parameters if gradient_of[p] is not None]
        if not change.ids & reached_ids:
            problems.append(change.problem("is not reached in eval mode"))
        elif not _any_nonzero(gradients):
            without_gradient.append(change)
        elif not all(gradient.isfinite().all() for gradient in gradients):
            problems.append(change.problem("receives a gradient that is not finite"))
    if without_gradient:
        problems += _missing_gradient_problems(call, active, without_gradient, trained)
    packed_adapters = _packed_layers(model, names[0])
    if len(names) > 1 and any(_packed_layers(model, adapter_name) != {} for adapter_name in names):
        packed_adapters = None
    # With invocation tokens, no weight defines the adapter: its change differs between tokens.
    if problems or packed_adapters is None or active.invocation_tokens:
        return problems, 0
    packed_changes = {
        id(change)
        for layer_adapter in packed_adapters.values()
        for change in layer_adapter.changes.values()
    }
    compared = [change for change in checked if not change.ids & packed_changes]
    problems = _gradient_problems(call, active, compared, trained, packed_adapters)
    tensors = (*model.parameters(), *model.buffers())
    is_narrow = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.element_size() < 8
        for tensor in tensors
        if tensor.is_floating_point()
    )
    if problems and is_narrow and not packed_adapters:
        try:
            with dead_weights.replace_data(tensors, _to_float64):
                args, kwargs = pytree.tree_map_only(Tensor, _to_float64, (call.args, call.keywords))
                call = partial(model, *args, **kwargs)
                problems = _gradient_problems(call, active, compared, trained, packed_adapters)
        except RuntimeError as error:
            # The forward casts to a fixed dtype, or memory is short. The first result is kept.
            problems[0] = (
                f"{problems[0]} (In float64, which would tell rounding apart, it does not run:"
                f" {error})"
            )
    return problems, len(compared)


def _any_nonzero(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _missing_gradient_problems(
    call: partial, active: ActiveAdapter, checked: list[_CheckedChange], trained: list[nn.Parameter]
) -> Iterator[str]:
    """An error text for each of the changes ``checked``, which had no gradient, unless a gradient
    appears after the trained parameters have been perturbed."""

    def have_gradients() -> list[bool]:
        gradients = _gradients(call, trained)
        return [_any_nonzero(gradients[p] for p in change.parameters) for change in checked]

    model: Any = call.func
    with _preserve_state(model, trained), _use_selection(model, active):
        _perturb(trained)
        are_nonzero = have_gradients()
        zeros = {} if all(are_nonzero) else dead_weights.zero_parameters(model, trained)
        blocking_names = (
            dead_weights.blocking_weights(zeros, have_gradients) if zeros else [() for _ in checked]
        )
    for change, has_gradient, names in zip(checked, are_nonzero, blocking_names, strict=True):
        if names and not has_gradient:
            yield change.problem(
                "receives no gradient: every path from it to the output goes through weights that"
                f" are exactly zero and do not train: {listing(map(repr, names))}",
                "a path that is not multiplied by zero",
                "load the weights that belong there, train them too (targets=, train_also=), or"
                " leave this layer out",
            )
        elif not has_gradient:
            yield change.problem("receives no gradient")


def _gradient_problems(
    call: partial,
    active: ActiveAdapter,
    checked: list[_CheckedChange],
    trained: list[nn.Parameter],
    packed_adapters,
) -> list[str]:
    """A problem for each change whose gradient differs from its gradient in a plain model that
    reads W + ΔW. Both are computed in the present dtype of the model."""
    model: Any = call.func
    # cuDNN's RNNs have no backward in eval mode
    with _preserve_state(model, trained), torch.backends.cudnn.flags(enabled=False):
        model.eval()
        _perturb(trained)
        with _use_selection(model, active):
            adapter_gradients = _gradients(call, trained)
        with _use_definition(model, active, packed_adapters):
            defined_gradients = _gradients(call, trained)

    def full_gradient(gradients: Mapping, change: _CheckedChange) -> Tensor:
        flat_gradients = (
            (torch.zeros_like(p) if gradients[p] is None else gradients[p]).flatten()
            for p in change.parameters
        )
        return torch.cat([double(gradient).cpu() for gradient in flat_gradients])

    problems = []
    norms = [full_gradient(defined_gradients, change).norm().item() for change in checked]
    largest_norm = max(norms, default=0.0)
    for change in checked:
        expected = full_gradient(defined_gradients, change)
        error = (full_gradient(adapter_gradients, change) - expected).norm().item() / max(
            expected.norm().item(), NOISE_SHARE * largest_norm, 1e-30
        )
        parameters = change.module.parameters(recurse=False)
        element_size = min((p.element_size() for p in parameters), default=4)
        if not error < TOLERANCE_BY_ELEMENT_SIZE.get(element_size, 0.5):
            problem = f"has a different gradient than W + ΔW in its place ({error:.0%} off)"
            readable = (
                "a weight that is read through its layer's forward, or directly by a module"
                " above it"
            )
            do = "exclude it, because other code reads this weight without its layer"
            problems.append(change.problem(problem, readable, do))
    return problems


def _to_float64(tensor: Tensor) -> Tensor:
    """Prepare a tensor of the model, or of its arguments, for a run in float64. Floating-point
    tensors are cast. Other tensors are only moved to the device of that run."""
    return (
        double(tensor) if tensor.is_floating_point() else tensor.to(compute_device(tensor.device))
    )


def _checked_changes(model: nn.Module, name: str) -> list[_CheckedChange]:
    """The changes of an adapter, each listed once. A parameter that layers share is reached if one
    of these layers is reached."""
    checked = [
        _CheckedChange(
            parameter_path(path, weight),
            module,
            frozenset([id(change)]),
            tuple(change.parameters()),
        )
        for path, module, weight, change in changes(model, name)
    ]
    layers = list(adapters(model, name))
    holders: dict[int, set[int]] = {}
    for _, _, layer_adapter in layers:
        for parameter in layer_adapter.full.parameters():
            holders.setdefault(id(parameter), set()).add(id(layer_adapter))
    for path, module, layer_adapter in layers:
        for parameter_name, parameter in layer_adapter.full.named_parameters():
            checked.append(
                _CheckedChange(
                    parameter_path(path, parameter_name),
                    module,
                    frozenset(holders[id(parameter)]),
                    (parameter,),
                )
            )
    unique = {change.parameters: change for change in reversed(checked) if change.parameters}
    return [change for change in checked if unique.get(change.parameters) is change]


@contextmanager
def _preserve_state(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """A context manager that restores the modules' modes, the trained parameters and their
    ``requires_grad``, and the buffers that a pass in training mode changes."""
    modes = {module: module.training for module in model.modules()}
    requires_grad_flags = [p.requires_grad for p in trained]
    values = [p.detach().clone() for p in trained]
    # No pass changes the frozen buffers of an adapter, or quantised weights that are buffers. They
    # may be as large as the model, so they are not copied.
    fixed_modules = (
        module for module in model.modules() if isinstance(module, Change) or is_opaque(module)
    )
    fixed_ids = {id(buffer) for module in fixed_modules for buffer in module.buffers()}
    buffers = [
        (buffer, cpu_copy(buffer)) for buffer in model.buffers() if id(buffer) not in fixed_ids
    ]
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        reshard(model)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for parameter, value, flag in zip(trained, values, requires_grad_flags, strict=True):
                parameter.requires_grad_(flag)
                parameter.copy_(value)
            for buffer, value in buffers:
                buffer.copy_(value)


def _perturb(trained: list[nn.Parameter]) -> None:
    """Add noise to the trained parameters. Before training ΔW is zero, so without noise, code that
    ignores the adapter would compute the right output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            size = double(parameter.detach()).square().mean().sqrt().item() or 1.0
            noise = torch.randn(parameter.shape, generator=generator) * 0.02 * size
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def _gradients(call: partial, trained: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
    """∂p/∂θ for each trained parameter θ, where p is a random projection of the model's outputs."""
    torch.manual_seed(0)
    with torch.enable_grad():
        # A random projection, because a plain sum is constant after a softmax or a layer norm and
        # would have no gradient.
        projected = (
            (y.float() * torch.randn(y.shape).to(y.device)).sum().cpu()
            for y in _differentiable_tensors(call())
        )
        total = sum(projected, torch.zeros(()))
    if not total.requires_grad:
        return dict.fromkeys(trained)
    return dict(zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True))


def _packed_layers(model: nn.Module, name: str) -> dict[int, LayerAdapter] | None:
    """The layer adapters of packed (quantised) weights, in whose place W + ΔW cannot be put, by
    ``LayerState.key``. None if such a weight is in a module that also has a plain weight, or if
    another module reads it."""
    packed_adapters: dict[int, LayerAdapter] = {}
    submodule_adapters: set[int] = set()
    for _, module, layer_adapter in adapters(model, name):
        are_plain = {change.storage.name == "plain" for change in layer_adapter.changes.values()}
        layer_state: Any = module._modules[LAYER_STATE_NAME]
        submodule_adapters.update(
            id(adapter) for adapter in layer_adapter.submodule_adapters.values()
        )
        if are_plain == {False}:
            packed_adapters[layer_state.key] = layer_adapter
        elif len(are_plain) == 2:
            return None
    return None if submodule_adapters & set(map(id, packed_adapters.values())) else packed_adapters


@contextmanager
def _use_definition(
    model: nn.Module, active: ActiveAdapter, packed_adapters: Mapping[int, LayerAdapter]
) -> Iterator[None]:
    """A context manager in which the model reads W + ΔW, differentiable, in place of every W. Each
    weight is computed when it is read. Only the layers of ``packed_adapters`` use adapters."""
    undo: list[tuple[dict, Any, Any]] = []

    def replace(table: dict, key: Any, value: Any) -> None:
        undo.append((table, key, table[key]))
        table[key] = value

    packed_ids = set(map(id, packed_adapters.values()))
    recomputed, weights_are_spread = Recomputed(), is_spread(model.modules())
    reshard(model)
    try:
        modules = {layer_state.key: module for _, module, layer_state in layer_states(model)}
        for key, layer_adapter in active.usable_layer_adapters.items():
            # A key (key of a layer, method) is skipped, as the layer's own key has an entry too.
            if key not in modules or id(layer_adapter) in packed_ids:
                continue
            module = modules[key]
            replacements = layer_adapter.replacements(module)
            for name, value in replacements.items():
                table = module._parameters if name in module._parameters else module._buffers
                replace(table, name, value)
            readers: dict[str, Any] = {
                weight: partial(recomputed.read, change)
                for weight, change in layer_adapter.changes.items()
            }
            if isinstance(layer_adapter, Blend):
                module_view = view(module, base_class(module), {})
                readers = {
                    weight: partial(_blend_weight, layer_adapter, module_view, weight)
                    for weight in readers
                }
            if weights_are_spread:  # FSDP2 stores gathered weights in place of ``replacements``
                readers |= {
                    name: lambda _, value=value: value for name, value in replacements.items()
                }
            parameters = ComputedParameters(module._parameters, readers, weights_are_spread)
            replace(module.__dict__, "_parameters", parameters)
            kind = kind_of(module)
            if kind is not None and (replacements or readers):
                attributes_before = dict(module.__dict__)
                kind.bind(module, ParametersComputedOnce(parameters))
                undo.extend(
                    (module.__dict__, name, attributes_before[name])
                    for name in attributes_before
                    if module.__dict__[name] is not attributes_before[name]
                )
        selection = ActiveAdapter(active.name, packed_adapters, active.merged_at_attach)
        with _use_selection(model, selection), recomputed.recipe_hooks():
            yield
    finally:
        reshard(model)
        for table, key, value in reversed(undo):
            table[key] = value


def _blend_weight(blend: Blend, module: nn.Module, weight_name: str, _: Any) -> Tensor:
    """A changed weight of a blend; a function for ``ComputedParameters.compute``."""
    return blend.changed_weights(module, wide=False)[weight_name]


def _differentiable_tensors(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor that requires a gradient in nested containers of outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for element in output.values() if isinstance(output, Mapping) else output:
            yield from _differentiable_tensors(element)
