"""The contract of a format: how one kind of file holds a low-rank adapter.

    read(path, base, options)                  -> Contents    what the file says, in PEFT's terms
    write(adapter, path, base, options)        -> [notes]     one file from a whole adapter

PEFT's terms are the common ones: ``PeftLayer`` holds A and B in the shapes in which nearly every
format holds them. To add a format: a file here that calls ``register(Format(...))``. Rejected: a
pair of functions for each pair of formats. Six formats would be thirty conversions.
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
    """A file that is right by its format, and that a common reader of this format takes for another
    adapter."""


@dataclass(frozen=True)
class BaseFacts:
    """The facts of a base that a format may use: the shape of each parameter by name,
    ``config.json``, and the name of the base."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Options:
    """The options of a conversion that a user may set.

    Fields:
        dtype: of the numbers in the new file; None keeps each as it is.
        part: the model that an adapter without one in its paths belongs to ("unet", "text_encoder",
            …).
        rank, energy, whole: of dense changes, as ``convert`` takes them.
    """

    dtype: torch.dtype | None = None
    part: str | None = None
    rank: int | None = None
    energy: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Contents:
    """The contents of a file. ``deltas`` are dense ΔW by the name of the parameter, for formats
    without factors; ``full`` names those of them that stay dense. ``about`` is worth keeping as
    provenance, ``left_out`` has the reasons for what was not read."""

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
    """One low-rank change of an adapter that is to be written."""

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
    """An adapter that is to be written.

    Fields:
        changes: its low-rank changes, each once under every name that its weight has.
        full: parameters that are trained in full, by path and name.
        about: its record without hashes, or what is known of it.
        deltas: makes every ΔW by the name of its parameter, with the reasons for those that cannot
            be told.
    """

    changes: tuple[LowRankChange, ...]
    full: Mapping[str, Mapping[str, Tensor]]
    about: Mapping[str, Any]
    deltas: Callable[[], tuple[Mapping[str, Tensor], list[str]]]


@dataclass(frozen=True)
class Format:
    """One format.

    Fields:
        name, title: what the user types, and what it is in a few words.
        lacks: what it cannot express.
        suffix: the ending of its file; "" for a folder.
        recognises: (first bytes, keys of the tensors, header if it is safetensors) -> whether a
            file is one.
        parts: its names may say which model of a pipeline a layer is of.
        peft: its loaders compute with PEFT, which leaves out what
            ``peft_behaviour.deviation_reason`` names; other formats mean weights.
        read, write: see the top; None where ``convert`` itself does it.
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
    """Put a format into the registry, by its name."""
    return FORMATS.add(format_.name, format_)


def kind_of_change(
    path: str, layer: PeftLayer, weight: str, transposed: bool, shape: tuple[int, ...] | None
) -> str:
    """The kind of a change of a PEFT file, as far as the file and the weight's shape tell it."""
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
    """A change at a module from A [r, in, …] and B [out, r, …] as a file holds them.

    Args:
        alpha: None means the rank, so that the scale is 1; the sign of a negative one goes into B.
        shape: of the weight, where it is known: A and B are put into the shapes of its layer.

    Raises:
        AdapterError: the shapes do not fit each other, or not the weight.
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
    """As it goes into a file: on the CPU, contiguous, its own memory; AdapterError where ``dtype``
    is too narrow."""
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
    """A float32 scalar, or a float64 one where float32 would round."""
    short = torch.tensor(value, dtype=torch.float32)
    return short if short.item() == value else torch.tensor(value, dtype=torch.float64)


def scalar(tensor: Tensor, key: str) -> float:
    """The one real number that a tensor holds; AdapterError where it holds anything else."""
    if tensor.numel() != 1 or tensor.is_complex():
        problem = f"{key!r} of shape {tuple(tensor.shape)}, {tensor.dtype}"
        raise AdapterError(problem, "one number", "get the file again")
    return float(tensor.item())


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise AdapterError where a file holds NaN or infinity, or numbers of 8 bits and less."""
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
    """The tensors and the header of a safetensors file; AdapterError where it is cut short, or not
    finite."""
    tensors, header = tensor_files.read_tensors(path)
    require_finite(tensors, path)
    return tensors, header
