"""The interface of a format: how one type of file stores a low-rank adapter.

    read(path, base, options)                  -> Contents    the changes in the file
    write(adapter, path, base, options)        -> [notes]     writes the file; notes for the user

Readers return low-rank changes, and writers take them, in PEFT's layout: a ``PeftLayer`` holds A
and B in the shapes that nearly every format uses. To add a format, add a file to this folder that
calls ``register(Format(...))``.
Rejected: one converter for each pair of formats, which would be thirty converters for six formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, listing
from veneer.fileio import tensors as tensor_files
from veneer.formats.peft import MAGNITUDE, PeftLayer, targets_parameter
from veneer.registry import Registry

#: the suffixes of the keys of A and B: a key is a module's path, a dot and a suffix
LORA_SUFFIXES = ("lora_A.weight", "lora_B.weight")
EMBEDDING_SUFFIXES = ("lora_embedding_A", "lora_embedding_B")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MisreadElsewhere(UserWarning):
    """Warns that a common reader of the written file's format will apply a change that differs from
    the adapter's, although the file is valid."""


@dataclass(frozen=True)
class BaseFacts:
    """The facts about a base that a format may use.

    Fields:
        shapes: the shape of each parameter, by name.
        config: the content of ``config.json``.
        name: the name or path of the base.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Options:
    """The options of a conversion that a user may set.

    Fields:
        dtype: the dtype of the tensors in the new file; None keeps the dtype of each tensor.
        part: the pipeline component ("unet", "text_encoder", …) that an adapter belongs to, if the
            adapter's paths do not name one.
        rank, energy, whole: how a dense ΔW becomes A and B, as in ``veneer.tools.convert.convert``:
            the rank, the retained share of ‖ΔW‖², or no factorisation at all.
    """

    dtype: torch.dtype | None = None
    part: str | None = None
    rank: int | None = None
    energy: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Contents:
    """The adapter that ``Format.read`` found in a file.

    Fields:
        low: low-rank changes, by the path that each has in an adapter folder of PEFT.
        deltas: dense ΔW by parameter name, for formats that store no A and B.
        full: the names in ``deltas`` that must not be factored into A and B.
        base_name: the base that the file names.
        metadata: facts about the file, which become the provenance of the adapter.
        left_out: one sentence for each change that was not read, with the reason.
        transposed: whether the base's weights are [in, out] (Conv1D of transformers).
    """

    low: Mapping[str, PeftLayer] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    full: frozenset[str] = frozenset()
    base_name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class LowRankChange:
    """One low-rank change that ``Format.write`` writes. ``weight``: the name of the changed
    parameter."""

    weight: str
    layer: PeftLayer
    #: as ``kind_of_change`` returns it: linear, Conv1D, "linear or Conv1D" (if only the model could
    #: tell), conv, grouped conv, embedding, attention, stack (of matrices), parameter, or "weight
    #: of shape …" (if A and B do not fit the shape)
    kind: str

    @property
    def module_path(self) -> str:
        return self.weight.removesuffix(".weight")

    @property
    def magnitude(self) -> Tensor | None:
        return self.layer.extras.get(MAGNITUDE)


@dataclass(frozen=True)
class Adapter:
    """The adapter that ``Format.write`` writes.

    Fields:
        changes: its low-rank changes, one for each changed weight.
        full: tensors that are trained in full, by module path and then by parameter name.
        metadata: facts about the adapter: its base, variant and provenance.
        deltas: a function that returns every ΔW by parameter name, and one sentence for each ΔW
            that cannot be computed.
    """

    changes: tuple[LowRankChange, ...]
    full: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, Any]
    deltas: Callable[[], tuple[Mapping[str, Tensor], list[str]]]


@dataclass(frozen=True)
class Format:
    """A file format.

    Fields:
        name, title: the name that users type, and a short description.
        lacks: the adapters or facts that the format cannot store, as text.
        suffix: the suffix of a file name, such as ".gguf"; "" if the format is a folder.
        recognises: (first bytes, tensor keys, header of a safetensors file) -> whether a file has
            this format.
        parts: whether a tensor key can name the pipeline component that a layer belongs to.
        peft: whether programs load the format with PEFT, and so compute PEFT's result where it
            differs from a change of the weight (``peft_behaviour.deviation_reason``).
        read, write: the functions that the docstring of this file describes; None if ``convert``
            itself reads or writes the format.
    """

    name: str
    title: str
    lacks: str
    suffix: str = ""
    recognises: Callable[[bytes, Iterable[str], Mapping[str, str]], bool] = (
        lambda start, keys, header: False
    )
    parts: bool = False
    peft: bool = False
    read: Callable[[Path, BaseFacts, Options], Contents] | None = None
    write: Callable[[Adapter, Path, BaseFacts, Options], list[str]] | None = None


FORMATS: Registry[Format] = Registry("format")


def register(format_: Format) -> Format:
    """Add a format to the registry, by its name."""
    return FORMATS.add(format_.name, format_)


def kind_of_change(
    path: str,
    layer: PeftLayer,
    weight_name: str,
    transposed: bool | None,
    shape: tuple[int, ...] | None,
) -> str:
    """The ``LowRankChange.kind`` of a change in an adapter folder.

    Args:
        path: the path of the change in the folder.
        weight_name: the name of the changed parameter.
        transposed: whether the parameter is [in, out], as in Conv1D; None if the folder does not
            tell.
        shape: the shape of the parameter; None if no base is known. Unless the parameter is square,
            its shape decides between linear and Conv1D, and ``transposed`` is ignored.
    """
    group_count, out, in_ = layer.dims
    if weight_name.endswith("in_proj_weight") or ".base_layer.out_proj" in f".{path}":
        return "attention"
    if layer.suffixes == EMBEDDING_SUFFIXES:
        return "embedding"
    if layer.A.dim() > 2:
        return "conv" if group_count == 1 else "grouped conv"
    if layer.is_stacked or group_count > 1:
        return "stack"
    if targets_parameter(path, layer) or not weight_name.endswith(".weight"):
        return "parameter"
    if shape is not None and sorted(shape) != sorted((out, in_)):
        return f"weight of shape {tuple(shape)}"
    if shape is not None and out != in_:
        transposed = shape != (out, in_)
    if transposed is None:
        return "linear or Conv1D"
    return "Conv1D" if transposed else "linear"


def build_peft_layer(
    path: str,
    A: Tensor,
    B: Tensor,
    alpha: float | None,
    *,
    shape: tuple[int, ...] | None = None,
    magnitude: Tensor | None = None,
    suffixes: tuple[str, str] = LORA_SUFFIXES,
) -> PeftLayer:
    """A ``PeftLayer`` from A [r, in, …] and B [out, r, …] as a file has them. (r: the rank; …: the
    axes of a convolution kernel.)

    Args:
        alpha: None means the rank, so that the scale alpha / r is 1. If it is negative, its sign
            moves to B.
        shape: the shape of the weight, to which A and B are reshaped; None if it is not known.
        magnitude: DoRA's magnitude, one number for each output.
        suffixes: the suffixes of the keys of A and B in an adapter folder of PEFT.

    Raises:
        AdapterError: the shapes of A and B do not fit each other or the weight.
    """
    rank = A.shape[0] if A.dim() > 1 else 0
    problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} at {path!r}"
    if not rank:
        raise AdapterError(
            problem, "A [rank, in, …] of at least rank 1", "get the whole file again"
        )
    if shape is not None and suffixes == LORA_SUFFIXES:
        if A.numel() != rank * math.prod(shape[1:]) or B.numel() != shape[0] * rank:
            raise AdapterError(
                problem, f"those of a weight {shape}", "give the base that it was made for"
            )
        A, B = A.reshape(rank, *shape[1:]), B.reshape(shape[0], rank, *[1] * (len(shape) - 2))
    if B.dim() < 2 or B.shape[1] != rank:
        raise AdapterError(
            problem, "A [rank, in, …] and B [out, rank, …]", "get the whole file again"
        )
    alpha = float(rank if alpha is None else alpha)
    A, B, alpha = (A, -B, -alpha) if alpha < 0 else (A, B, alpha)
    return PeftLayer(path, A, B, suffixes, rank, alpha, alpha / rank, {}).with_magnitude(magnitude)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of a tensor for a file: on the CPU, contiguous, in ``dtype`` if it is floating-point
    (None keeps its dtype). ``AdapterError``: a finite value becomes infinite in ``dtype``."""
    converted_tensor = (
        tensor.detach()
        .to("cpu", dtype if tensor.is_floating_point() else None)
        .contiguous()
        .clone()
    )
    if dtype is not None and tensor.isfinite().all() and not converted_tensor.isfinite().all():
        raise AdapterError(
            f"numbers up to {tensor.abs().max():.3g}, which {dtype} cannot hold",
            "finite numbers",
            "choose fp32",
        )
    return converted_tensor


