"""Plan a merge from names and shapes alone.

    plan_merge(checkpoint, adapters, …)   ->  MergePlan: the edits of each tensor in the files. An
                                              edit: which slice of which parameter the tensor holds,
                                              and the adapters' weighted changes of it

The model is built without weights (``models.meta_model``). The adapters are loaded onto it by the
code that loads them onto a model with weights. So an adapter that ``veneer.merge`` refuses is
refused here too. The rules of transformers map the names in the files to parameters, but importing
transformers takes seconds. If only linear layers change, the records of Veneer's adapters suffice
instead (``linear_stub_model``).
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
from veneer.adapter_files.peft_mapping import module_at
from veneer.adapter_files.save_load import install_from
from veneer.attach import (
    ModelIndex,
    changes,
    detach,
    output_change_problems,
    split_tie_problems,
)
from veneer.attach import adapters as adapters_of
from veneer.errors import CheckpointError, MergeError, listing, raise_all, sentence
from veneer.fileio.hashing import fingerprint_without_rows
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
from veneer.tools.merge_checkpoint.tensor_edits import TensorEdit, must_define_new_values

#: (adapter folder, its coefficient wᵢ in the merged weight W + Σ wᵢ ΔWᵢ)
WeightedFolder = tuple[Path, float]
#: the dtypes of weights into which low-rank changes can be merged, and to which ``dtype`` can cast
#: the result; tensors of other dtypes keep theirs
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge does to the tensors of a checkpoint."""

    edits: Mapping[str, tuple[TensorEdit, ...]]  # by the name of the tensor in the files
    # for each edited parameter that the files hold in several tensors: their names, by the
    # parameter's path
    split_tensors: Mapping[str, tuple[str, ...]]
    #: by the path of a parameter: (the names of its tensors in order, its shape, {adapter folder:
    #: (the fingerprint of the base's values in the adapter's record, the ids of the token rows that
    #: this fingerprint leaves out because the adapter trains them)})
    fingerprints: Mapping[
        str, tuple[tuple[str, ...], torch.Size, Mapping[str, tuple[str, tuple[int, ...]]]]
    ]
    notes: tuple[str, ...]  # sentences for the user, such as that the vocabulary grew
    #: if the vocabulary grows: the new row count of each tensor with a row for each token, by name
    grown_row_counts: Mapping[str, int] = field(default_factory=dict)
    #: the shapes of the tensors that the merge adds, by name: adapters train them in full, and the
    #: base's files lack them
    added_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: the model class and labels for config.json, if the adapters have a classification head
    head: Head | None = None
    #: whether the plan was made with ``linear_stub_model``, which assumes that each tensor has the
    #: name of its parameter. Then the plan is right only if all fingerprints match.
    uses_stub_model: bool = False


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[WeightedFolder],
    saved_adapters: Sequence[AdapterFiles],
    model: nn.Module | None = None,
) -> MergePlan:
    """Plan the merge of these adapters into a checkpoint. No tensor of the checkpoint is read.

    Args:
        saved_adapters: the contents of the folders in ``adapters``, in the same order.
        model: the model of the checkpoint, with or without weights. Adapters are attached to it
            during the call. None builds the model from the config in the checkpoint's folder.

    Raises:
        AdapterError, TargetError: an adapter does not fit the model.
        CheckpointError: the files lack a weight that an adapter changes, or store it with an
            unsupported shape or dtype.
        ConfigError: transformers cannot build the model from the config.
        MergeError: a change cannot be merged tensor by tensor.
    """
    target_model, head = (
        model_with_head(checkpoint.folder, saved_adapters)
        if model is None
        else (without_meta(model), None)
    )
    param_slices = models.map_checkpoint_names(target_model, checkpoint.file_of, checkpoint.shape)
    # grow the vocabulary only of a model that was built or copied here, not of the caller's own
    is_copy, grown_row_counts = model is None or target_model is not model, {}
    stored_checkpoint = checkpoint
    if is_copy and (row_count := grow_model(target_model, saved_adapters)) is not None:
        grown_ids = vocabulary_parameters(target_model).keys()
        grown_tensors = {
            tensor_name
            for tensor_name, tensor_slices in param_slices.items()
            if {id(_get_tensor(target_model, param_slice.path)) for param_slice in tensor_slices}
            & grown_ids
        }
        grown_row_counts = dict.fromkeys(sorted(grown_tensors), row_count)
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
                *(
                    f"The vocabulary grew to {row_count} rows."
                    for row_count in {*grown_row_counts.values()}
                ),
            ]
            merge_plan = _plan_from_model(
                target_model, adapters_by_name, saved_adapters, param_slices, checkpoint, notes
            )
            for tensor_name in grown_row_counts:
                row_count = stored_checkpoint.shape(tensor_name)[0]
                must_define_new_values(merge_plan.edits.get(tensor_name, ()), row_count)
            return replace(merge_plan, grown_row_counts=grown_row_counts, head=head)
        finally:
            for name in adapters_by_name:
                detach(target_model, name)


