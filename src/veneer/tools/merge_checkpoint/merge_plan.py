"""Plan a merge from names and shapes alone.

    plan_merge(checkpoint, adapters, …)   ->  MergePlan: the edits of each tensor in the files. An
                                              edit: a slice of a parameter and the weighted changes
                                              of this slice

The model is built without weights (``models.meta_model``). The adapters are loaded onto it by the
code that loads them onto a model with weights, so this plan refuses everything that
``veneer.merge`` refuses. The names in the files are mapped by transformers, which takes seconds to
import. For linear layers the records of Veneer's adapters suffice instead (``linear_stub_model``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import models
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.save_load import install_from
from veneer.attach import Change, changes, detach, output_change_problems, split_tie_problems
from veneer.attach import adapters as adapters_of
from veneer.errors import CheckpointError, MergeError, listing, raise_all, sentence
from veneer.layers import Layer, parameter_path
from veneer.models.base_weights import slice_shape
from veneer.models.meta import without_meta
from veneer.models.safetensors_dir import Checkpoint
from veneer.tools.merge_checkpoint.growth import (
    Head,
    add_tensors,
    grow_checkpoint,
    grow_model,
    model_with_head,
    vocabulary_parameters,
)

#: (adapter folder, its coefficient wᵢ in the merge)
WeightedFolder = tuple[Path, float]
#: the slice of a tensor that holds one whole parameter and nothing else
WHOLE_PARAM = models.ParamSlice("")
#: dtypes of weights that a merge can change, and that it can write
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorEdit:
    """An edit of one tensor in the files, or of a slice of it.

    Fields:
        path, shape: the parameter's first name in the model, and its shape.
        param_slice: ``within`` is the slice of the tensor that is edited, ``index`` the slice of
            the parameter that it holds.
        changes: (coefficient wᵢ, ΔW as low-rank factors and token rows) for each adapter.
        full: (coefficient wᵢ, trained value of the parameter) for each adapter that trains it in
            full. Either ``changes`` or ``full`` is empty.
    """

    path: str
    shape: torch.Size
    param_slice: models.ParamSlice = WHOLE_PARAM
    changes: tuple[tuple[float, Change], ...] = ()
    full: tuple[tuple[float, Tensor], ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge does to a checkpoint."""

    edits: Mapping[str, tuple[TensorEdit, ...]]  # by the name of the tensor in the files
    # the names of the tensors that together hold one parameter, by the parameter's path
    split_tensors: Mapping[str, tuple[str, ...]]
    #: by the path of a parameter: (its tensors in order, its shape, {adapter: (the fingerprint that
    #: its record expects, the ids of the token rows that this fingerprint leaves out)})
    fingerprints: Mapping[
        str, tuple[tuple[str, ...], torch.Size, Mapping[str, tuple[str, tuple[int, ...]]]]
    ]
    notes: tuple[str, ...]  # remarks for the report of the merge
    #: by name of a tensor with a row for each token, if the vocabulary grows: its new row count
    grown_row_counts: Mapping[str, int] = field(default_factory=dict)
    #: by name of a tensor that adapters train in full and the files lack: its shape
    added_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    head: Head | None = None  # the head that the added tensors belong to
    #: whether the plan was made with ``linear_stub_model``; then it holds only if the fingerprints
    #: match
    uses_stub_model: bool = False


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[WeightedFolder],
    saved_adapters: Sequence[AdapterFiles],
    model: nn.Module | None = None,
) -> MergePlan:
    """Plan the merge of these adapters into a checkpoint. ``saved_adapters``: the files of
    ``adapters``; ``model``: the model of the checkpoint, with or without weights; if it is None,
    the model is built from the config in the checkpoint's folder.

    Raises:
        AdapterError, TargetError: an adapter does not fit the model.
        CheckpointError: the files lack a weight that an adapter changes, or store it with an
            unsupported shape or dtype.
        MergeError: a change cannot be merged tensor by tensor.
    """
    target_model, head = (
        model_with_head(checkpoint.folder, saved_adapters)
        if model is None
        else (without_meta(model), None)
    )
    param_slices = models.map_checkpoint_names(target_model, checkpoint.file_of)
    is_copy, grown_row_counts = model is None or target_model is not model, {}
    if is_copy and (rows := grow_model(target_model, saved_adapters)) is not None:
        grown_ids = vocabulary_parameters(target_model).keys()
        grown_tensors = {
            tensor
            for tensor, tensor_slices in param_slices.items()
            if {id(_get_tensor(target_model, param_slice.path)) for param_slice in tensor_slices}
            & grown_ids
        }
        grown_row_counts = dict.fromkeys(sorted(grown_tensors), rows)
        checkpoint = grow_checkpoint(checkpoint, grown_row_counts)
    adapters_by_name: dict[str, WeightedFolder] = {}
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        try:
            for index, adapter in enumerate(adapters):
                install_from(
                    target_model,
                    adapter[0],
                    f"merged{index}",
                    trainable=False,
                    verify_base=False,
                    untie=False,
                )
                adapters_by_name[f"merged{index}"] = adapter
            notes = [
                *_quantization_notes(adapters, saved_adapters),
                *(str(warning.message) for warning in caught_warnings),
                *(f"The vocabulary grew to {rows} rows." for rows in {*grown_row_counts.values()}),
            ]
            return replace(
                _plan_from_model(
                    target_model, adapters_by_name, saved_adapters, param_slices, checkpoint, notes
                ),
                grown_row_counts=grown_row_counts,
                head=head,
            )
        finally:
            for name in adapters_by_name:
                detach(target_model, name)


