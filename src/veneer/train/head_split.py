"""Split a causal language model's forward into its body and its head, so that the head can run on
chosen rows only.

    body(inputs) → hidden [b, s, h] → chosen rows [n, h] → head(rows) → logits [1, n, v]

b: rows of the batch; s: tokens; h: features; n: chosen hidden states; v: size of the vocabulary.
The head has no function of its own in the model. To compute it, the model's forward runs on a view
of the model (a copy that shares its parameters) in which the body returns the chosen rows.
`find_body` reads the source of the forward to find out whether it can be split. `Head` tests once
per model, on a few rows, that the head computes each row independently of the others.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import reduce
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from veneer import context
from veneer.attach import LayerState, adapters_of, submodule_calls, use, view
from veneer.distributed import base_class
from veneer.kernels import fused

#: by model, whether its head computes each row independently; filled by `Head.is_rowwise`
HEAD_IS_ROWWISE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

#: attributes in which torch keeps the hooks of a module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: names of submodules, each within the one before it, that lead from a model to a module
ModulePath = tuple[str, ...]


class Head:
    """The head of a model: its forward after the body, as a function of rows [n, h] (n hidden
    states of h features). A call returns the model's output, with logits [1, n, v].

    Args:
        body_path: the path of the body.
        inputs: the keyword arguments of the model's forward for the batch.
    """

    def __init__(self, model: nn.Module, body_path: ModulePath, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        if "output_router_logits" in inspect.signature(base_class(model).forward).parameters:
            # the forward that runs the body computes the load-balancing loss of the experts; the
            # head must not compute it again for each chunk of rows
            self.inputs = {**inputs, "output_router_logits": False}
        self.body_output: Any = None
        self.rows = self.logit_memory = torch.empty(0)
        #: whether `logit_memory` holds logits that are still needed and must not be overwritten
        self.memory_in_use = False
        self.model_view = self.reuse_memory(
            body_view(model, body_path, lambda *_, **__: with_rows(self.body_output, self.rows))
        )

    def __call__(self, rows: Tensor) -> Any:
        self.rows, self.memory_in_use = rows, False
        return self.model_view(**self.inputs)

    def release(self) -> None:
        """Drop the references to the tensors of the call. The head and its view of the model refer
        to each other, so the tensors would otherwise live until garbage is collected."""
        self.body_output, self.inputs = None, {}
        self.rows, self.logit_memory = torch.empty(0), torch.empty(0)

    def call_within_forward(self, rows: Tensor) -> Any:
        """Run the head on rows while the model's forward is running. This bypasses a wrapper of the
        forward, such as accelerate's autocast, which was already entered and is not reentrant."""
        self.rows = rows
        return base_class(self.model).forward(self.model_view, **self.inputs)

    def hidden_rows(self, output: Any, labels: Tensor, positions: Tensor) -> Tensor | None:
        """The hidden states of the body's output as rows [b · s, h]. None if there is not one
        hidden state for each token of the labels [b, s], or if the head does not compute each row
        independently, which is tested on the rows at the first `positions` (row indices [n]). Keeps
        the body's output, which later calls of the head need."""
        self.body_output = output
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != labels.shape:
            return None
        flat_rows = hidden.flatten(0, 1)
        sample_rows = flat_rows[positions[:3].to(flat_rows.device)].detach()
        return flat_rows if self.is_rowwise(sample_rows) else None

    def is_rowwise(self, rows: Tensor) -> bool:
        """Whether the head computes each row independently: the logits of `rows` [n, h] must stay
        the same in a larger batch and in another order. Tested once per model, with the first rows;
        without rows, an untested model counts as rowwise."""
        is_rowwise = HEAD_IS_ROWWISE.get(self.model)
        if is_rowwise is not None or len(rows) == 0:
            return is_rowwise is not False
        # The logits of both calls below are compared, so the second call must not write its logits
        # into the memory of the first: `memory_in_use` makes both calls allocate memory.
        model_adapters, self.memory_in_use = adapters_of(self.model), True
        # The test runs without the adapter, whose dropout would differ between the two calls. After
        # unrelated merges (an adapter merged over others that were not merged when it was attached)
        # nothing can be selected, and no adapter acts anyway. The test runs with gradients, because
        # autocast under no_grad would cache the weights that it casts, and the first chunk would
        # get these weights without a gradient.
        with (
            nullcontext()
            if model_adapters is None or model_adapters.has_unrelated_merges
            else use(self.model, model_adapters.merged)
        ):
            logits = self.call_within_forward(rows).logits
            batched_logits = self.call_within_forward(torch.cat([-rows, rows.flip(0)])).logits
        batched_shape = (1, 2 * len(rows), logits.shape[-1])
        is_rowwise = logits.shape[:-1] == (1, len(rows)) and batched_logits.shape == batched_shape
        if is_rowwise:
            first_logits, second_logits = (
                logits.detach()[0],
                batched_logits.detach()[0, len(rows) :].flip(0),
            )
            tolerance = torch.finfo(first_logits.dtype).eps ** 0.5 * float(first_logits.abs().max())
            is_rowwise = torch.allclose(
                first_logits, second_logits, rtol=0, atol=tolerance, equal_nan=True
            )
        HEAD_IS_ROWWISE[self.model], self.memory_in_use = is_rowwise, False
        return is_rowwise

    def reuse_memory(self, model: nn.Module) -> nn.Module:
        """A view of the model whose output layer writes the logits of each chunk into the memory of
        the previous chunk, because to allocate that much memory on a CPU takes time. In a call on
        another device, or if the layer trains, the layer works as usual. Returns the model itself
        if its output layer is not a plain `nn.Linear`, or has hooks or a forward of its own."""
        output_layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
        child_name = next(
            (name for name, child in model._modules.items() if child is output_layer is not None),
            None,
        )
        # A layer with one of these attributes is left alone, because the replacement would skip its
        # hooks, or the forward that accelerate has set on the instance.
        override_names = ("forward", *_HOOKS)
        if (
            child_name is None
            or type(output_layer) is not nn.Linear
            or any(output_layer.__dict__.get(attribute) for attribute in override_names)
        ):
            return model

        def forward(rows: Tensor) -> Tensor:
            weight, bias = output_layer.weight, output_layer.bias
            is_supported = (
                rows.is_cpu
                and fused.applies(rows, weight)
                and (bias is None or not bias.requires_grad)
            )
            # The model's forward may call the layer twice and need both outputs, so only the first
            # call of a forward writes into the memory.
            if self.memory_in_use or not is_supported:
                return functional.linear(rows, weight, bias)
            self.memory_in_use, logit_count = True, rows.shape[:-1].numel() * len(weight)
            if self.logit_memory.numel() < logit_count:
                self.logit_memory = rows.new_empty(logit_count)
            return _LinearInto.apply(rows, weight, bias, self.logit_memory)  # pyright: ignore[reportReturnType]

        return body_view(model, (child_name,), forward)


