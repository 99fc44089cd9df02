"""Prove on a live model that its output depends on every change of an adapter, as it should.

The error names each layer that fails one of three checks:

    reached     one pass in eval mode without gradients runs every adapted layer
    gradient    one pass in the model's mode gives every change a finite gradient that is not zero,
                with the present parameters or after noise was added to the trained ones
    equal       the gradients equal those of a model without adapters, whose weights are W + ΔW

Rounding can change a float32 gradient a lot, such as that of a key projection below a saturated
softmax. If gradients differ, they are therefore compared again in float64, if the model allows it.
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

#: The largest relative error of a change's gradient that rounding, also at the kink of a ReLU, can
#: explain, by the bytes of the weight's elements. If a layer does not read ΔW, the error is about 1
TOLERANCE_BY_ELEMENT_SIZE = {8: 1e-3, 4: 0.1, 2: 0.5}
#: A gradient below this share of the largest one is zero up to rounding, as that of a key
#: projection's bias. Its error is therefore taken relative to this share of the largest one.
NOISE_SHARE = 1e-4
#: the default expectation and advice of ``_CheckedChange.error_text``
EXPECTED_LAYER = "a layer that the output depends on"
HOW_TO_REACH = "exclude it, or give an example that reaches it"


@dataclass(frozen=True)
class CheckReport:
    """The result of a check that passed.

    Fields:
        adapter: the name of the adapter, or of the blend.
        weights: paths of the weights whose changes reach the output.
        compared: the number of changes whose gradients were also compared with those of a model of
            W + ΔW; without packed weights, and 0 for an adapter with invocation tokens.
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
        ids: a call has used the change if ``Context.reached_ids`` holds one of these ``id``s.
        parameters: the adapter parameters of the change.
    """

    path: str
    module: nn.Module
    ids: frozenset[int]
    parameters: tuple[nn.Parameter, ...]

    def error_text(
        self, description: str, expected: str = EXPECTED_LAYER, advice: str = HOW_TO_REACH
    ) -> str:
        subject = f"{self.path!r} ({base_class(self.module).__name__}) {description}"
        return sentence(subject, expected, advice)


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
            {name: coefficient}, as ``veneer.use`` takes it: then all changes of adapters with
            coefficients other than 0 are checked in calls of the blend, also if they do not train.
            Comparing its gradients takes as much memory as the weights that change.

    Raises:
        CheckError: some changes do not reach the output, or reach it wrongly. The error lists each
            of them with the reason. Or the check cannot run, as for a sharded model.
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
    advice = "check the model in one process, before it is sharded"
    if not within_joint_work() and (problem := spread_problem(modules, "a check", advice)):
        raise CheckError(problem)
    if isinstance(example, Mapping):
        call = partial(model, **example)
    else:
        call = partial(model, *example) if isinstance(example, tuple) else partial(model, example)
    adapter_names = (
        [adapter_name for adapter_name, weight in name.items() if weight]
        if isinstance(name, Mapping)
        else [str(active.name)]
    )
    if not adapter_names:
        raise CheckError(
            "a blend in which no adapter has a weight",
            "at least one adapter to check",
            "give an adapter a weight that is not zero",
        )
    checked = [
        change for adapter_name in adapter_names for change in _checked_changes(model, adapter_name)
    ]
    trained = list(dict.fromkeys(p for change in checked for p in change.parameters))
    devices = list({p.device for p in trained if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        problems, compared = _prove_changes(call, active, adapter_names, checked, trained)
    raise_all(CheckError, f"The output does not see all of adapter {active.name!r}", problems)
    return CheckReport(str(active.name), tuple(change.path for change in checked), compared)


def _use_selection(model: nn.Module, selection: ActiveAdapter) -> AbstractContextManager[None]:
    """A context manager in which calls of ``model`` use the adapters that ``selection`` holds."""
    return context.override({need_adapters(model).uid: selection})


def _prove_changes(
    call: partial,
    active: ActiveAdapter,
    adapter_names: list[str],
    checked: list[_CheckedChange],
    trained: list[nn.Parameter],
) -> tuple[list[str], int]:
    """(problems, the number of changes whose gradients were compared with those of a model with the
    weights W + ΔW). ``call`` runs the model. ``active`` selects the adapters ``adapter_names``,
    whose changes are ``checked``; ``trained`` are the parameters of these changes."""
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
            problems.append(change.error_text("is not reached in eval mode"))
        elif not _any_nonzero(gradients):
            without_gradient.append(change)
        elif not all(gradient.isfinite().all() for gradient in gradients):
            problems.append(change.error_text("receives a gradient that is not finite"))
    if without_gradient:
        problems += _missing_gradient_problems(call, active, without_gradient, trained)
    packed_adapters = _packed_layers(model, adapter_names[0])
    if len(adapter_names) > 1 and any(_packed_layers(model, name) != {} for name in adapter_names):
        packed_adapters = None
    # An adapter with invocation tokens changes some tokens only, so no single weight W + ΔW
    # computes its outputs, and there is nothing to compare with.
    if problems or packed_adapters is None or active.invocation_tokens:
        return problems, 0
    packed_change_ids = {
        id(change)
        for layer_adapter in packed_adapters.values()
        for change in layer_adapter.changes.values()
    }
    compared = [change for change in checked if not change.ids & packed_change_ids]
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
            # forward casts to a fixed dtype, or memory is short: report the first problems
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
    """An error text for each of the changes ``checked``, which had no gradient, unless it has one
    after noise was added to all parameters ``trained``."""

    def have_gradients() -> list[bool]:
        gradients = _gradients(call, trained)
        return [_any_nonzero(gradients[p] for p in change.parameters) for change in checked]

    model: Any = call.func
    with _preserve_state(model, trained), _use_selection(model, active):
        _perturb(trained)
        gradient_flags = have_gradients()
        zeros = {} if all(gradient_flags) else dead_weights.zero_parameters(model, trained)
        blocking_names = (
            dead_weights.blocking_weights(zeros, have_gradients) if zeros else [() for _ in checked]
        )
    for change, has_gradient, blockers in zip(checked, gradient_flags, blocking_names, strict=True):
        if blockers and not has_gradient:
            yield change.error_text(
                "receives no gradient: every path from it to the output goes through weights that"
                f" are exactly zero and do not train: {listing(map(repr, blockers))}",
                "a path that is not multiplied by zero",
                "load the weights that belong there, train them too (targets=, train_also=), or"
                " leave this layer out",
            )
        elif not has_gradient:
            yield change.error_text("receives no gradient")


def _gradient_problems(
    call: partial,
    active: ActiveAdapter,
    checked: list[_CheckedChange],
    trained: list[nn.Parameter],
    packed_adapters: Mapping[int, LayerAdapter],
) -> list[str]:
    """An error text for each change whose gradient differs from that of a model with the weights
    W + ΔW, both in the model's present dtype. The layers of ``packed_adapters``, whose quantised
    weights cannot be replaced, use their adapters in both."""
    model: Any = call.func
    with _preserve_state(model, trained):
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
        expected_gradient = full_gradient(defined_gradients, change)
        deviation = (
            full_gradient(adapter_gradients, change) - expected_gradient
        ).norm().item() / max(expected_gradient.norm().item(), NOISE_SHARE * largest_norm, 1e-30)
        parameters = change.module.parameters(recurse=False)
        element_size = min((p.element_size() for p in parameters), default=4)
        if not deviation < TOLERANCE_BY_ELEMENT_SIZE.get(element_size, 0.5):
            problem = f"has a different gradient than W + ΔW in its place ({deviation:.0%} off)"
            expected_weight = (
                "a weight that is read through its layer's forward, or directly by a module"
                " above it"
            )
            advice = "exclude it, because other code reads this weight without its layer"
            problems.append(change.error_text(problem, expected_weight, advice))
    return problems


def _to_float64(tensor: Tensor) -> Tensor:
    """A tensor for a run in float64: cast if it is floating-point, on a device with float64."""
    return (
        double(tensor) if tensor.is_floating_point() else tensor.to(compute_device(tensor.device))
    )


def _checked_changes(model: nn.Module, adapter_name: str) -> list[_CheckedChange]:
    """The changes of an adapter, each listed once. A parameter that several layers share counts as
    reached if one of these layers is reached."""
    checked = [
        _CheckedChange(
            parameter_path(path, weight),
            module,
            frozenset([id(change)]),
            tuple(change.parameters()),
        )
        for path, module, weight, change in changes(model, adapter_name)
    ]
    layers = list(adapters(model, adapter_name))
    holder_ids: dict[int, set[int]] = {}
    for _, _, layer_adapter in layers:
        for parameter in layer_adapter.full.parameters():
            holder_ids.setdefault(id(parameter), set()).add(id(layer_adapter))
    for path, module, layer_adapter in layers:
        for parameter_name, parameter in layer_adapter.full.named_parameters():
            checked.append(
                _CheckedChange(
                    parameter_path(path, parameter_name),
                    module,
                    frozenset(holder_ids[id(parameter)]),
                    (parameter,),
                )
            )
    first_changes = {change.parameters: change for change in reversed(checked) if change.parameters}
    return [change for change in checked if first_changes.get(change.parameters) is change]


@contextmanager
def _preserve_state(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """A context manager in which the parameters ``trained`` require a gradient. Restores their
    values and ``requires_grad``, the modules' modes, and the buffers that a pass changes."""
    uses_cudnn = torch.backends.cudnn.enabled
    training_flags = {module: module.training for module in model.modules()}
    requires_grad_flags = [p.requires_grad for p in trained]
    values = [p.detach().clone() for p in trained]
    # No pass changes the frozen buffers of an adapter, or quantised weights that are buffers. They
    # may be as large as the model, so they are not copied.
    fixed = (m for m in model.modules() if isinstance(m, Change) or is_opaque(m))
    fixed_ids = {id(buffer) for module in fixed for buffer in module.buffers()}
    buffer_copies = [
        (buffer, cpu_copy(buffer)) for buffer in model.buffers() if id(buffer) not in fixed_ids
    ]
    try:
        torch.backends.cudnn.enabled = False  # its RNNs have no backward in eval mode
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        torch.backends.cudnn.enabled = uses_cudnn
        reshard(model)
        for module, is_training in training_flags.items():
            module.training = is_training
        with torch.no_grad():
            for parameter, value, flag in zip(trained, values, requires_grad_flags, strict=True):
                parameter.requires_grad_(flag)
                parameter.copy_(value)
            for buffer, buffer_copy in buffer_copies:
                buffer.copy_(buffer_copy)