def _quantization_notes(
    adapters: Sequence[WeightedFolder], saved_adapters: Sequence[AdapterFiles]
) -> Iterator[str]:
    """Notes on adapters that were trained on a quantised base."""
    for (path, _), saved_adapter in zip(adapters, saved_adapters, strict=True):
        quantization = saved_adapter.metadata.get("base", {}).get("quantized")
        if quantization:
            storage_text = quantization.get("as", f"{quantization.get('by')}'s form")
            yield (
                f"{path} was trained on its base in {storage_text}; it is merged into the weights"
                " that this was made of."
            )


def _plan_from_model(
    model: nn.Module,
    adapters_by_name: Mapping[str, WeightedFolder],
    saved_adapters: Sequence[AdapterFiles],
    param_slices: Mapping[str, tuple[models.ParamSlice, ...]],
    checkpoint: Checkpoint,
    notes: Sequence[str],
) -> MergePlan:
    """The plan for a model with the adapters attached. ``adapters_by_name``: the adapters by their
    names on the model; ``param_slices``: for each tensor in the files, the slices of the model's
    parameters that it holds."""
    path_by_id = {
        id(tensor): path for path, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    edits = _collect_edits(model, adapters_by_name, path_by_id)
    # for each parameter: the tensors that hold it, and which slice each of them holds
    slices_by_path: dict[str, dict[str, models.ParamSlice]] = {path: {} for path in edits}
    for tensor, tensor_slices in param_slices.items():
        for param_slice in tensor_slices:
            # the first name of a tied parameter
            path = path_by_id[id(_get_tensor(model, param_slice.path))]
            slices_by_path.setdefault(path, {}).setdefault(tensor, param_slice)
    added_shapes = {
        path: tuple(edit.shape)
        for path, edit in edits.items()
        if not slices_by_path[path] and _may_be_head(path, edit)
    }
    slices_by_path |= {path: {path: models.ParamSlice(path)} for path in added_shapes}
    checkpoint = add_tensors(checkpoint, added_shapes)
    problems = [
        problem
        for path, edit in edits.items()
        for problem in _coverage_problems(path, edit, slices_by_path[path], checkpoint)
    ]
    raise_all(
        CheckpointError, f"The adapters do not fit the files in {checkpoint.folder}", problems
    )
    edits_by_tensor: dict[str, list[TensorEdit]] = {}
    for path, edit in edits.items():
        for tensor, param_slice in slices_by_path[path].items():
            edits_by_tensor.setdefault(tensor, []).append(replace(edit, param_slice=param_slice))
    fingerprints = _expected_fingerprints(model, adapters_by_name, saved_adapters, path_by_id)
    return MergePlan(
        edits={tensor: tuple(tensor_edits) for tensor, tensor_edits in edits_by_tensor.items()},
        split_tensors={
            path: _order_tensors(slices_by_path[path])
            for path in edits
            if any(param_slice.index for param_slice in slices_by_path[path].values())
        },
        fingerprints={
            path: (_order_tensors(slices_by_path[path]), edits[path].shape, expected_by_adapter)
            for path, expected_by_adapter in fingerprints.items()
        },
        notes=tuple(
            dict.fromkeys([*notes, *_added_head_notes(model, added_shapes, slices_by_path)])
        ),
        added_shapes=added_shapes,
    )


def _expected_fingerprints(
    model: nn.Module,
    adapters_by_name: Mapping[str, WeightedFolder],
    saved_adapters: Sequence[AdapterFiles],
    path_by_id: Mapping[int, str],
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """By path of a parameter and then by adapter folder: (the fingerprint in the adapter's record,
    the ids of the token rows that this fingerprint leaves out)."""
    fingerprints: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (adapter, _), saved_adapter in zip(adapters_by_name.values(), saved_adapters, strict=True):
        recorded_weights = saved_adapter.metadata.get("base", {}).get("weights", {})
        for weight_path, fingerprint in recorded_weights.items():
            path = path_by_id[id(_get_tensor(model, weight_path))]
            expected = fingerprint, saved_adapter.token_ids(weight_path)
            fingerprints.setdefault(path, {})[str(adapter)] = expected
    return fingerprints


def _may_be_head(path: str, edit: TensorEdit) -> bool:
    """Whether a parameter may belong to a head that the base lacks: an adapter trains it in full,
    and its path has no number, unlike the path of a parameter in a transformer block."""
    is_full = not edit.changes and edit.full[0][1].is_floating_point()
    return is_full and not any(component.isdigit() for component in path.split("."))


def _added_head_notes(
    model: nn.Module, added_shapes: Mapping[str, Any], slices_by_path: Mapping[str, Any]
) -> Iterator[str]:
    if added_shapes:
        yield f"The base has no {listing(added_shapes, 4)}: added from the adapter."
        stored_ids = {
            id(_get_tensor(model, path)) for path in slices_by_path if slices_by_path[path]
        }
        missing_paths = [
            path for path, parameter in model.named_parameters() if id(parameter) not in stored_ids
        ]
        if missing_paths:
            yield (
                f"Neither the base nor the adapter has {listing(missing_paths, 4)}: loading the"
                " result starts it anew."
            )


def _get_tensor(model: nn.Module, path: str) -> Tensor:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    return module._parameters[name] if name in module._parameters else module._buffers[name]  # pyright: ignore[reportReturnType]


def _collect_edits(
    model: nn.Module, adapters_by_name: Mapping[str, WeightedFolder], path_by_id: Mapping[int, str]
) -> dict[str, TensorEdit]:
    """The edit of each parameter and running statistic that an adapter changes, by its path.
    ``adapters_by_name``: the adapters by their names on the model; ``path_by_id``: the path of each
    tensor of the model by its id."""
    edits: dict[str, TensorEdit] = {}
    problems = [
        f"{folder}: {problem}"
        for name, (folder, _) in adapters_by_name.items()
        for problem in (*split_tie_problems(model, name), *output_change_problems(model, name))
    ]
    raise_all(MergeError, "Nothing was merged", problems)
    for adapter_name, (_, coefficient) in adapters_by_name.items():
        for module_path, module, weight, change in changes(model, adapter_name):
            target: Any = module._parameters.get(weight)
            is_rewritten = (
                type(change.layer).apply_forward_rewrite is not Layer.apply_forward_rewrite
                and getattr(module, "max_norm", None) is not None
            )
            if target is None or change.storage.name != "plain" or is_rewritten:
                raise MergeError(
                    f"a change of {parameter_path(module_path, weight)!r}, which is computed or"
                    " rewritten as it is read",
                    "weights that lie in the files as they are used",
                    "merge it in memory (veneer.merge), and save the model",
                )
            edit = edits.get(
                path_by_id[id(target)], TensorEdit(path_by_id[id(target)], target.shape)
            )
            edits[edit.path] = replace(edit, changes=(*edit.changes, (coefficient, change)))
        for _, module, parameters in adapters_of(model, adapter_name):
            for name, trained_value in {
                **parameters.full._parameters,
                **parameters.full._buffers,
            }.items():
                target = {**module._parameters, **module._buffers}[name]
                if trained_value is None or target is None:
                    continue
                edit = edits.get(
                    path_by_id[id(target)], TensorEdit(path_by_id[id(target)], target.shape)
                )
                # a tied parameter occurs under each of its names, but is merged once
                if not any(trained_value is earlier_value for _, earlier_value in edit.full):
                    edits[edit.path] = replace(
                        edit, full=(*edit.full, (coefficient, trained_value.detach()))
                    )
    if conflicts := [path for path, edit in edits.items() if edit.changes and edit.full]:
        raise MergeError(
            f"{listing(conflicts)}, which one adapter changes and another replaces",
            "one or the other",
            "merge one adapter after the other",
        )
    return edits


def _coverage_problems(
    path: str,
    edit: TensorEdit,
    slices_by_tensor: Mapping[str, models.ParamSlice],
    checkpoint: Checkpoint,
):
    """The error texts for one parameter if the files do not hold all of it, or store it with
    another shape or an unsupported dtype. ``slices_by_tensor``: the tensors in the files that hold
    parts of the parameter, each with its slice."""
    if not slices_by_tensor and not edit.changes and not edit.full[0][1].is_floating_point():
        return  # the step counter of a batch norm, which old files lack
    covered_mask = (
        torch.zeros(edit.shape, dtype=torch.bool)
        if any(param_slice.index for param_slice in slices_by_tensor.values())
        else None
    )
    for tensor, param_slice in slices_by_tensor.items():
        shape = slice_shape(edit.shape, param_slice.index)
        file_shape = slice_shape(checkpoint.shape(tensor), param_slice.within)
        if shape.numel() != file_shape.numel() or (not param_slice.index and shape != file_shape):
            yield sentence(
                f"{tensor!r} of shape {tuple(file_shape)}",
                f"{tuple(shape)}",
                "name the base of the adapter",
            )
        dtype = checkpoint.dtype(tensor)
        if edit.changes and dtype not in FLOAT_DTYPES:
            yield sentence(
                f"{tensor!r} in {dtype}",
                "a floating-point type of at least 16 bits",
                "dequantise it first",
            )
        if covered_mask is not None:
            covered_mask[param_slice.index] = True
        if (
            param_slice.index
            and edit.changes
            and type(edit.changes[0][1].layer).unfold is not Layer.unfold
        ):
            problem = f"{tensor!r}, a part of {path!r}"
            yield sentence(
                problem,
                "the whole of it in one tensor",
                "merge it in memory (veneer.merge), and save it",
            )
    if not slices_by_tensor or (covered_mask is not None and not covered_mask.all()):
        problem = f"no tensor that is {path!r}" + (" as a whole" if slices_by_tensor else "")
        yield sentence(
            problem, "every weight that the adapter changes", "name the base that it was trained on"
        )


def _order_tensors(slices_by_tensor: Mapping[str, models.ParamSlice]) -> tuple[str, ...]:
    """The names of the tensors that together hold a parameter, in the order of their slices. If
    each tensor holds the whole parameter (a tied weight), only one of them."""
    sorted_tensors = sorted(
        slices_by_tensor,
        key=lambda tensor: [axis_slice.start for axis_slice in slices_by_tensor[tensor].index],
    )
    return tuple(
        sorted_tensors if slices_by_tensor[sorted_tensors[0]].index else sorted_tensors[:1]
    )
