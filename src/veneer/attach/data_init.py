"""Collect the data from which some variants initialise their parameters: sums over calibration
batches, or the weights from before the base was quantised.

inputs     Σ xᵀx over the inputs x of a layer in all batches, [g, in, in]     EVA, CorDA
gradient   Σ ∂ loss / ∂W over the batches, [g, out, in]                       LoRA-GA
original   W before it was quantised, which the user passes, [g, out, in]     LoftQ

g is the number of matrices in the weight, 1 for a linear layer. The batches run through the base
without adapters, in evaluation mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.install import Calibration
from veneer.attach.layer.lookup import adapters_of
from veneer.attach.layer.model_index import ModelIndex
from veneer.attach.layer.state import BASE
from veneer.attach.planning.plan import LowRankPlan, Plans
from veneer.bases import weight_of
from veneer.errors import ConfigError, raise_all, sentence
from veneer.layers import LAYERS, Layer, ParamRef, kind_of, parameter_path
from veneer.precision import double
from veneer.variants import VARIANTS

#: the largest ``in`` of a layer for which Σ xᵀx [in, in] is collected. At this size, the matrix
#: takes 8.6 GB in float64
MAX_MOMENT_INPUTS = 32_768

#: (model, batch) -> the loss of the model for the batch, a scalar tensor
Loss = Callable[[nn.Module, Any], Tensor]


def collect_calibration_data(
    model: nn.Module,
    plans: Plans,
    *,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    original: nn.Module | Mapping[str, Tensor] | None,
) -> Calibration | None:
    """Collect the data from which the variant of ``plans`` initialises its parameters. Returns a
    function that takes the plan of one weight and returns {name of the data, such as "inputs":
    function that returns the tensor}. None if the variant needs no data.

    Args:
        batches: the calibration batches. Each is a mapping of keyword arguments, a list or tuple of
            positional arguments, or the one argument of a call.
        loss: computes the loss of a batch, for LoRA-GA. If it is None, the loss is the attribute
            ``loss`` of the model's output.
        original: the model from before the base was quantised, or its state dict, for LoftQ.

    Raises:
        ConfigError: data that the variant needs are missing, or cannot be computed for some of the
            planned layers; or an argument was passed that the variant would ignore.
    """
    variant = VARIANTS[plans.config.variant]
    modules = ModelIndex(model).modules
    problems = list(
        _data_problems(plans, modules, batches is not None, loss is not None, original is not None)
    )
    raise_all(ConfigError, f"Variant {variant.name!r} cannot start", problems)
    data: dict[str, Mapping[ParamRef, Tensor]] = {}
    if batches is not None and "inputs" in variant.needs:
        data["inputs"] = _input_moments(model, plans, modules, batches)
    if batches is not None and "gradient" in variant.needs:
        data["gradient"] = _loss_gradients(model, plans, modules, batches, loss or _model_loss)
    if original is not None:
        data["original"] = _original_weights(plans, modules, original)
    if not data:
        return None
    return lambda weight_plan: {
        name: lambda tensors=tensors: tensors[weight_plan.ref] for name, tensors in data.items()
    }


def _data_problems(
    plans: Plans,
    modules: Mapping[str, nn.Module],
    has_batches: bool,
    has_loss: bool,
    has_original: bool,
) -> Iterator[str]:
    """An error text for each reason why the data cannot be collected: an argument that is missing
    or that the variant ignores, or a weight for which the variant's data cannot be computed."""
    variant = VARIANTS[plans.config.variant]
    data_by_argument = {
        "batches": {"inputs", "gradient"},
        "original": {"original"},
        "loss": {"gradient"},
    }
    passed_flags = (has_batches, has_original, has_loss)
    for (name, provided_data), was_passed in zip(
        data_by_argument.items(), passed_flags, strict=True
    ):
        if was_passed and not variant.needs & provided_data:
            yield sentence(
                f"{name}=",
                f"nothing that variant {variant.name!r} would ignore",
                f"leave {name} out",
            )
        elif not was_passed and name != "loss" and variant.needs & provided_data:
            yield sentence(
                f"no {name}=", f"{name}, from which the variant starts", f"pass {name}= to attach"
            )
    for weight_plan in filter(_has_low_rank, plans.low_rank_plans):
        path = weight_plan.full_path
        if "inputs" in variant.needs and type(weight_plan.layer).inputs is Layer.inputs:
            problem = f"{path}, of kind {weight_plan.layer.name!r}, whose inputs cannot be read"
            expected = ", ".join(
                kind.name for kind in LAYERS if type(kind).inputs is not Layer.inputs
            )
            yield sentence(problem, f"one of {expected}", "exclude it, or use another variant")
        elif "inputs" in variant.needs and weight_plan.dims.in_ > MAX_MOMENT_INPUTS:
            yield sentence(
                f"{path} with {weight_plan.dims.in_} inputs",
                f"at most {MAX_MOMENT_INPUTS}, whose second moment fits into memory",
                "exclude it",
            )
        weight = weight_of(modules[weight_plan.path], weight_plan.weight)
        if "gradient" in variant.needs and not (
            isinstance(weight, nn.Parameter) and weight_plan.storage.name == "plain"
        ):
            yield sentence(
                f"{path}, stored as {weight_plan.storage.name}, which has no gradient",
                "a plain parameter",
                "exclude it, or load the base in a floating-point dtype",
            )


