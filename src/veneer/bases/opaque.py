"""Quantised linear layers of other libraries, each with its own forward: GPTQ and AWQ by gptqmodel,
HQQ, FP8 and compressed-tensors as transformers loads them. Veneer does not decode their packed
weights and only calls their forward:

    y = forward(x) + op(x; ΔW)          forward: the module's own
    ∂L/∂x = ∂L/∂y W                     if forward has no gradient; W is read in blocks of columns

The module itself therefore stands for the weight in the methods of ``Storage``. If the values of W
are needed (for an initialisation from W, for DoRA's norms, or for W + ΔW), they are computed by
running forward without bias on the rows of the identity:

    W[:, i] = forward(eᵢ)               in the dtype of the module; exact if only W is quantised

A forward that also rounds x has no gradient. Its gradient is taken to be that of x Wᵀ at the
unrounded x (a straight-through estimator, as in FP8 training). The packed weight cannot be
written, so a merge is refused. Rejected: a storage class for each library, to decode its packed
weights. The layouts differ by library and by kernel (gptqmodel alone has 40 kernels, some of which
repack the weight in the first call), while every library has a forward.

compressed-tensors has no class of its own. It wraps forward on the instance of an ``nn.Linear``,
and the first call of the model makes the weight dense. The module stands for its weight both before
and after that call, and the values of W are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from veneer.bases._base import BASES, Storage, register
from veneer.distributed import base_class
from veneer.errors import MergeError, TargetError, sentence

#: (Python module, class) of a quantised linear layer -> (name of its format, how to load its base
#: in a floating-point dtype, as advice in errors)
LIBRARIES = {
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"): (
        "GPTQ or AWQ",
        "the checkpoint that was quantised",
    ),
    ("hqq.core.quantize", "HQQLinear"): ("HQQ", "the checkpoint without HqqConfig"),
    ("transformers.integrations.finegrained_fp8", "FP8Linear"): (
        "FP8",
        "FineGrainedFP8Config(dequantize=True)",
    ),
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"): (
        "FP8 of fbgemm",
        "the checkpoint that was quantised",
    ),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"): (
        "FP8 of compressed-tensors",
        "CompressedTensorsConfig(dequantize=True)",
    ),
}
#: the linear layers whose forward is always a kernel without a derivative
WITHOUT_GRADIENT = {
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"),
}
#: name and loading advice, as in ``LIBRARIES``, for linear layers that compressed-tensors has
#: quantised
COMPRESSED = (
    "compressed-tensors",
    "CompressedTensorsConfig(dequantize=True), which takes no more than its first call",
)
#: name and loading advice, as in ``LIBRARIES``, for stacks of experts: only their own forward can
#: read their weights, and it computes more than one product
EXPERTS = {
    ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts"): (
        "MXFP4",
        "Mxfp4Config(dequantize=True)",
    ),
    ("transformers.integrations.finegrained_fp8", "FP8Experts"): (
        "FP8",
        "FineGrainedFP8Config(dequantize=True)",
    ),
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Llama4TextExperts"): (
        "FP8 of fbgemm",
        "the checkpoint that was quantised",
    ),
}
#: the implementations of stacks of ``EXPERTS`` (``set_experts_implementation``) that have a
#: derivative; the kernels of all others have none
EXPERTS_WITH_GRADIENT: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformers.integrations.finegrained_fp8", "FP8Experts"): ("eager", "grouped_mm"),
}
#: the most columns of W that one call of forward computes, from as many rows of the identity
COLUMNS_PER_CALL = 1 << 10


def _imported_class(class_path: tuple[str, str]) -> Any:
    """The class with this (Python module, name); None if the module has not been imported, because
    then there can be no instance."""
    return getattr(sys.modules.get(class_path[0]), class_path[1], None)


def _value_for_class(module: nn.Module, value_by_class: Mapping[tuple[str, str], Any]) -> Any:
    """The value for the class of ``module`` in ``value_by_class``, whose keys are (Python module,
    class name). Subclasses match too, and the first match counts. None if no class matches."""
    return next(
        (
            value
            for class_path, value in value_by_class.items()
            if (cls := _imported_class(class_path)) and isinstance(module, cls)
        ),
        None,
    )


def _subclasses(cls: Any) -> Iterator[Any]:
    """``cls`` and all its subclasses, without the subclasses that Veneer creates for adapted
    modules."""
    yield cls
    for subclass in cls.__subclasses__():
        if "veneer_base" not in subclass.__dict__:
            yield from _subclasses(subclass)


def _format_of(module: nn.Module) -> tuple[str, str] | None:
    """(name of the quantisation format, how to load the base unquantised) of a linear layer that is
    an instance of a class in ``LIBRARIES`` or quantised by compressed-tensors; else None."""
    if is_compressed(module):
        return COMPRESSED
    return _value_for_class(module, LIBRARIES)


def is_compressed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight compressed-tensors has packed (status
    "compressed"), or has made dense in the first call of the model (status "decompressed"). False
    for a layer whose weight the library quantises again in each call, because such a call does not
    have the gradient of a product with the weight."""
    attributes = module.__dict__
    if (scheme := attributes.get("quantization_scheme")) is None or not isinstance(
        module, nn.Linear
    ):
        return False
    # A hook of accelerate (``_hf_hook``) takes the place of the library's wrapper of ``forward``,
    # so the layer cannot be adapted. A hook on a layer that already has an adapted class is
    # harmless, because the adapter had replaced that wrapper before.
    is_hooked = "_hf_hook" in attributes and not hasattr(type(module), "veneer_base")
    is_stored_by_library = getattr(scheme, "weights", None) is not None and not is_hooked
    return is_stored_by_library and attributes.get("quantization_status") in (
        "compressed",
        "decompressed",
    )


