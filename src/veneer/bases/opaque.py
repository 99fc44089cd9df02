"""Quantised linear layers of other libraries, each with its own forward: GPTQ and AWQ by gptqmodel,
HQQ, FP8 and compressed-tensors as transformers loads them. Veneer does not read their bytes and
only calls forward:

    y = forward(x) + op(x; ΔW)          forward: the module's own
    ∂L/∂x = ∂L/∂y W                     if forward has no gradient; W is read in blocks of columns

The weight is therefore represented by the module itself. If the values of W are needed (for a
variant that starts from it, a gain, or W + ΔW), forward is run without bias on the rows of the
identity:

    W[:, i] = forward(eᵢ)               in the dtype of the module; exact if only W is quantised

A forward that also rounds x has no gradient. Its gradient is taken to be that of x Wᵀ at the
unrounded x (a straight-through estimator, as in FP8 training). Nothing can be written, so a merge
is refused. Rejected: a storage for each library that reads its bytes. The libraries have only the
forward in common, and the layouts of their weights change with their kernels (gptqmodel alone has
40 kernels, some of which repack the weight in the first call).

compressed-tensors has no class of its own. It wraps forward on the instance of an ``nn.Linear``,
and the first call of the model makes the weight dense. The module represents its weight before and
after that call, with the same values.
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
#: how many columns of W one call of forward reads
COLUMNS_PER_CALL = 1 << 10


def _class(path: tuple[str, str]) -> Any:
    """The class with this (Python module, name); None if the module has not been imported, because
    then there can be no instance."""
    return getattr(sys.modules.get(path[0]), path[1], None)


def _entry(module: nn.Module, table: Mapping[tuple[str, str], Any]) -> Any:
    """The first value in ``table`` whose key, a (Python module, class), names a class that
    ``module`` is an instance of; None if there is none."""
    return next(
        (
            value
            for path, value in table.items()
            if (cls := _class(path)) and isinstance(module, cls)
        ),
        None,
    )


def _subclasses(cls: Any) -> Iterator[Any]:
    """``cls`` and its subclasses, without the classes of adapted modules."""
    yield cls
    for subclass in cls.__subclasses__():
        if "veneer_base" not in subclass.__dict__:
            yield from _subclasses(subclass)


def _format_of(module: nn.Module) -> tuple[str, str] | None:
    """The name of the format and the loading advice, if a module is of a class of ``LIBRARIES`` or
    quantised by compressed-tensors; else None."""
    if is_compressed(module):
        return COMPRESSED
    return _entry(module, LIBRARIES)


def is_compressed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight compressed-tensors has packed, or has made
    dense in the first call of the model. False for a layer whose weight the library quantises anew
    in each call, because the gradient of such a call is not that of a product with the weight."""
    attributes = module.__dict__
    if (scheme := attributes.get("quantization_scheme")) is None or not isinstance(
        module, nn.Linear
    ):
        return False
    # a hook of accelerate replaces the library's wrapper of forward, unless an adapter has already
    # replaced that wrapper
    is_hooked = "_hf_hook" in attributes and not hasattr(type(module), "veneer_base")
    is_stored_by_library = getattr(scheme, "weights", None) is not None and not is_hooked
    return is_stored_by_library and attributes.get("quantization_status") in (
        "compressed",
        "decompressed",
    )