def _perturb(trained: list[nn.Parameter]) -> None:
    """Add noise to the trained parameters, in place. Before training ΔW is zero, so without noise,
    code that ignores the adapter would compute the right output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            root_mean_square = double(parameter.detach()).square().mean().sqrt().item() or 1.0
            noise = torch.randn(parameter.shape, generator=generator) * 0.02 * root_mean_square
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def _gradients(call: partial, trained: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
    """∂p/∂θ for each trained parameter θ, or None if p does not depend on θ. p is a random
    projection of the outputs: their plain sum is constant after a softmax or a layer norm."""
    torch.manual_seed(0)
    with torch.enable_grad():
        projected_outputs = (
            (y.float() * torch.randn(y.shape).to(y.device)).sum().cpu()
            for y in _differentiable_tensors(call())
        )
        loss = sum(projected_outputs, torch.zeros(()))
    if not loss.requires_grad:
        return dict.fromkeys(trained)
    return dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))


def _packed_layers(model: nn.Module, adapter_name: str) -> dict[int, LayerAdapter] | None:
    """The layer adapters of packed (quantised) weights, which W + ΔW cannot replace, by
    ``LayerState.key``. None if a module has both a packed and a plain weight, or if another module
    reads a packed weight directly: then gradients cannot be compared."""
    packed_adapters: dict[int, LayerAdapter] = {}
    submodule_adapters: set[int] = set()
    for _, module, layer_adapter in adapters(model, adapter_name):
        plain_flags = {change.storage.name == "plain" for change in layer_adapter.changes.values()}
        layer_state: Any = module._modules[LAYER_STATE_NAME]
        submodule_adapters.update(
            id(adapter) for adapter in layer_adapter.submodule_adapters.values()
        )
        if plain_flags == {False}:
            packed_adapters[layer_state.key] = layer_adapter
        elif len(plain_flags) == 2:
            return None
    return None if submodule_adapters & set(map(id, packed_adapters.values())) else packed_adapters


@contextmanager
def _use_definition(
    model: nn.Module, active: ActiveAdapter, packed_adapters: Mapping[int, LayerAdapter]
) -> Iterator[None]:
    """A context manager in which the model's code reads gain ⊙ (W + ΔW), computed at each read and
    differentiable, in place of each W that ``active`` changes. The layers of ``packed_adapters``,
    whose quantised weights cannot be replaced, use their adapters; all other layers use none."""
    saved_entries: list[tuple[dict, Any, Any]] = []

    def replace_entry(table: dict, key: Any, value: Any) -> None:
        saved_entries.append((table, key, table[key]))
        table[key] = value

    packed_ids = set(map(id, packed_adapters.values()))
    recomputed, weights_are_spread = Recomputed(), is_spread(model.modules())
    reshard(model)
    try:
        modules = {layer_state.key: module for _, module, layer_state in layer_states(model)}
        for key, layer_adapter in active.usable_layer_adapters.items():
            # keys (layer key, method name) are skipped: the layer key itself has an entry too
            if key not in modules or id(layer_adapter) in packed_ids:
                continue
            module = modules[key]
            replacements = layer_adapter.replacements(module)
            for name, value in replacements.items():
                table = module._parameters if name in module._parameters else module._buffers
                replace_entry(table, name, value)
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
            if weights_are_spread:  # FSDP2 would overwrite ``replacements`` with gathered weights
                readers |= {
                    name: lambda _, value=value: value for name, value in replacements.items()
                }
            parameters = ComputedParameters(module._parameters, readers, weights_are_spread)
            replace_entry(module.__dict__, "_parameters", parameters)
            kind = kind_of(module)
            if kind is not None and (replacements or readers):
                attributes_before = dict(module.__dict__)
                kind.bind(module, ParametersComputedOnce(parameters))
                saved_entries.extend(
                    (module.__dict__, name, attributes_before[name])
                    for name in attributes_before
                    if module.__dict__[name] is not attributes_before[name]
                )
        packed_selection = ActiveAdapter(active.name, packed_adapters, active.merged_at_attach)
        with _use_selection(model, packed_selection), recomputed.recipe_hooks():
            yield
    finally:
        reshard(model)
        for table, key, value in reversed(saved_entries):
            table[key] = value


def _blend_weight(blend: Blend, module_view: nn.Module, weight_name: str, _: Any) -> Tensor:
    """The weight as a blend changes it. The last argument is the stored weight, not needed here."""
    return blend.changed_weights(module_view, wide=False)[weight_name]


def _differentiable_tensors(output: Any) -> Iterator[Tensor]:
    """Yield each floating-point tensor that requires a gradient in nested dicts and sequences."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for element in output.values() if isinstance(output, Mapping) else output:
            yield from _differentiable_tensors(element)
