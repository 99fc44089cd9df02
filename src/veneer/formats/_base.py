"""The interface of a format: how one kind of file stores a low-rank adapter.

    read(path, base, options)                  -> Contents    the file in PEFT's terms
    write(adapter, path, base, options)        -> [notes]     one file from an adapter

PEFT's terms are the common ones: ``PeftLayer`` holds A and B in the shapes that nearly every format
uses. To add a format, add a file here that calls ``register(Format(...))``. Rejected: a pair of
functions for each pair of formats, which would be thirty conversions for six formats.
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
from veneer.formats.peft import MAGNITUDE, PeftLayer, of_parameter
from veneer.registry import Registry

#: the suffixes of A and B below a module
PAIR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MisreadElsewhere(UserWarning):
    """A file is valid, but a common reader of its format takes it for another adapter."""


@dataclass(frozen=True)
class BaseFacts:
    """The facts about a base that a format may use: the shape of each parameter by name,
    ``config.json``, and the name of the base."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Options:
    """The options of a conversion that a user may set.

    Fields:
        dtype: dtype of the tensors in the new file; None keeps each tensor's dtype.
        part: the model of a pipeline ("unet", "text_encoder", …) to which an adapter belongs whose
            paths do not name one.
        rank, energy, whole: for dense changes, as in ``convert``.
    """

    dtype: torch.dtype | None = None
    part: str | None = None
    rank: int | None = None
    energy: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    Fields:
        deltas: dense ΔW by the name of the parameter, for formats without factors.
        full: names in ``deltas`` that stay dense.
        about: facts to store as provenance.
        left_out: reasons for changes that were not read.
    """

    low: Mapping[str, PeftLayer] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    full: frozenset[str] = frozenset()
    base_name: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def variant(self) -> str:
        return "dora" if any(layer.extras for layer in self.low.values()) else "lora"


@dataclass(frozen=True)
class LowRankChange:
    """One low-rank change to be written."""

    weight: str
    layer: PeftLayer
    kind: str  # linear, conv, grouped conv, embedding, attention, stack, parameter or Conv1D

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")

    @property
    def magnitude(self) -> Tensor | None:
        return self.layer.extras.get(MAGNITUDE)


@dataclass(frozen=True)
class Adapter:
    """An adapter to be written.

    Fields:
        changes: its low-rank changes, one for each name of a weight.
        full: parameters that are trained in full, by path and name.
        about: its record without hashes, or other facts about it.
        deltas: a function that computes ΔW by the name of its parameter, and the reasons for those
            that cannot be computed.
    """

    changes: tuple[LowRankChange, ...]
    full: Mapping[str, Mapping[str, Tensor]]
    about: Mapping[str, Any]
    deltas: Callable[[], tuple[Mapping[str, Tensor], list[str]]]


@dataclass(frozen=True)
class Format:
    """One format.

    Fields:
        name, title: the name that users type, and a short description.
        lacks: what the format cannot express.
        suffix: the ending of its file; "" for a folder.
        recognises: (first bytes, keys of the tensors, header if it is safetensors) -> whether a
            file has this format.
        parts: whether its names can say to which model of a pipeline a layer belongs.
        peft: whether its loaders compute with PEFT, with the deviations in
            ``peft_behaviour.deviation_reason``; other formats hold changes of weights.
        read, write: see the top of this file; None if ``convert`` itself does it.
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
    path: str, layer: PeftLayer, weight: str, transposed: bool, shape: tuple[int, ...] | None
) -> str:
    """The kind of a change in a PEFT file, as far as it follows from the file and the weight's
    shape."""
    groups, out, in_ = layer.dims
    if weight.endswith("in_proj_weight") or ".base_layer.out_proj" in f".{path}":
        return "attention"
    if layer.suffixes == EMBEDDING:
        return "embedding"
    if layer.A.dim() > 2:
        return "conv" if groups == 1 else "grouped conv"
    if layer.is_stacked or groups > 1:
        return "stack"
    if of_parameter(path, layer) or not weight.endswith(".weight"):
        return "parameter"
    if shape is not None and sorted(shape) != sorted((out, in_)):
        return f"weight of shape {tuple(shape)}"
    return "Conv1D" if transposed or shape not in (None, (out, in_)) else "linear"


def layer_of(
    path: str,
    A: Tensor,
    B: Tensor,
    alpha: float | None,
    *,
    shape: tuple[int, ...] | None = None,
    magnitude: Tensor | None = None,
    suffixes: tuple[str, str] = PAIR,
) -> PeftLayer:
    """A change of a module from A [r, in, …] and B [out, r, …] in the shapes of a file.

    Args:
        alpha: None means the rank, so that the scale is 1. If it is negative, B changes its sign.
        shape: of the weight, if known: A and B are reshaped for a layer with this weight.

    Raises:
        AdapterError: the shapes do not fit each other or the weight.
    """
    rank = A.shape[0] if A.dim() > 1 else 0
    problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} at {path!r}"
    if not rank:
        raise AdapterError(
            problem, "A [rank, in, …] of at least rank 1", "get the whole file again"
        )
    if shape is not None and suffixes == PAIR:
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
    """A copy of a tensor for a file: on the CPU, contiguous, in ``dtype``. AdapterError: ``dtype``
    cannot hold its values."""
    converted = (
        tensor.detach()
        .to("cpu", dtype if tensor.is_floating_point() else None)
        .contiguous()
        .clone()
    )
    if dtype is not None and tensor.isfinite().all() and not converted.isfinite().all():
        problem = f"numbers up to {tensor.abs().max():.3g}, which {dtype} cannot hold"
        raise AdapterError(problem, "finite numbers", "choose fp32")
    return converted


def exact_scalar(value: float) -> Tensor:
    """A float32 scalar, or a float64 one if float32 would round the value."""
    short = torch.tensor(value, dtype=torch.float32)
    return short if short.item() == value else torch.tensor(value, dtype=torch.float64)


def scalar(tensor: Tensor, key: str) -> float:
    """The value of a tensor with one real number; AdapterError for any other tensor."""
    if tensor.numel() != 1 or tensor.is_complex():
        problem = f"{key!r} of shape {tuple(tensor.shape)}, {tensor.dtype}"
        raise AdapterError(problem, "one number", "get the file again")
    return float(tensor.item())


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise AdapterError if a file holds NaN or infinity, or tensors of 8 bits or less."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if small := [key for key, tensor in floating.items() if tensor.dtype not in FLOATS]:
        problem = f"numbers stored as {tensors[small[0]].dtype} in {listing(small, 3)} of {path}"
        raise AdapterError(
            problem, "float64, float32, bfloat16 or float16", "convert them to bfloat16"
        )
    if broken := [key for key, tensor in floating.items() if not tensor.isfinite().all()]:
        problem = f"numbers that are not finite in {listing(broken, 3)} of {path}"
        raise AdapterError(problem, "finite ones", "get another copy")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file; AdapterError if it is truncated or not
    finite."""
    tensors, header = tensor_files.read_tensors(path)
    require_finite(tensors, path)
    return tensors, header