def _has_low_rank(weight_plan: LowRankPlan) -> bool:
    """Whether the variant initialises a change of this weight. False if the adapter only trains
    some rows of the weight in full (``LoraConfig.trainable_tokens``)."""
    return weight_plan.rank > 0


@contextmanager
def _use_base(model: nn.Module) -> Iterator[None]:
    """A context manager in which the model runs without adapters, in evaluation mode."""
    model_adapters = adapters_of(model)
    selection = {model_adapters.uid: BASE} if model_adapters else {}
    with context.override(selection), context.evaluation_mode(model):
        yield


def _call_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The attribute ``loss`` of the model's output for a batch. Raises a ConfigError if the output
    has none."""
    loss = getattr(_call_model(model, batch), "loss", None)
    if loss is None:
        raise ConfigError(
            "a model whose output has no .loss for these batches",
            "batches with labels, or loss=",
            "pass loss=lambda model, batch: …",
        )
    return loss


def _input_moments(
    model: nn.Module, plans: Plans, modules: Mapping[str, nn.Module], batches: Iterable[Any]
):
    """{(path, name) of a planned weight: Σ xᵀx over the inputs x of its layer in all batches, [g,
    in, in], float64}, where g is the number of matrices in the weight, 1 for a linear layer. Raises
    a ConfigError if the batches do not reach some of the layers."""
    moments: dict[ParamRef, Tensor] = {}

    def make_hook(weight_plan: LowRankPlan, kind: Layer, weight_path: str) -> Callable:
        def add_moment(module: nn.Module, args: tuple, kwargs: dict) -> None:
            arguments = inspect.signature(module.forward).bind(*args, **kwargs)
            arguments.apply_defaults()
            input_vectors = double(
                kind.inputs(module, weight_path, arguments.args)
            )  # [g, tokens, in]
            moment = input_vectors.mT @ input_vectors
            moments[weight_plan.ref] = (
                moments[weight_plan.ref] + moment if weight_plan.ref in moments else moment
            )

        return add_moment

    with ExitStack() as stack:
        for weight_plan in filter(_has_low_rank, plans.low_rank_plans):
            module, kind, weight_path = _computing_layer(weight_plan, modules)
            hook = make_hook(weight_plan, kind, weight_path)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        with _use_base(model), torch.no_grad():
            for batch in batches:
                _call_model(model, batch)
    _require_all_weights(plans, moments, "inputs")
    return moments


def _computing_layer(
    weight_plan: LowRankPlan, modules: Mapping[str, nn.Module]
) -> tuple[nn.Module, Layer, str]:
    """(module, kind, path of the weight below this module) of the layer that computes with a
    planned weight. The layer is the module that holds the weight; or the parent of that module, if
    the parent computes with the weights of this child without calling it, as
    ``nn.MultiheadAttention`` does with its ``out_proj``."""
    parent_path, _, child_name = weight_plan.path.rpartition(".")
    parent = modules[parent_path]
    kind = kind_of(parent) if weight_plan.path else None
    if kind is not None and child_name in kind.below(parent):
        return parent, kind, parameter_path(child_name, weight_plan.weight)
    return modules[weight_plan.path], weight_plan.layer, weight_plan.weight


def _loss_gradients(
    model: nn.Module,
    plans: Plans,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss,
):
    """{(path, name) of a planned weight: Σ ∂ loss / ∂W over the batches, [g, out, in], float64},
    where g is the number of matrices in the weight. ``requires_grad`` of the weights is True during
    this function and restored afterwards. Raises a ConfigError if the loss does not depend on some
    of the weights."""
    weights = {
        weight_plan.ref: weight_of(modules[weight_plan.path], weight_plan.weight)
        for weight_plan in filter(_has_low_rank, plans.low_rank_plans)
    }
    if not weights:  # the adapter has no low-rank change to initialise
        return {}
    requires_grad_before = {ref: weight.requires_grad for ref, weight in weights.items()}
    gradient_sums: dict[ParamRef, Tensor] = {}
    uses_cudnn = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False  # its RNNs have no backward in eval mode
        for weight in weights.values():
            weight.requires_grad_(True)
        with _use_base(model), torch.enable_grad():
            for batch in batches:
                gradients = torch.autograd.grad(
                    loss(model, batch), list(weights.values()), allow_unused=True
                )
                for ref, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        dense_gradient = double(
                            gradient.detach().to_dense()
                        )  # embeddings may have sparse ones
                        gradient_sums[ref] = (
                            gradient_sums[ref] + dense_gradient
                            if ref in gradient_sums
                            else dense_gradient
                        )
    finally:
        torch.backends.cudnn.enabled = uses_cudnn
        for ref, weight in weights.items():
            weight.requires_grad_(requires_grad_before[ref])
    _require_all_weights(plans, gradient_sums, "gradient")
    return {
        weight_plan.ref: _planned_rows(weight_plan, gradient_sums[weight_plan.ref])
        for weight_plan in filter(_has_low_rank, plans.low_rank_plans)
    }


def _original_weights(
    plans: Plans, modules: Mapping[str, nn.Module], original: nn.Module | Mapping[str, Tensor]
) -> dict[ParamRef, Tensor]:
    """{(path, name) of a planned weight: the weight from before the base was quantised, [g, out,
    in], float32}, where g is the number of matrices in the weight.

    Args:
        original: the model from before the base was quantised, or its state dict.

    Raises:
        ConfigError: ``original`` lacks some of the weights, or has them in another shape or not in
            floating point.
    """
    original_is_module = isinstance(original, nn.Module)
    original_tensors = original.state_dict() if original_is_module else original
    # ``_was_conv1d`` needs the class that each module had before the base was quantised. If a state
    # dict was passed, look it up in the quantised modules, which record their first class.
    modules_with_class = (
        dict(original.named_modules(remove_duplicate=False)) if original_is_module else modules
    )
    problems, weights = [], {}
    for weight_plan in filter(_has_low_rank, plans.low_rank_plans):
        path = weight_plan.full_path
        weight = original_tensors.get(path)
        if weight is None:
            problems.append(
                sentence(
                    f"no {path!r} in original",
                    "every adapted weight",
                    "pass the unquantised model",
                )
            )
            continue
        base_weight = weight_of(modules[weight_plan.path], weight_plan.weight)
        shape = weight_plan.storage.shape(base_weight)
        is_transposed = not weight_plan.layer.out_axis and _was_conv1d(
            modules_with_class.get(weight_plan.path)
        )
        if weight.is_floating_point() and weight.shape == (shape[::-1] if is_transposed else shape):
            weight = weight.detach().float()
            weights[weight_plan.ref] = _planned_rows(
                weight_plan, weight.T if is_transposed else weight
            )
        else:
            problem = f"{path!r} of {weight.dtype} and shape {tuple(weight.shape)} in original"
            expected = f"a floating-point weight of shape {tuple(shape)}"
            if is_transposed:
                expected = f"a floating-point weight of a Conv1D, of shape {tuple(shape[::-1])}"
            problems.append(sentence(problem, expected, "pass the model before it was quantised"))
    raise_all(ConfigError, "The original weights cannot be used", problems)
    return weights


def _was_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is a Conv1D of transformers, whose weight is [in, out], or a quantised layer
    that transformers made from a Conv1D. The quantised layer records its first class as
    ``source_cls`` and holds the transposed weight, [out, in]."""
    cls = getattr(module, "source_cls", type(module))
    return issubclass(cls, LAYERS["conv1d_transformers"].types())


def _planned_rows(weight_plan: LowRankPlan, dense: Tensor) -> Tensor:
    """``dense``, a tensor of the weight's shape, as [g, out, in] with only the output rows that the
    plan changes; g is the number of matrices in the weight, 1 for a linear layer."""
    matrices = weight_plan.layer.unfold(dense, weight_plan.dims)
    return matrices if weight_plan.rows is None else matrices[:, list(weight_plan.rows)]


def _require_all_weights(plans: Plans, data: Mapping[ParamRef, Tensor], data_name: str) -> None:
    """Raise a ConfigError if ``data`` lacks some planned weights, because the batches did not reach
    their layers. ``data_name`` is "inputs" or "gradient"."""
    missing_paths = [
        weight_plan.full_path
        for weight_plan in filter(_has_low_rank, plans.low_rank_plans)
        if weight_plan.ref not in data
    ]
    advice = "exclude it"
    problems = [
        sentence(f"no {data_name} of {path!r} in the batches", "batches that reach it", advice)
        for path in missing_paths
    ]
    raise_all(ConfigError, "Nothing was attached", problems)
