"""Linear layers that other libraries store quantised, each with its own forward: GPTQ and AWQ by
gptqmodel, HQQ, FP8 and compressed-tensors as transformers loads them. Veneer does not read their
bytes and only calls forward:

    y = forward(x) + op(x; ΔW)          forward: the module's own
    ∂L/∂x = ∂L/∂y W                     if forward has no gradient; W is read in blocks of columns

The weight is therefore represented by the module itself. If the values of W are needed (for a
variant that starts from it, a gain, or W + ΔW), forward is run without bias on the rows of the
identity:

    W[:, i] = forward(eᵢ)               in the dtype of the module; exact if only W is quantised

A forward that also rounds x has no gradient; it gets the gradient of W at the unrounded x (a
straight-through estimator, as in FP8 training). Nothing can be written, so a merge is refused.
Rejected: a storage for each library, because the parts that they have in common are those used
here, and their layouts change with their kernels (gptqmodel alone has 40, some of which repack the
weight in the first call).

compressed-tensors has no class of its own: it wraps forward on the instance of an ``nn.Linear``,
and one call of the model makes the weight dense. The module represents its weight before and after
that call, with the same values.
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

#: (module, class) of each: its name, and how to load its base in a floating-point dtype
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
#: libraries whose forward is always a kernel without a derivative
WITHOUT_GRADIENT = {
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"),
}
#: the same for a linear layer that compressed-tensors quantised
COMPRESSED = (
    "compressed-tensors",
    "CompressedTensorsConfig(dequantize=True), which takes no more than its first call",
)
#: the same for modules whose weights only their own forward can read, and whose forward is more
#: than one product
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
#: those whose kernels have no derivative
EXPERTS_WITHOUT_GRADIENT = (
    ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts"),
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Llama4TextExperts"),
)
#: how many columns of W to read in one call
COLUMNS = 1 << 10


def _class(path: tuple[str, str]) -> Any:
    """A class of a module that has been imported; without an import, there can be no instance."""
    return getattr(sys.modules.get(path[0]), path[1], None)


def _below(cls: Any) -> Iterator[Any]:
    yield cls
    for below in cls.__subclasses__():
        if "veneer_base" not in below.__dict__:
            yield from _below(below)


def _kind(module: nn.Module) -> tuple[str, str] | None:
    """The name of the format and the advice, if a module is one of ``LIBRARIES`` or of
    compressed-tensors."""
    if is_compressed(module):
        return COMPRESSED
    return next(
        (
            description
            for path, description in LIBRARIES.items()
            if (cls := _class(path)) and isinstance(module, cls)
        ),
        None,
    )


def is_compressed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight compressed-tensors packed, or made dense in
    the first call of the model. False for one that it quantises in each call, because the gradient
    of its call is not that of its weight."""
    attributes = module.__dict__
    if (scheme := attributes.get("quantization_scheme")) is None or not isinstance(
        module, nn.Linear
    ):
        return False
    # accelerate's hooks replace the library's wrapper, unless an adapter has replaced it before
    hooked = "_hf_hook" in attributes and not hasattr(type(module), "veneer_base")
    stored_by_library = getattr(scheme, "weights", None) is not None and not hooked
    return stored_by_library and attributes.get("quantization_status") in (
        "compressed",
        "decompressed",
    )


def hidden(module: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the storage of compressed-tensors, so that configs must not
    name it."""
    return (
        name.startswith("weight")
        and "quantization_scheme" in module.__dict__
        and is_compressed(module)
    )


def is_opaque(module: nn.Module) -> bool:
    """Whether only the forward of a linear layer is known, so that the module represents its
    weight."""
    if (cls := _class(("transformers.integrations.finegrained_fp8", "FP8Linear"))) and isinstance(
        module, cls
    ):
        weight: Any = module._parameters.get("weight")
        return (
            weight is not None
            and weight.element_size() == 1
            and base_class(module).forward is cls.forward
        )
    return _kind(module) is not None


def without_gradient(module: nn.Module) -> bool:
    """Whether forward passes no gradient to its input, as far as its class or scheme shows."""
    classes = (*WITHOUT_GRADIENT, *EXPERTS_WITHOUT_GRADIENT)
    if any((cls := _class(path)) and isinstance(module, cls) for path in classes):
        return True
    if is_compressed(module):
        scheme: Any = module.quantization_scheme
        return any(
            getattr(scheme, f"{side}_activations", None) is not None for side in ("input", "output")
        )
    # for gptqmodel's kernels
    return is_opaque(module) and getattr(module, "SUPPORTS_TRAINING", True) is False


def unreadable(module: nn.Module) -> tuple[str, str] | None:
    """(description, advice) for a module with quantised weights that cannot carry an adapter."""
    description = next(
        (
            description
            for path, description in EXPERTS.items()
            if (cls := _class(path)) and isinstance(module, cls)
        ),
        None,
    )
    if (
        description is None
        and getattr(module, "quantization_scheme", None) is not None
        and not is_compressed(module)
    ):
        description = COMPRESSED
    if description is None and (kind := _kind(module)) is not None and not is_opaque(module):
        weight: Any = module._parameters.get("weight")
        description = kind if weight is not None and weight.element_size() == 1 else None
    return (
        None
        if description is None
        else (
            f"whose weights are stored as {description[0]}",
            f"load the base with {description[1]}",
        )
    )


class _Product(torch.autograd.Function):
    """y = forward(x) of a module, with the gradient of x Wᵀ: ∂L/∂x = ∂L/∂y W, a few columns at a
    time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], weight: nn.Module
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        gradients_of_x = [gradient @ columns.to(gradient.dtype) for columns in _columns(ctx.weight)]
        return torch.cat(gradients_of_x, -1).to(ctx.dtype), None, None