def exact_scalar(value: float) -> Tensor:
    """A scalar tensor of ``value``: float32, or float64 if float32 would round the value."""
    float32_scalar = torch.tensor(value, dtype=torch.float32)
    if float32_scalar.item() == value:
        return float32_scalar
    return torch.tensor(value, dtype=torch.float64)


def scalar_value(tensor: Tensor, key: str) -> float:
    """The value of a tensor with a single real number. ``AdapterError`` for any other tensor."""
    if tensor.numel() != 1 or tensor.is_complex():
        raise AdapterError(
            f"{key!r} of shape {tuple(tensor.shape)}, {tensor.dtype}",
            "one number",
            "get the file again",
        )
    return float(tensor.item())


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise AdapterError for a NaN or an infinity, or for a floating dtype of 8 bits or less."""
    float_tensors = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if narrow_keys := [
        key for key, tensor in float_tensors.items() if tensor.dtype not in FLOAT_DTYPES
    ]:
        dtype = tensors[narrow_keys[0]].dtype
        raise AdapterError(
            f"numbers stored as {dtype} in {listing(narrow_keys, 3)} of {path}",
            "float64, float32, bfloat16 or float16",
            "convert them to bfloat16",
        )
    if nonfinite_keys := [
        key for key, tensor in float_tensors.items() if not tensor.isfinite().all()
    ]:
        raise AdapterError(
            f"numbers that are not finite in {listing(nonfinite_keys, 3)} of {path}",
            "finite ones",
            "get another copy",
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file. ``AdapterError``: the file is damaged, a
    value is not finite, or a floating dtype has 8 bits or less."""
    tensors, header = tensor_files.read_tensors(path)
    require_finite(tensors, path)
    return tensors, header