class _LinearInto(torch.autograd.Function):
    """A frozen linear layer that writes its output into preallocated memory."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor
    ) -> Tensor:
        flat_rows = rows.flatten(0, -2)
        output = memory[: len(flat_rows) * len(weight)].view(len(flat_rows), len(weight))
        ctx.save_for_backward(weight)
        if bias is None:
            torch.mm(flat_rows, weight.mT, out=output)
        else:
            torch.addmm(bias, flat_rows, weight.mT, out=output)
        # `.data`, because autograd would otherwise treat the result as a view of `memory`, which
        # later chunks overwrite
        return output.view(*rows.shape[:-1], len(weight)).data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None, None


def find_body(model: nn.Module) -> ModulePath | None:
    """The path to the module that computes a model's hidden states (its body), or None if the
    model's forward cannot be split into body and head."""
    # the model is not one of transformers, or is a wrapper that must see each call (DDP, FSDP)
    if not hasattr(type(model), "base_model_prefix"):
        return None
    # the split computes gradients within the forward, which cannot be part of a compiled graph
    if torch.compiler.is_compiling() or model.__dict__.get("_compiled_call_impl") is not None:
        return None
    if any(model.__dict__.get(hooks) for hooks in _HOOKS):
        return None  # hooks, such as FSDP2's, expect one call per batch
    class_forward = inspect.unwrap(base_class(model).forward)
    instance_forward = model.__dict__.get("forward")
    if instance_forward is not None and not (
        isinstance(instance_forward, MethodType)
        and instance_forward.__self__ is model
        and inspect.unwrap(instance_forward.__func__) is class_forward
    ):
        return None  # the instance's forward is not its class's, whose source is read below
    body_calls = [
        (path, is_late)
        for path, is_late in submodule_calls(class_forward)
        if _is_model(model, path)
    ]
    # A call is late if the forward reads its inputs or writes to the model after the call, so that
    # the head is not a function of the rows alone.
    if len(body_calls) != 1 or body_calls[0][1]:
        return None
    body_path = body_calls[0][0]
    if _head_acts_per_call(model, body_path):
        return None
    model_adapters = adapters_of(model)
    if model_adapters is not None:
        active_adapter = context.current.selection.get(model_adapters.uid, model_adapters.default)
        # A selection without a name but with layer adapters gives each row of the batch an adapter
        # of its own. If one of them changes the head, the head would not know which adapter is for
        # which of the hidden states that it gets.
        if (
            active_adapter.name is None
            and active_adapter.layer_adapters
            and _changes_outside(model, body_path, active_adapter.layer_adapters)
        ):
            return None
    return body_path


