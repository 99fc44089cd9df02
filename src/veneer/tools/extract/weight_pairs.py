"""Pair the weights of a base and a tuned model, and compute their differences.

open_models(base, tuned, model) -> ModelPair    the base's model, base weights, tuned weights
pair_weights(model_pair) -> [WeightPair]        after checks of names, shapes and dtypes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer import models
from veneer.attach import ModelIndex, adapters_of, unwrap
from veneer.distributed import base_class
from veneer.errors import ExtractError, listing, raise_all, sentence
from veneer.layers import GENERAL_KIND, Dims, Layer, kind_for
from veneer.models.base_weights import (
    BaseWeight,
    BaseWeights,
    ModuleWeight,
    ReadRows,
    folder_weights,
    list_weights,
    module_weights,
    state_dict_weights,
)

#: a model, given as its folder or name, as a module, or as a state dict
ModelSource = str | Path | nn.Module | Mapping[str, Tensor]

#: how many elements of a weight are cast to the common dtype at once
CHUNK_SIZE = 1 << 21


class ModelPair(NamedTuple):
    """The base and the tuned model.

    Fields:
        structure: the model of the base.
        is_meta: whether ``open_models`` built ``structure`` itself, without weights. If so, nobody
            else uses it, and its parameters may be overwritten.
        base_name: the name or folder of a base that is read from files, else None.
        base, tuned: the weights of the two models.
    """

    structure: nn.Module
    is_meta: bool
    base_name: str | None
    base: BaseWeights
    tuned: BaseWeights


@dataclass(frozen=True)
class WeightPair:
    """One parameter or persistent buffer in both models. ``module``: the module of the base's model
    that holds it. ``layer_kind``: the kind of this layer, which can reshape the weight to
    [g, out, in] (g: matrices in the weight)."""

    model_weight: ModuleWeight
    base: BaseWeight
    tuned: BaseWeight
    module: nn.Module
    layer_kind: Layer

    @property
    def path(self) -> str:
        return self.model_weight.path

    @property
    def dims(self) -> Dims:
        return self.layer_kind.dims(self.module, torch.Size(self.base.shape))

    @property
    def is_stack(self) -> bool:
        """Whether the weight is a stack [g, …] of g matrices, each of which gets a product."""
        return (
            self.layer_kind is GENERAL_KIND
            and len(self.base.shape) == 3
            and self.dims.groups == self.base.shape[0]
        )

    @property
    def matrix_slices(self) -> list[slice | None]:
        """The slices of the first axis by which the weight is read: one for each matrix of a stack.
        Other weights have [None], so that they are read whole."""
        return (
            [slice(index, index + 1) for index in range(self.base.shape[0])]
            if self.is_stack
            else [None]
        )

    def matrix_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (base weight, tuned weight): one for each matrix of a stack, else a single pair."""
        for matrix_slice in self.matrix_slices:
            yield self.base.read(matrix_slice), self.tuned.read(matrix_slice)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (chunk of the base weight, chunk of the tuned weight), over the whole weight, as
        the function ``chunks`` yields them: flat, of one dtype, and rounded to the tuned weight's
        dtype if this is the coarser one."""
        return (
            chunk_pair for base, tuned in self.matrix_pairs() for chunk_pair in chunks(base, tuned)
        )

    def matrices(self) -> Iterator[Tensor]:
        """ΔW [out, in] of each group of a convolution or matrix of a stack (else of the one
        matrix), in float32, or in float64 if a weight is float64. The caller may overwrite them."""
        for base, tuned in self.matrix_pairs():
            delta = difference(base, tuned)
            del base, tuned
            yield from self.layer_kind.unfold(
                delta, self.dims._replace(groups=1) if self.is_stack else self.dims
            )

    def compare(self) -> tuple[bool, bool]:
        """(whether any element changed, whether all elements of both are finite)."""
        is_changed, is_finite = False, True
        for base_chunk, tuned_chunk in self.chunks():
            is_changed = is_changed or not torch.equal(base_chunk, tuned_chunk)
            is_finite = is_finite and _all_finite(base_chunk) and _all_finite(tuned_chunk)
        return is_changed, is_finite

    def change_norm(self) -> float:
        """‖tuned − base‖, with the base rounded to the dtype of the tuned weight if this is the
        coarser one."""
        return math.sqrt(
            sum(
                (tuned.double() - base.double()).square().sum().item()
                for base, tuned in self.chunks()
            )
        )


def chunks(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (chunk of ``base``, chunk of ``tuned``) of up to ``CHUNK_SIZE`` elements. Both chunks
    are flat and in a dtype that holds the values of both. If ``tuned`` has a coarser dtype, the
    chunk of ``base`` is first rounded to this dtype, so that a difference by rounding alone does
    not count as a change."""
    tuned = tuned.to(base.device)
    is_float = base.is_floating_point() and tuned.is_floating_point()
    rounds_base = is_float and torch.finfo(tuned.dtype).eps > torch.finfo(base.dtype).eps
    common_dtype = torch.promote_types(base.dtype, tuned.dtype)
    flat_base, flat_tuned = base.reshape(-1), tuned.reshape(-1)
    for start_index in range(0, flat_base.numel(), CHUNK_SIZE):
        base_chunk = flat_base[start_index : start_index + CHUNK_SIZE]
        base_chunk = base_chunk.to(tuned.dtype) if rounds_base else base_chunk
        yield (
            base_chunk.to(common_dtype),
            flat_tuned[start_index : start_index + CHUNK_SIZE].to(common_dtype),
        )