def is_storage_detail(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one that compressed-tensors uses to store the weight, so that configs
    must not name it."""
    return (
        name.startswith("weight")
        and "quantization_scheme" in module.__dict__
        and is_compressed(module)
    )


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is a linear layer of which only the forward can be used, so that the module
    itself represents its weight."""
    if (cls := _class(("transformers.integrations.finegrained_fp8", "FP8Linear"))) and isinstance(
        module, cls
    ):
        weight: Any = module._parameters.get("weight")
        return (
            weight is not None
            and weight.element_size() == 1
            and base_class(module).forward is cls.forward
        )
    return _format_of(module) is not None


def without_gradient(module: nn.Module) -> bool:
    """Whether forward may pass no gradient to its input, as far as the class or the quantisation
    scheme tells. Such a module can be adapted all the same: ``Opaque.call`` handles each call."""
    # stacks of experts count, because some of their implementations have no gradient, and a user
    # may choose another implementation at any time
    classes = (*WITHOUT_GRADIENT, *EXPERTS)
    if any((cls := _class(path)) and isinstance(module, cls) for path in classes):
        return True
    if is_compressed(module):
        scheme: Any = module.quantization_scheme
        return any(
            getattr(scheme, f"{side}_activations", None) is not None for side in ("input", "output")
        )
    # ``SUPPORTS_TRAINING`` is an attribute of gptqmodel's layers
    return is_opaque(module) and getattr(module, "SUPPORTS_TRAINING", True) is False


def _experts_pass_gradient(module: nn.Module) -> bool:
    """Whether a stack of experts has a derivative in the implementation that is set now."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None) or "eager"
    return implementation in (_entry(module, EXPERTS_WITH_GRADIENT) or ())


def unreadable(module: nn.Module) -> tuple[str, str] | None:
    """(description, advice) if a module has quantised weights and cannot carry an adapter, for an
    error message; else None."""
    description = _entry(module, EXPERTS)
    if (
        description is None
        and getattr(module, "quantization_scheme", None) is not None
        and not is_compressed(module)
    ):
        description = COMPRESSED
    format_and_advice = _format_of(module) if description is None else None
    if format_and_advice is not None and not is_opaque(module):
        weight: Any = module._parameters.get("weight")
        if weight is not None and weight.element_size() == 1:
            description = format_and_advice
    return (
        None
        if description is None
        else (
            f"whose weights are stored as {description[0]}",
            f"load the base with {description[1]}",
        )
    )


class _Product(torch.autograd.Function):
    """y = forward(x) of a module, with the gradient of x Wᵀ: ∂L/∂x = ∂L/∂y W, computed for a few
    columns of W at a time."""

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
        blocks = [gradient @ columns.to(gradient.dtype) for columns in _columns(ctx.module)]
        return torch.cat(blocks, -1).to(ctx.dtype), None, None


def _columns(module: Any) -> Iterator[Tensor]:
    """W in blocks of at most ``COLUMNS_PER_CALL`` columns, [out, ≤ COLUMNS_PER_CALL] each."""
    if is_compressed(module):
        yield from _decompress(module).split(COLUMNS_PER_CALL, 1)
        return
    forward, storage, in_ = _without_bias(module).forward, BASES["opaque"], module.in_features
    device, dtype = storage.device(module), storage.dtype(module)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first in range(0, in_, COLUMNS_PER_CALL):
            rows = torch.zeros(
                min(COLUMNS_PER_CALL, in_ - first) + 1, in_, dtype=dtype, device=device
            )
            rows[:-1, first:].fill_diagonal_(1)
            y = forward(rows)
            y_of_zeros = y[-1]  # the bias, if a kernel has packed it too
            yield (y[:-1] - y_of_zeros).mT


def _decompress(module: Any) -> Tensor:
    """The dense weight of a linear layer of compressed-tensors, by that library. The module itself
    stays packed."""
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
        blocks = [*_columns(weight)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        raise MergeError(self.refusal(weight))

    def refusal(self, weight: Any) -> str:
        """The error message that says why nothing can be merged into this weight."""
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
        """The dtype in which the module computes."""
        if is_compressed(weight):
            weights = weight._parameters
            dtype = weights[
                "weight" if weight.quantization_status == "decompressed" else "weight_scale"
            ].dtype
            return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
        compute_dtype = getattr(weight, "compute_dtype", None)
        tensors = (getattr(weight, name, None) for name in ("scales", "bias"))
        return compute_dtype or next(
            (tensor.dtype for tensor in tensors if tensor is not None), torch.bfloat16
        )

    def device(self, weight: Any) -> torch.device:
        # not recursive, so that adapters that are submodules are left out
        tensors = (*weight.buffers(False), *weight.parameters(False))
        return next(tensor.device for tensor in tensors)

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size((weight.out_features, weight.in_features))

    def modules(self) -> tuple[type[nn.Module], ...]:
        classes = (cls for path in LIBRARIES if (cls := _class(path)))
        return tuple(subclass for cls in classes for subclass in _subclasses(cls))

    def call(
        self, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """y = forward(x, …) of the module, with a gradient for x even if forward has none. Without
        it, a forward that cuts the graph would silently give the trained layers below a wrong
        gradient.

        Raises:
            TargetError: x requires a gradient, and the module is no linear layer, so its gradient
                is not known.
        """
        x = next(iter((*args, *kwargs.values())), None)
        if x is None or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(*args, **kwargs)
        if not is_opaque(module):
            if _experts_pass_gradient(module):
                return forward(*args, **kwargs)
            format_name, advice = _entry(module, EXPERTS)
            raise TargetError(
                f"{base_class(module).__name__}, whose {format_name} kernels pass no gradient on "
                "to the layers below, which train",
                "layers that do, above one that trains",
                f"load the base with {advice} and train on it, or call it under torch.no_grad()",
            )
        if without_gradient(module):
            return _Product.apply(x, forward, module)  # pyright: ignore[reportReturnType]
        y = forward(*args, **kwargs)
        return y if y.requires_grad else _Product.apply(x, lambda _: y, module)  # pyright: ignore[reportReturnType]


def _without_bias(module: nn.Module) -> nn.Module:
    """A view of a module: an object of its class with the same tensors, but without the bias,
    wherever it is stored."""
    view = object.__new__(base_class(module))
    view.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers"):
        tensors = getattr(module, table)
        view.__dict__[table] = {
            name: None if name == "bias" else value for name, value in tensors.items()
        }
    if "bias" in view.__dict__:
        view.__dict__["bias"] = None
    # leave out adapters that are submodules, and keep their mode unchanged
    view.__dict__.update(training=False, _modules={})
    # the wrapper of accelerate would call the forward of ``module`` itself, with its adapter
    if "_hf_hook" in view.__dict__:
        view.__dict__.pop("forward", None)
    return view


def weight_of(module: nn.Module, name: str) -> Any:
    """The object that stores a weight: its ``Parameter``, the ``ParametrizationList`` that
    computes it, or the module itself if only the module's own library can read the weight."""
    parameters = module._parameters
    # no ``get``, because the parameters of a ScriptModule are not a dict
    weight = parameters[name] if name in parameters else None  # noqa: SIM401
    if weight is None and (parametrizations := module._modules.get("parametrizations")) is not None:
        return parametrizations._modules.get(name)
    # First a cheap test that all opaque layers pass and few other modules: the module has no
    # parameter of this name, the parameter has one byte per element, or compressed-tensors has
    # quantised the module.
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
    """The names of a module's parameters, without submodules: plain and parametrised ones, and
    "weight" for a module whose storage is opaque."""
    parametrised = getattr(module, "parametrizations", {}) if is_parametrized(module) else {}
    plain = [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_storage_detail(module, name)
    ]
    opaque = ["weight"] if "weight" not in plain and is_opaque(module) else []
    return [*plain, *parametrised, *opaque]