def _head_acts_per_call(model: nn.Module, body_path: ModulePath) -> bool:
    """Whether a module outside the body would repeat for each chunk an action that is meant to
    happen once per batch: gather a sharded head, or call a hook on the gradient of a parameter."""
    outside_modules = list(_modules_outside(model, body_path))
    outside_parameters = [
        parameter
        for module in outside_modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    if any(isinstance(parameter, DTensor) for parameter in outside_parameters):
        body_parameter_ids = {
            id(parameter) for parameter in model.get_submodule(".".join(body_path)).parameters()
        }
        if any(
            isinstance(parameter, DTensor) and id(parameter) not in body_parameter_ids
            for parameter in outside_parameters
        ):
            return True
    # An adapted head may read parameters in the body: if its weight is also a weight of the body,
    # such as the embedding's, the adapter's parameters for that weight may lie in the body. So the
    # parameters of the whole model are visited, but only for an adapted head, because this takes as
    # long in each step as a layer. A head that reads a weight of the body by its path is not
    # detected; no model of transformers does so.
    has_adapted_head = any(isinstance(module, LayerState) for module in outside_modules)
    return any(
        parameter.requires_grad and parameter._backward_hooks
        for parameter in (model.parameters() if has_adapted_head else outside_parameters)
    )


def _changes_outside(
    model: nn.Module, body_path: ModulePath, layer_adapters: Mapping[Any, Any]
) -> bool:
    """Whether an adapter changes a layer outside the body. ``layer_adapters``: the objects that
    compute the layers that the adapter changes, by ``LayerState.key``, or by (key, name of the
    method) for methods other than forward (``ActiveAdapter.layer_adapters``)."""
    outside_keys = [
        module.key
        for module in _modules_outside(model, body_path)
        if isinstance(module, LayerState)
    ]
    changed_keys = (
        {key[0] if isinstance(key, tuple) else key for key in layer_adapters}
        if outside_keys
        else set()
    )
    return any(key in changed_keys for key in outside_keys)


def changes_head(model: nn.Module, body_path: ModulePath) -> bool:
    """Whether the active adapter changes a layer outside the model's body."""
    model_adapters = adapters_of(model)
    if model_adapters is None:
        return False
    active_adapter = context.current.selection.get(model_adapters.uid, model_adapters.default)
    return (
        active_adapter is not None
        and bool(active_adapter.layer_adapters)
        and _changes_outside(model, body_path, active_adapter.layer_adapters or {})
    )


def _modules_outside(module: nn.Module, path: ModulePath) -> Iterator[nn.Module]:
    """A module and its descendants, except the module at ``path`` and its descendants."""
    if not path:
        return
    yield module
    for name, child in module._modules.items():
        if name == path[0]:
            yield from _modules_outside(child, path[1:])  # pyright: ignore[reportArgumentType]
        elif child is not None:
            yield from child.modules()


def _is_model(model: nn.Module, path: ModulePath) -> bool:
    """Whether the submodule at a path is a model of transformers."""
    module = reduce(lambda module, name: getattr(module, "_modules", {}).get(name), path, model)
    return hasattr(type(module), "base_model_prefix")


def body_view(module: nn.Module, path: ModulePath, replacement: Callable[..., Any]) -> nn.Module:
    """A view of a module (a copy that shares its parameters) in which `replacement` replaces the
    forward of the submodule at `path`, and the submodule has no hooks. The module itself is not
    changed."""
    if not path:
        module_view = view(module, type(module), {})
        module_view.__dict__.update(
            {hooks_name: OrderedDict() for hooks_name in _HOOKS},
            _compiled_call_impl=None,
            forward=replacement,
        )
        return module_view
    child_view = body_view(module._modules[path[0]], path[1:], replacement)  # pyright: ignore[reportArgumentType]
    module_view = view(module, type(module), {}, {path[0]: child_view})
    forward = module_view.__dict__.get("forward")
    if isinstance(forward, MethodType):
        module_view.__dict__["forward"] = MethodType(forward.__func__, module_view)
    return module_view


def with_rows(output: Any, rows: Tensor) -> Any:
    """A copy of the body's output whose hidden states are ``rows`` [n, h], as a batch of one."""
    new_output = copy.copy(output)
    new_output.last_hidden_state = rows[None]
    return new_output