def _all_finite(values: Tensor) -> bool:
    """Whether all values are finite. They are if their minimum and maximum are finite, because both
    are NaN if any value is NaN. In bfloat16, computing these two is 16 times faster than
    ``isfinite`` of all values."""
    return not values.is_floating_point() or all(
        bool(extreme.isfinite()) for extreme in torch.aminmax(values)
    )


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """tuned − base, in float64 if either is float64, else in float32. ``base`` is first rounded to
    the dtype of ``tuned`` if this is the coarser one."""
    dtype = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    delta = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat_delta, start_index = delta.view(-1), 0
    for base_chunk, tuned_chunk in chunks(base, tuned):
        torch.sub(
            tuned_chunk.to(dtype),
            base_chunk.to(dtype),
            out=flat_delta[start_index : start_index + base_chunk.numel()],
        )
        start_index += base_chunk.numel()
    return delta


def open_models(base: ModelSource, tuned: ModelSource, model: nn.Module | None) -> ModelPair:
    """Open a base and a tuned model. Weights in folders are not read yet.

    Raises:
        ConfigError, CheckpointError: a folder holds no model.
        ExtractError: the base is a state dict without ``model``, the tuned model has unmerged
            adapters, or a model in memory has parameters on the meta device.
    """
    base_name = None
    if isinstance(tuned, str | Path) and not Path(tuned).expanduser().is_dir():
        # report a wrong path before the base is loaded, which takes longer
        models.folder_of(tuned)
    if isinstance(base, nn.Module):
        structure = unwrap(base)
        base_weights = module_weights(structure, "the base")
    elif isinstance(base, Mapping):
        if model is None:
            raise ExtractError(
                "a state dict for the base and no model", "the model that it is of", "give model=…"
            )
        structure = unwrap(model)
        base_weights = state_dict_weights(structure, base, "the base")
    else:
        folder_path, base_name = _model_folder(base, model), str(base)
        structure = models.meta_model(folder_path) if model is None else unwrap(model)
        base_weights = folder_weights(structure, folder_path)
    tuned_weights = _read_tuned(tuned, structure, uses_own_config=model is None)
    model_pair = ModelPair(
        structure=structure,
        is_meta=base_name is not None and model is None,
        base_name=base_name,
        base=base_weights,
        tuned=tuned_weights,
    )
    for source in (base, tuned):
        if isinstance(source, nn.Module) and (
            meta_paths := [
                path for path, parameter in source.named_parameters() if parameter.is_meta
            ]
        ):
            raise ExtractError(
                f"{listing(meta_paths, 3)} on the meta device",
                "weights that hold numbers",
                "load the model first, or name its folder",
            )
    return model_pair


def _read_tuned(tuned: ModelSource, structure: nn.Module, uses_own_config: bool) -> BaseWeights:
    """The weights of the tuned model, by their names in the model. ``uses_own_config``: whether to
    map the names in the tuned model's files by a model that is built from its own config.json,
    because this may tie other weights than the base's config does. Else, or without a config.json,
    the names are mapped by the base's model ``structure``."""
    if isinstance(tuned, nn.Module):
        tuned = unwrap(tuned)
        attached_adapters = adapters_of(tuned)
        if attached_adapters is not None and attached_adapters.merged is None:
            raise ExtractError(
                f"adapters ({', '.join(attached_adapters.configs)}) on the tuned model, whose"
                " weights they do not change",
                "a fine-tuned model",
                "merge one first, or save it with veneer.save",
            )
        return module_weights(tuned, "the tuned model")
    if isinstance(tuned, Mapping):
        return state_dict_weights(structure, tuned, "the tuned model")
    folder_path = _model_folder(tuned, structure)
    if (
        uses_own_config
        and (folder_path / "config.json").is_file()
        and hasattr(structure, "base_model_prefix")
    ):
        return folder_weights(
            models.meta_model(folder_path, base_class(structure).__name__), folder_path
        )
    return folder_weights(structure, folder_path)


def _model_folder(source: str | Path, structure: nn.Module | None) -> Path:
    """The local folder of a model's files. If ``structure`` (the model) is given, the folder needs
    no config.json."""
    path = Path(source).expanduser()
    is_model_folder = path.is_dir() and not (path / "adapter_config.json").is_file()
    return path if structure is not None and is_model_folder else models.folder_of(source)


