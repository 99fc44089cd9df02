"""What data-driven variants look at before they start, on the base alone, in evaluation mode:

inputs     Σ xᵀx over the batches, [g, in, in]          EVA
gradient   ∂ loss / ∂W over the batches, [g, out, in]   LoRA-GA
original   W before it was quantised, [g, out, in]      LoftQ
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.adapted_module import weight_of
from veneer.attach.install import Calibration
from veneer.attach.lookup import adapters_of, parameter_path
from veneer.attach.plan import LowRankPlan, Plans
from veneer.attach.state import BASE
from veneer.attach.targets import Names, ParamRef
from veneer.errors import ConfigError, raise_all, sentence
from veneer.layers import LAYERS, Layer, kind_of
from veneer.precision import double
from veneer.variants import VARIANTS

#: a second moment of more inputs than this does not fit into memory
MOST_INPUTS = 32_768

Loss = Callable[[nn.Module, Any], Tensor]


def gather(
    model: nn.Module,
    plans: Plans,
    *,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    original: nn.Module | Mapping[str, Tensor] | None,
) -> Calibration | None:
    """What the variant of ``plans`` needs, or None if it needs nothing. ``ConfigError``: something
    that it needs is missing or cannot be had from these layers, or something is given that it would
    ignore."""
    variant = VARIANTS[plans.config.variant]
    modules = Names(model).modules
    problems = list(
        _problems(plans, modules, batches is not None, loss is not None, original is not None)
    )
    raise_all(ConfigError, f"Variant {variant.name!r} cannot start", problems)
    found: dict[str, Mapping[ParamRef, Tensor]] = {}
    if batches is not None and "inputs" in variant.needs:
        found["inputs"] = _inputs(model, plans, modules, batches)
    if batches is not None and "gradient" in variant.needs:
        found["gradient"] = _gradients(model, plans, modules, batches, loss or _own_loss)
    if original is not None:
        found["original"] = _originals(plans, original)
    if not found:
        return None
    return lambda entry: {
        name: lambda values=values: values[entry.ref] for name, values in found.items()
    }


def _problems(
    plans: Plans, modules: Mapping[str, nn.Module], batches: bool, loss: bool, original: bool
) -> Iterator[str]:
    variant = VARIANTS[plans.config.variant]
    looks_at = {"batches": {"inputs", "gradient"}, "original": {"original"}, "loss": {"gradient"}}
    for (name, needs), given in zip(looks_at.items(), (batches, original, loss), strict=True):
        if given and not variant.needs & needs:
            yield sentence(
                f"{name}=",
                f"nothing that variant {variant.name!r} would ignore",
                f"leave {name} out",
            )
        elif not given and name != "loss" and variant.needs & needs:
            yield sentence(
                f"no {name}=", f"{name}, from which it starts", f"pass {name}= to attach"
            )
    for entry in filter(_starts, plans.low):
        where = entry.where
        if "inputs" in variant.needs and type(entry.layer).inputs is Layer.inputs:
            problem = f"{where}, of kind {entry.layer.name!r}, which does not tell its inputs"
            expected = ", ".join(
                kind.name for kind in LAYERS if type(kind).inputs is not Layer.inputs
            )
            yield sentence(problem, f"one of {expected}", "exclude it, or use another variant")
        elif "inputs" in variant.needs and entry.dims.in_ > MOST_INPUTS:
            problem = f"{where} with {entry.dims.in_} inputs"
            yield sentence(
                problem,
                f"at most {MOST_INPUTS}, whose second moment fits into memory",
                "exclude it",
            )
        weight = weight_of(modules[entry.path], entry.weight)
        if "gradient" in variant.needs and not (
            isinstance(weight, nn.Parameter) and entry.storage.name == "plain"
        ):
            problem = f"{where}, stored as {entry.storage.name}, which has no gradient"
            yield sentence(
                problem,
                "a plain parameter",
                "exclude it, or load the base in a floating-point dtype",
            )


def _starts(entry: LowRankPlan) -> bool:
    """Whether a variant starts there: not where rows of tokens alone are trained."""
    return entry.rank > 0


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    attached, modes = adapters_of(model), {module: module.training for module in model.modules()}
    try:
        with context.changed({attached.uid: BASE} if attached else {}):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = getattr(_call(model, batch), "loss", None)
    if loss is None:
        problem = "a model whose output has no .loss for these batches"
        raise ConfigError(
            problem, "batches with labels, or loss=", "pass loss=lambda model, batch: …"
        )
    return loss


def _inputs(
    model: nn.Module, plans: Plans, modules: Mapping[str, nn.Module], batches: Iterable[Any]
):
    moments: dict[ParamRef, Tensor] = {}

    def watch(entry: LowRankPlan, kind: Layer, weight: str) -> Callable:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            given.apply_defaults()
            rows = double(kind.inputs(module, weight, given.args))  # [g, tokens, in]
            moment = rows.mT @ rows
            moments[entry.ref] = moments[entry.ref] + moment if entry.ref in moments else moment

        return before

    with ExitStack() as stack:
        for entry in filter(_starts, plans.low):
            reader, kind, weight = _reader(entry, modules)
            handle = reader.register_forward_pre_hook(watch(entry, kind, weight), with_kwargs=True)
            stack.callback(handle.remove)
        with _base_alone(model), torch.no_grad():
            for batch in batches:
                _call(model, batch)
    _all_seen(plans, moments, "inputs")
    return moments


def _reader(entry: LowRankPlan, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, Layer, str]:
    """(module, kind, weight's name below it) of what computes with a weight: its module, or what
    that is a part of."""
    above, _, child = entry.path.rpartition(".")
    weight_reader = modules[above]
    kind = kind_of(weight_reader) if entry.path else None
    if kind is not None and child in kind.below(weight_reader):
        return weight_reader, kind, parameter_path(child, entry.weight)
    return modules[entry.path], entry.layer, entry.weight


def _gradients(
    model: nn.Module,
    plans: Plans,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss,
):
    weights = {
        entry.ref: weight_of(modules[entry.path], entry.weight)
        for entry in filter(_starts, plans.low)
    }
    if not weights:  # vectors alone, which no variant starts
        return {}
    required = {ref: weight.requires_grad for ref, weight in weights.items()}
    sums: dict[ParamRef, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with _base_alone(model), torch.enable_grad():
            for batch in batches:
                found = torch.autograd.grad(
                    loss(model, batch), list(weights.values()), allow_unused=True
                )
                for ref, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        own = double(gradient.detach().to_dense())  # of a sparse embedding, sparse
                        sums[ref] = sums[ref] + own if ref in sums else own
    finally:
        for ref, weight in weights.items():
            weight.requires_grad_(required[ref])
    _all_seen(plans, sums, "gradient")
    return {entry.ref: _chosen(entry, sums[entry.ref]) for entry in filter(_starts, plans.low)}


def _originals(plans: Plans, original: nn.Module | Mapping[str, Tensor]) -> dict[ParamRef, Tensor]:
    state = original.state_dict() if isinstance(original, nn.Module) else original
    problems, found = [], {}
    for entry in filter(_starts, plans.low):
        where = entry.where
        value = state.get(where)
        if value is None:
            problems.append(
                sentence(
                    f"no {where!r} in original",
                    "every adapted weight",
                    "pass the unquantised model",
                )
            )
        elif not value.is_floating_point() or value.numel() != torch.Size(entry.dims).numel():
            what = f"{where!r} of {value.dtype} and shape {tuple(value.shape)} in original"
            problems.append(
                sentence(what, f"the weight of {tuple(entry.dims)}", "pass the model from before")
            )
        else:
            found[entry.ref] = _chosen(entry, value.detach().float())
    raise_all(ConfigError, "The original weights cannot be used", problems)
    return found


def _chosen(entry: LowRankPlan, dense: Tensor) -> Tensor:
    """A tensor of the weight's shape as [g, out, in], of the chosen rows."""
    values = entry.layer.unfold(dense, entry.dims)
    return values if entry.rows is None else values[:, list(entry.rows)]


def _all_seen(plans: Plans, found: Mapping[ParamRef, Tensor], what: str) -> None:
    missing = [entry.where for entry in filter(_starts, plans.low) if entry.ref not in found]
    do = "exclude it"
    problems = [
        sentence(f"no {what} of {path!r} in the batches", "batches that reach it", do)
        for path in missing
    ]
    raise_all(ConfigError, "Nothing was attached", problems)