def _quantization_notes(
    adapters: Sequence[WeightedFolder], saved_adapters: Sequence[AdapterFiles]
) -> Iterator[str]:
    """A note for each adapter that was trained on a quantised base: it is merged into the weights
    from which that base was quantised."""
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
    """The plan for a model with the adapters attached; its ``grown_row_counts`` and ``head`` are
    left to the caller.

    Args:
        adapters_by_name: the adapters by the names under which they are attached.
        saved_adapters: the contents of these adapters' folders, in the same order.
        param_slices: the slices of the model's parameters that each tensor in the files holds, by
            name of the tensor.
        checkpoint: the checkpoint, in which tensors have grown if the vocabulary grows.

    Raises:
        CheckpointError: the files lack a weight that an adapter changes, or store it with an
            unsupported shape or dtype. The error lists all such weights.
        MergeError: a change cannot be merged tensor by tensor.
    """
    path_by_id = {
        id(tensor): path for path, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    edits = _collect_edits(model, adapters_by_name, path_by_id)
    # by path of a parameter and then by name of a tensor: which slice of the parameter is there
    slices_by_path: dict[str, dict[str, models.ParamSlice]] = {path: {} for path in edits}
    for tensor_name, tensor_slices in param_slices.items():
        for param_slice in tensor_slices:
            # ``param_slice.path`` may be any name of a tied parameter; edits are by its first name
            path = path_by_id[id(_get_tensor(model, param_slice.path))]
            slices_by_path.setdefault(path, {}).setdefault(tensor_name, param_slice)
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
    must_define_new_values(edits[path] for path in added_shapes)
    edits_by_tensor: dict[str, list[TensorEdit]] = {}
    for path, edit in edits.items():
        for tensor_name, param_slice in slices_by_path[path].items():
            edits_by_tensor.setdefault(tensor_name, []).append(
                replace(edit, param_slice=param_slice)
            )
    fingerprints = _expected_fingerprints(
        model, adapters_by_name, saved_adapters, path_by_id, edits
    )
    return MergePlan(
        edits={name: tuple(tensor_edits) for name, tensor_edits in edits_by_tensor.items()},
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
    edits: Mapping[str, TensorEdit],
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """By path of a parameter and then by adapter folder: (the fingerprint, a hash of the base's
    values, in the adapter's record; the ids of the token rows that this fingerprint leaves out
    because the adapter trains them). Without a record, the fingerprint is that of the frozen weight
    that PEFT writes beside the change of an embedding or head (``save_embedding_layers``).
    ``adapters_by_name`` and ``saved_adapters`` are in the same order. ``edits``: by path."""
    model_index = ModelIndex(model)
    fingerprints: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (adapter, _), saved_adapter in zip(adapters_by_name.values(), saved_adapters, strict=True):
        recorded_weights = saved_adapter.metadata.get("base", {}).get("weights", {})
        for weight_path, fingerprint in recorded_weights.items():
            path = path_by_id[id(_get_tensor(model, weight_path))]
            expected = fingerprint, saved_adapter.token_ids(weight_path)
            fingerprints.setdefault(path, {})[str(adapter)] = expected
        for file_path, tensors in saved_adapter.full.items():
            module_path = module_at(model_index, file_path)
            for name, frozen_weight in tensors.items():
                weight_path = parameter_path(module_path, name)
                path = path_by_id.get(id(_get_tensor(model, weight_path)), "")
                if path in edits and edits[path].changes:
                    token_ids = saved_adapter.token_ids(weight_path)
                    expected = fingerprint_without_rows(frozen_weight, token_ids), token_ids
                    fingerprints.setdefault(path, {})[str(adapter)] = expected
    return fingerprints


def _may_be_head(path: str, edit: TensorEdit) -> bool:
    """Whether a parameter that the files lack may belong to a head (such as a classifier) that the
    base was saved without, so that it may be added. This is assumed if an adapter trains it in full
    and its path contains no number, because a path in a transformer block contains one."""
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
    """The edit of each parameter and buffer (running statistics) that an adapter changes, by its
    path. The edits do not say yet which tensors hold the parameters.

    Args:
        adapters_by_name: the adapters by the names under which they are attached to the model.
        path_by_id: the path of each tensor of the model, by Python ``id``.

    Raises:
        MergeError: a change cannot be written into a weight of the files.
    """
    edits: dict[str, TensorEdit] = {}
    problems = [
        f"{folder}: {problem}"
        for name, (folder, _) in adapters_by_name.items()
        for problem in (*split_tie_problems(model, name), *output_change_problems(model, name))
    ]
    raise_all(MergeError, "Nothing was merged", problems)
    for adapter_name, (_, coefficient) in adapters_by_name.items():
        for path, module, weight_name, change in changes(model, adapter_name):
            base_tensor: Any = module._parameters.get(weight_name)
            is_rewritten = (
                type(change.layer).apply_forward_rewrite is not Layer.apply_forward_rewrite
                and getattr(module, "max_norm", None) is not None
            )
            if base_tensor is None or change.storage.name != "plain" or is_rewritten:
                raise MergeError(
                    f"a change of {parameter_path(path, weight_name)!r}, which is computed or"
                    " rewritten as it is read",
                    "weights that lie in the files as they are used",
                    "merge it in memory (veneer.merge), and save the model",
                )
            edit = edits.get(
                path_by_id[id(base_tensor)],
                TensorEdit(path_by_id[id(base_tensor)], base_tensor.shape),
            )
            edits[edit.path] = replace(edit, changes=(*edit.changes, (coefficient, change)))
        for _, module, layer_adapter in adapters_of(model, adapter_name):
            for name, trained_value in {
                **layer_adapter.full._parameters,
                **layer_adapter.full._buffers,
            }.items():
                base_tensor = {**module._parameters, **module._buffers}[name]
                if trained_value is None or base_tensor is None:
                    continue
                # attaching copies the running statistics, and PEFT's folders hold none
                if name in module._buffers and torch.equal(trained_value, base_tensor):
                    continue
                edit = edits.get(
                    path_by_id[id(base_tensor)],
                    TensorEdit(path_by_id[id(base_tensor)], base_tensor.shape),
                )
                # The loop reaches a tied parameter once for each of its names, but its change must
                # be added once only.
                if not any(trained_value is earlier_value for _, earlier_value in edit.full):
                    edits[edit.path] = replace(
                        edit, full=(*edit.full, (coefficient, trained_value))
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
    """Yield an error text for each reason why the files do not fit an edited parameter: a part of
    it is in no tensor, or a tensor has another shape or an unsupported dtype.

    Args:
        path: the name of the parameter in the model.
        slices_by_tensor: for each tensor that holds the parameter or a part of it, by name: which
            slice is where.
        checkpoint: the checkpoint, with the tensors and rows that the merge adds.
    """
    if not slices_by_tensor and not edit.changes and not edit.full[0][1].is_floating_point():
        # ``num_batches_tracked`` of a batch norm, a step counter that old files lack and that does
        # not affect the outputs
        return
    covered_mask = (
        torch.zeros(edit.shape, dtype=torch.bool)
        if any(param_slice.index for param_slice in slices_by_tensor.values())
        else None
    )
    for tensor_name, param_slice in slices_by_tensor.items():
        expected_shape = slice_shape(edit.shape, param_slice.index)
        file_shape = slice_shape(checkpoint.shape(tensor_name), param_slice.within)
        if expected_shape.numel() != file_shape.numel() or (
            not param_slice.index and expected_shape != file_shape
        ):
            yield sentence(
                f"{tensor_name!r} of shape {tuple(file_shape)}",
                f"{tuple(expected_shape)}",
                "name the base of the adapter",
            )
        dtype = checkpoint.dtype(tensor_name)
        if edit.changes and dtype not in FLOAT_DTYPES:
            yield sentence(
                f"{tensor_name!r} in {dtype}",
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
            problem = f"{tensor_name!r}, a part of {path!r}"
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
    """The names of the tensors that together hold a parameter, in the order of their slices of it.
    If each tensor holds the whole parameter (copies of a tied weight), only the first one.
    ``slices_by_tensor``: the slice of the parameter in each tensor, by name of the tensor."""
    sorted_names = sorted(
        slices_by_tensor,
        key=lambda tensor_name: [
            axis_slice.start for axis_slice in slices_by_tensor[tensor_name].index
        ],
    )
    return tuple(sorted_names if slices_by_tensor[sorted_names[0]].index else sorted_names[:1])