def pair_weights(model_pair: ModelPair) -> list[WeightPair]:
    """Pair each parameter and persistent buffer of the base with the one of the tuned model, in the
    order of the base. ``ExtractError``: names or shapes differ, a parameter is not stored as
    floating-point numbers, or the names of a tied weight have different values in one model. The
    error lists every problem."""
    model_index = ModelIndex(model_pair.structure)
    weight_pairs: list[WeightPair] = []
    missing_names: dict[str, list[str]] = {model_pair.base.label: [], model_pair.tuned.label: []}
    shape_texts, dtype_texts, untied_problems = [], [], []
    model_weight_names: set[str] = set()
    for model_weight in list_weights(model_index):
        model_weight_names.update(model_weight.names)
        base_weight = model_pair.base.find(model_weight.names)
        tuned_weight = model_pair.tuned.find(model_weight.names)
        if base_weight is None or tuned_weight is None:
            # a buffer that neither model stores is computed by the constructor, so it is unchanged
            if base_weight is not None or tuned_weight is not None or not model_weight.is_buffer:
                missing_names[model_pair.base.label] += (
                    [model_weight.path] if base_weight is None else []
                )
                missing_names[model_pair.tuned.label] += (
                    [model_weight.path] if tuned_weight is None else []
                )
            continue
        module, shape = model_weight.module, model_weight.shape
        if not base_weight.shape == tuned_weight.shape == shape:
            shape_texts.append(
                f"{model_weight.path} {list(base_weight.shape)} and {list(tuned_weight.shape)}"
                f" (the model's: {list(shape)})"
            )
            continue
        if dtypes := [
            str(weight.dtype)
            for weight in (base_weight, tuned_weight)
            if weight.dtype not in FLOAT_DTYPES and not model_weight.is_buffer
        ]:
            dtype_texts.append(f"{model_weight.path} ({', '.join(dtypes)})")
        untied_problems += _untied_problems(model_pair, model_weight, base_weight, tuned_weight)
        layer_kind = kind_for(module, model_weight.ref[1])
        weight_pairs.append(WeightPair(model_weight, base_weight, tuned_weight, module, layer_kind))
    extra_names = {
        weights.label: sorted(weights.by_name.keys() - model_weight_names)
        for weights in (model_pair.base, model_pair.tuned)
    }
    problems = _difference_problems(missing_names, extra_names, shape_texts, dtype_texts)
    raise_all(
        ExtractError,
        f"{model_pair.tuned.label} is no fine-tune of {model_pair.base.label}",
        [*problems, *untied_problems],
    )
    return weight_pairs


#: how many names an error lists at most
MAX_NAMES = 40
COMPARE_HINT = "compare the two models"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESIZE_HINT = (
    "extract from models of one architecture; a vocabulary that grew must have grown in both"
    " (call model.resize_token_embeddings on the base, then save_pretrained)"
)


def _difference_problems(
    missing_names: Mapping[str, list[str]],
    extra_names: Mapping[str, list[str]],
    shape_texts: list[str],
    dtype_texts: list[str],
) -> list[str]:
    """The error texts for parameters that one of the models lacks or has in excess of the base's
    model, for different shapes, and for weights that are not stored as floating-point numbers.

    Args:
        missing_names: by the label of the model, the parameters that it lacks.
        extra_names: by the label of the model, its weights that the base's model does not have.
        shape_texts, dtype_texts: a description of each weight with a wrong shape or dtype.
    """
    dtype_problem = "weights stored as something else than floating-point numbers: "
    expected_dtypes = "float64, float32, bfloat16 or float16"
    checks = [
        *(
            (paths, "no ", f" in {label}", "the parameters of the base", COMPARE_HINT)
            for label, paths in missing_names.items()
        ),
        *(
            (paths, "", f" in {label}", "the parameters of the base alone", COMPARE_HINT)
            for label, paths in extra_names.items()
        ),
        (shape_texts, "other shapes: ", "", "the same in base and tuned model", RESIZE_HINT),
        (dtype_texts, dtype_problem, "", expected_dtypes, "dequantise the model first"),
    ]
    return [
        sentence(f"{prefix}{listing(affected_names, MAX_NAMES)}{suffix}", expected, fix)
        for affected_names, prefix, suffix, expected, fix in checks
        if affected_names
    ]


def _untied_problems(
    model_pair: ModelPair,
    model_weight: ModuleWeight,
    base_weight: BaseWeight,
    tuned_weight: BaseWeight,
) -> Iterator[str]:
    for weights, weight in ((model_pair.base, base_weight), (model_pair.tuned, tuned_weight)):
        if not all(_reads_equal_weights(weight.read, read) for read in weight.duplicates):
            problem = (
                f"{listing(model_weight.names)}, one weight of the base, with different numbers in"
                f" {weights.label}"
            )
            fix = (
                "set tie_word_embeddings to false in the configuration of the base, and save it so"
            )
            yield sentence(problem, "one weight in both models", fix)


def _reads_equal_weights(first_reader: ReadRows, second_reader: ReadRows) -> bool:
    """Whether two functions read weights of equal shapes and values."""
    first_weight, second_weight = first_reader(None), second_reader(None)
    return first_weight.shape == second_weight.shape and all(
        torch.equal(first_chunk, second_chunk)
        for first_chunk, second_chunk in chunks(first_weight, second_weight)
    )