def _columns(module: Any) -> Iterator[Tensor]:
    """W in blocks of at most COLUMNS columns, [out, ≤ COLUMNS] each."""
    if is_compressed(module):
        yield from _decompress(module).split(COLUMNS, 1)
        return
    forward, storage, in_ = _without_bias(module).forward, BASES["opaque"], module.in_features
    device, dtype = storage.device(module), storage.dtype(module)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first in range(0, in_, COLUMNS):
            rows = torch.zeros(min(COLUMNS, in_ - first) + 1, in_, dtype=dtype, device=device)
            rows[:-1, first:].fill_diagonal_(1)
            y = forward(rows)
            zero = y[-1]  # not a result of zero inputs: a kernel may have packed the bias too
            yield (y[:-1] - zero).mT


def _decompress(module: Any) -> Tensor:
    """The weight of a layer of compressed-tensors, by the library; the module itself stays
    packed."""
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
        """Why nothing can be merged into this weight."""
        name, do = _kind(weight) or ("quantised", "the checkpoint that was quantised")
        do = (
            f"load the base in a floating-point dtype ({do}), load the adapter on it and merge "
            "there, or keep the adapter unmerged"
        )
        return sentence(
            f"a weight stored as {name}, which only its own library writes", "numbers to write", do
        )

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("hqq") is None:
            return
        hqq = import_module("hqq.core.quantize")
        for dtype in (torch.float32, torch.bfloat16):
            config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
            yield hqq.HQQLinear(nn.Linear(64, 32), config, compute_dtype=dtype, device="cpu")

    def label(self, weight: Any) -> str:
        return (_kind(weight) or (self.name, ""))[0]

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
        # exclude adapters below the module
        tensors = (*weight.buffers(False), *weight.parameters(False))
        return next(tensor.device for tensor in tensors)

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size((weight.out_features, weight.in_features))

    def modules(self) -> tuple[type[nn.Module], ...]:
        return tuple(below for path in LIBRARIES if (cls := _class(path)) for below in _below(cls))

    def call(
        self, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """y = forward(x, …) of the module, with a gradient for x whatever forward does: a forward
        that cuts the graph would silently leave all trained layers below with a wrong gradient.

        Raises:
            TargetError: x requires a gradient, and the module is no linear layer, so its gradient
                is not known.
        """
        x = next(iter((*args, *kwargs.values())), None)
        if x is None or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(*args, **kwargs)
        if not is_opaque(module):
            name, do = next(
                description
                for path, description in EXPERTS.items()
                if (cls := _class(path)) and isinstance(module, cls)
            )
            problem = (
                f"{base_class(module).__name__}, whose {name} kernels pass no gradient on to the "
                "layers below, which train"
            )
            do = f"load the base with {do} and train on it, or call it under torch.no_grad()"
            raise TargetError(problem, "layers that do, above one that trains", do)
        if without_gradient(module):
            return _Product.apply(x, forward, module)  # pyright: ignore[reportReturnType]
        y = forward(*args, **kwargs)
        return y if y.requires_grad else _Product.apply(x, lambda _: y, module)  # pyright: ignore[reportReturnType]


def _without_bias(module: nn.Module) -> nn.Module:
    """A second object of a module's class with the same tensors and without its bias, under
    whatever name it is stored."""
    view = object.__new__(base_class(module))
    view.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers"):
        tensors = getattr(module, table)
        view.__dict__[table] = {
            name: None if name == "bias" else value for name, value in tensors.items()
        }
    if "bias" in view.__dict__:
        view.__dict__["bias"] = None
    # adapters below the module must keep their mode
    view.__dict__.update(training=False, _modules={})
    # accelerate's wrapper would call the forward of ``module`` itself, with its adapter
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
    if name == "weight" and _is_opaque_like(module, weight) and is_opaque(module):
        return module
    return weight


def _is_opaque_like(module: nn.Module, weight: Any) -> bool:
    """A cheap test that every opaque layer passes: it has no parameter of more than one byte per
    element, or compressed-tensors has quantised it."""
    return weight is None or weight.dtype.itemsize == 1 or "quantization_scheme" in module.__dict__


def own_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters, parametrised ones included, and "weight" for a module
    whose storage is opaque."""
    lists = getattr(module, "parametrizations", {}) if is_parametrized(module) else {}
    plain = [
        name for name, p in module._parameters.items() if p is not None and not hidden(module, name)
    ]
    return [*plain, *lists, *(["weight"] if "weight" not in plain and is_opaque(module) else ())]