def is_storage_detail(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` of a module is one in which compressed-tensors stores the
    weight (such as "weight_scale"). Such a parameter is not a target of its own for configs."""
    return (
        name.startswith("weight")
        and "quantization_scheme" in module.__dict__
        and is_compressed(module)
    )


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is a quantised linear layer whose weight only its own forward can read, so
    that the module itself stands for the weight in the methods of ``Storage``."""
    if (
        cls := _imported_class(("transformers.integrations.finegrained_fp8", "FP8Linear"))
    ) and isinstance(module, cls):
        weight: Any = module._parameters.get("weight")
        return (
            weight is not None
            and weight.element_size() == 1
            and base_class(module).forward is cls.forward
        )
    return _format_of(module) is not None


def without_gradient(module: nn.Module) -> bool:
    """Whether a quantised module's forward may pass no gradient to its input, according to its
    class or its quantisation scheme. Such a module may still be part of a model that trains,
    because ``Opaque.call`` runs its forward: it supplies the gradient of a linear layer, and raises
    an error for a stack of experts whose implementation has none."""
    # All stacks of experts count, because some of their implementations have no gradient, and a
    # user may switch the implementation at any time.
    class_paths = (*WITHOUT_GRADIENT, *EXPERTS)
    if any(
        (cls := _imported_class(class_path)) and isinstance(module, cls)
        for class_path in class_paths
    ):
        return True
    if is_compressed(module):
        scheme: Any = module.quantization_scheme
        return any(
            getattr(scheme, f"{side}_activations", None) is not None for side in ("input", "output")
        )
    # gptqmodel sets ``SUPPORTS_TRAINING`` to False on layers whose kernel has no gradient
    return is_opaque(module) and getattr(module, "SUPPORTS_TRAINING", True) is False


def _experts_pass_gradient(module: nn.Module) -> bool:
    """Whether the forward of a quantised stack of experts is differentiable in the implementation
    that its config selects now (``set_experts_implementation``)."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None) or "eager"
    return implementation in (_value_for_class(module, EXPERTS_WITH_GRADIENT) or ())


def unreadable(module: nn.Module) -> tuple[str, str] | None:
    """For a module with quantised weights to which no adapter can be attached, (the format as a
    relative clause, advice how to load the base), for an error message; else None."""
    unreadable_format = _value_for_class(module, EXPERTS)
    if (
        unreadable_format is None
        and getattr(module, "quantization_scheme", None) is not None
        and not is_compressed(module)
    ):
        unreadable_format = COMPRESSED
    linear_format = _format_of(module) if unreadable_format is None else None
    if linear_format is not None and not is_opaque(module):
        weight: Any = module._parameters.get("weight")
        if weight is not None and weight.element_size() == 1:
            unreadable_format = linear_format
    return (
        None
        if unreadable_format is None
        else (
            f"whose weights are stored as {unreadable_format[0]}",
            f"load the base with {unreadable_format[1]}",
        )
    )


class _ProductGradient(torch.autograd.Function):
    """y = forward(x) of a quantised linear layer. The backward pass uses the gradient of x Wᵀ,
    ∂L/∂x = ∂L/∂y W, computed for one block of columns of W after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], module: nn.Module
    ) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        blocks = [gradient @ columns.to(gradient.dtype) for columns in _read_columns(ctx.module)]
        return torch.cat(blocks, -1).to(ctx.dtype), None, None


def _read_columns(module: Any) -> Iterator[Tensor]:
    """The dense weight W [out, in] of an opaque linear layer, in blocks of at most
    ``COLUMNS_PER_CALL`` columns."""
    if is_compressed(module):
        yield from _decompress(module).split(COLUMNS_PER_CALL, 1)
        return
    forward, storage, in_features = (
        _without_bias(module).forward,
        BASES["opaque"],
        module.in_features,
    )
    device, dtype = storage.device(module), storage.dtype(module)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first in range(0, in_features, COLUMNS_PER_CALL):
            inputs = torch.zeros(
                min(COLUMNS_PER_CALL, in_features - first) + 1,
                in_features,
                dtype=dtype,
                device=device,
            )
            inputs[:-1, first:].fill_diagonal_(1)
            y = forward(inputs)
            y_of_zeros = y[-1]  # the bias, if a kernel still adds a packed copy of it
            yield (y[:-1] - y_of_zeros).mT


def _decompress(module: Any) -> Tensor:
    """The dense weight of a linear layer of compressed-tensors, decompressed by that library on a
    view, so that the module itself stays packed."""
    if module.quantization_status == "compressed":
        module = _without_bias(module)
        import_module("compressed_tensors.compressors.base").decompress_module(module)
    return module.weight.detach()


@register
class Opaque(Storage):
    name = "opaque"
    opaque = True

    def holds(self, weight: object) -> bool:
        return isinstance(weight, nn.Module) and is_opaque(weight)

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        return {}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        blocks = [*_read_columns(weight)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        raise MergeError(self.refusal(weight))

    def refusal(self, weight: Any) -> str:
        """The text of the error that a merge into this weight raises."""
        unknown_format = ("quantised", "the checkpoint that was quantised")
        format_name, advice = _format_of(weight) or unknown_format
        return sentence(
            f"a weight stored as {format_name}, which only its own library writes",
            "numbers to write",
            f"load the base in a floating-point dtype ({advice}), load the adapter on it and merge "
            "there, or keep the adapter unmerged",
        )

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("hqq") is None:
            return
        hqq = import_module("hqq.core.quantize")
        for dtype in (torch.float32, torch.bfloat16):
            config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
            yield hqq.HQQLinear(nn.Linear(64, 32), config, compute_dtype=dtype, device="cpu")

    def label(self, weight: Any) -> str:
        return (_format_of(weight) or (self.name, ""))[0]

    def dtype(self, weight: Any) -> torch.dtype:
        """The dtype in which the module computes, found in the attributes that its library sets;
        bfloat16 if there are none."""
        if is_compressed(weight):
            parameters = weight._parameters
            dtype = parameters[
                "weight" if weight.quantization_status == "decompressed" else "weight_scale"
            ].dtype
            return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
        compute_dtype = getattr(weight, "compute_dtype", None)
        tensors = (getattr(weight, name, None) for name in ("scales", "bias"))
        return compute_dtype or next(
            (tensor.dtype for tensor in tensors if tensor is not None), torch.bfloat16
        )

    def device(self, weight: Any) -> torch.device:
        # not recursive, to leave out attached adapters, which are submodules
        tensors = (*weight.buffers(False), *weight.parameters(False))
        return next(tensor.device for tensor in tensors)

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size((weight.out_features, weight.in_features))

    def modules(self) -> tuple[type[nn.Module], ...]:
        classes = (cls for class_path in LIBRARIES if (cls := _imported_class(class_path)))
        return tuple(subclass for cls in classes for subclass in _subclasses(cls))

    def call(
        self, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """y = forward(x, …) of the module, with a gradient for x even if forward has none. If the
        gradient were missing, the layers below would silently train with a wrong one.

        Args:
            module: an opaque linear layer, or a quantised stack of experts.
            forward: the module's own forward, called with ``args`` and ``kwargs``. x is the first
                of these.

        Raises:
            TargetError: x requires a gradient, and the module is a stack of experts whose current
                implementation has none.
        """
        x = next(iter((*args, *kwargs.values())), None)
        if x is None or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(*args, **kwargs)
        if not is_opaque(module):
            if _experts_pass_gradient(module):
                return forward(*args, **kwargs)
            format_name, advice = _value_for_class(module, EXPERTS)
            raise TargetError(
                f"{base_class(module).__name__}, whose {format_name} kernels pass no gradient on "
                "to the layers below, which train",
                "layers that do, above one that trains",
                f"load the base with {advice} and train on it, or call it under torch.no_grad()",
            )
        if without_gradient(module):
            return _ProductGradient.apply(x, forward, module)  # pyright: ignore[reportReturnType]
        y = forward(*args, **kwargs)
        return y if y.requires_grad else _ProductGradient.apply(x, lambda _: y, module)  # pyright: ignore[reportReturnType]


def _without_bias(module: nn.Module) -> nn.Module:
    """A view of a module: an object of its base class that shares its tensors, but in which the
    bias is None, whether the module holds it as a parameter, a buffer or an attribute."""
    view = object.__new__(base_class(module))
    view.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers"):
        tensors = getattr(module, table)
        view.__dict__[table] = {
            name: None if name == "bias" else value for name, value in tensors.items()
        }
    if "bias" in view.__dict__:
        view.__dict__["bias"] = None
    # leave out attached adapters, which are submodules, so that the view does not change their mode
    view.__dict__.update(training=False, _modules={})
    # accelerate's hook sets ``forward`` on the instance, bound to ``module``. Without it, the view
    # runs the forward of its class, which does not include the adapter of ``module``.
    if "_hf_hook" in view.__dict__:
        view.__dict__.pop("forward", None)
    return view


def weight_of(module: nn.Module, name: str) -> Any:
    """The object that stores a weight, for the methods of ``Storage``: its ``Parameter``, the
    ``ParametrizationList`` that computes it, or the module itself if only the module's own forward
    can read the weight. None if the module has no weight of this name."""
    parameters = module._parameters
    # no ``get``, because the parameters of a ScriptModule are not a dict
    weight = parameters[name] if name in parameters else None  # noqa: SIM401
    if weight is None and (parametrizations := module._modules.get("parametrizations")) is not None:
        return parametrizations._modules.get(name)
    # ``is_opaque`` costs time, so first a cheap test that every opaque layer passes, but few other
    # modules: there is no parameter of this name, the parameter has one byte per element, or
    # compressed-tensors has quantised the module.
    if (
        name == "weight"
        and (
            weight is None or weight.dtype.itemsize == 1 or "quantization_scheme" in module.__dict__
        )
        and is_opaque(module)
    ):
        return module
    return weight


def own_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters, without those of its submodules: plain ones,
    parametrised ones, and "weight" for an opaque linear layer, even if its weight is no
    parameter."""
    parametrised = getattr(module, "parametrizations", {}) if is_parametrized(module) else {}
    plain = [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_storage_detail(module, name)
    ]
    opaque = ["weight"] if "weight" not in plain and is_opaque(module) else []
    return [*plain, *parametrised, *opaque]
