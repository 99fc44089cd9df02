"""Plan a merge from names and shapes alone, and merge one tensor.

    plan_merge(checkpoint, adapters, …)   ->  MergePlan: the edits of each tensor (slice of the
                                              parameter, weighted changes)
    merge_changes(edit, weight, dtype, …) ->  the merged slice, rounded once, and statistics of the
                                              rounding

The model is built without weights (``models.meta_model``), and the adapters are loaded onto it by
the code that loads them onto a real model, so this plan refuses everything that a live merge
refuses. transformers, which maps the names, takes seconds to import: for linear layers the records
of Veneer's adapters suffice (``linear_stub_model``).
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
)

#: an adapter folder and its weight in the merge
Adapter = tuple[Path, float]
WHOLE_PARAM = models.ParamSlice("")


@dataclass(frozen=True)
class TensorEdit:
    """An edit of one tensor, or of the slice ``param_slice.within`` of it. The slice holds
    ``param_slice.index`` of the parameter ``path`` (its first name), which has this ``shape``.
    Either ``changes`` with their weights are added, or ``full``, values with weights, replaces
    it."""

    path: str
    shape: torch.Size
    param_slice: models.ParamSlice = WHOLE_PARAM
    changes: tuple[tuple[float, Change], ...] = ()
    full: tuple[tuple[float, Tensor], ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge does to a checkpoint."""

    edits: Mapping[str, tuple[TensorEdit, ...]]  # by the name of the tensor
    # the tensors of a parameter that is split over several, by its path
    split_tensors: Mapping[str, tuple[str, ...]]
    #: by the path of a parameter: (its tensors in order, its shape, the fingerprint that each
    #: adapter expects and the tokens whose rows that fingerprint leaves out)
    fingerprints: Mapping[
        str, tuple[tuple[str, ...], torch.Size, Mapping[str, tuple[str, tuple[int, ...]]]]
    ]
    notes: tuple[str, ...]  # for the report
    #: new numbers of rows of the tensors that grow with the vocabulary, by name
    sizes: Mapping[str, int] = field(default_factory=dict)
    #: shapes of tensors that adapters train in full and the files lack; the head that they form
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    head: Head | None = None
    #: the plan comes from ``linear_stub_model`` and is valid only if the fingerprints match
    by_fingerprints: bool = False


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    saved_adapters: Sequence[AdapterFiles],
    model: nn.Module | None = None,
) -> MergePlan:
    """Plan the merge of these adapters into a checkpoint. ``saved_adapters``: the files of
    ``adapters``; ``model``: the model of the checkpoint, with or without weights; None builds it
    from the config in its folder.

    Raises:
        AdapterError, TargetError: an adapter does not fit the model.
        CheckpointError: the files lack a weight that an adapter changes, or store it in an
            unsupported form.
        MergeError: a change cannot be merged tensor by tensor.
    """
    target_model, head = (
        model_with_head(checkpoint.folder, saved_adapters)
        if model is None
        else (without_meta(model), None)
    )
    param_slices = models.map_checkpoint_names(target_model, checkpoint.file_of)
    is_own_copy, sizes = model is None or target_model is not model, {}
    if is_own_copy and (rows := grow_model(target_model, saved_adapters)) is not None:
        embedding_ids = {
            id(embedding.weight)
            for side in ("input", "output")
            if (embedding := _embeddings(target_model, side)) is not None
        }
        grown_tensors = {
            tensor
            for tensor, tensor_places in param_slices.items()
            if {id(_get_tensor(target_model, param_slice.path)) for param_slice in tensor_places}
            & embedding_ids
        }
        sizes = dict.fromkeys(sorted(grown_tensors), rows)
        checkpoint = grow_checkpoint(checkpoint, sizes)
    attached: dict[str, Adapter] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for number, adapter in enumerate(adapters):
                install_from(
                    target_model,
                    adapter[0],
                    f"merged{number}",
                    trainable=False,
                    verify_base=False,
                    untie=False,
                )
                attached[f"merged{number}"] = adapter
            notes = [
                *_quantization_notes(adapters, saved_adapters),
                *(str(warning.message) for warning in caught),
            ]
            notes += [f"The vocabulary grew to {rows} rows." for rows in {*sizes.values()}]
            merge_plan = _plan_from_model(
                target_model, attached, saved_adapters, param_slices, checkpoint, notes
            )
            return replace(merge_plan, sizes=sizes, head=head)
        finally:
            for name in attached:
                detach(target_model, name)


def _embeddings(model: Any, side: str) -> Any:
    return getattr(model, f"get_{side}_embeddings")()


def _quantization_notes(
    adapters: Sequence[Adapter], saved_adapters: Sequence[AdapterFiles]
) -> Iterator[str]:
    """Notes on adapters that were trained on a quantised base."""
    for (path, _), saved in zip(adapters, saved_adapters, strict=True):
        quantization = saved.metadata.get("base", {}).get("quantized")
        if quantization:
            kind = quantization.get("as", f"{quantization.get('by')}'s form")
            yield (
                f"{path} was trained on its base in {kind}; it is merged into the weights that this"
                " was made of."
            )


def _plan_from_model(
    model: nn.Module,
    attached: Mapping[str, Adapter],
    saved_adapters: Sequence[AdapterFiles],
    param_slices: Mapping[str, tuple[models.ParamSlice, ...]],
    checkpoint: Checkpoint,
    notes: Sequence[str],
) -> MergePlan:
    """The plan for a model with the adapters attached. ``param_slices``: for each tensor of the
    files, its slices of the model's parameters."""
    names = {id(value): path for path, value in (*model.named_buffers(), *model.named_parameters())}
    edits = _collect_edits(model, attached, names)
    # for each parameter, its tensors and their slices
    tensors_by_path: dict[str, dict[str, models.ParamSlice]] = {path: {} for path in edits}
    for tensor, tensor_places in param_slices.items():
        for param_slice in tensor_places:
            path = names[
                id(_get_tensor(model, param_slice.path))
            ]  # tied parameters are listed under their first name
            tensors_by_path.setdefault(path, {}).setdefault(tensor, param_slice)
    added = {
        path: tuple(edit.shape)
        for path, edit in edits.items()
        if not tensors_by_path[path] and _is_of_head(path, edit)
    }
    tensors_by_path |= {path: {path: models.ParamSlice(path)} for path in added}
    checkpoint = add_tensors(checkpoint, added)
    problems = [
        problem
        for path, edit in edits.items()
        for problem in _coverage_problems(path, edit, tensors_by_path[path], checkpoint)
    ]
    raise_all(
        CheckpointError, f"The adapters do not fit the files in {checkpoint.folder}", problems
    )
    edits_by_tensor: dict[str, list[TensorEdit]] = {}
    for path, edit in edits.items():
        for tensor, param_slice in tensors_by_path[path].items():
            edits_by_tensor.setdefault(tensor, []).append(replace(edit, param_slice=param_slice))
    fingerprints: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (adapter, _), saved in zip(attached.values(), saved_adapters, strict=True):
        for weight_path, expected in saved.metadata.get("base", {}).get("weights", {}).items():
            fingerprints.setdefault(names[id(_get_tensor(model, weight_path))], {})[
                str(adapter)
            ] = (
                expected,
                saved.token_ids(weight_path),
            )
    return MergePlan(
        {tensor: tuple(tensor_places) for tensor, tensor_places in edits_by_tensor.items()},
        {
            path: _order_tensors(tensors_by_path[path])
            for path in edits
            if any(param_slice.index for param_slice in tensors_by_path[path].values())
        },
        {
            path: (_order_tensors(tensors_by_path[path]), edits[path].shape, expected_by_adapter)
            for path, expected_by_adapter in fingerprints.items()
        },
        tuple(dict.fromkeys([*notes, *_added_head_notes(model, added, tensors_by_path)])),
        added=added,
    )


def _is_of_head(path: str, edit: TensorEdit) -> bool:
    """Whether a parameter may belong to a head that the base lacks: it is trained in full and is
    outside the numbered blocks."""
    in_full = not edit.changes and edit.full[0][1].is_floating_point()
    return in_full and not any(component.isdigit() for component in path.split("."))


def _added_head_notes(
    model: nn.Module, added: Mapping[str, Any], tensors_by_path: Mapping[str, Any]
) -> Iterator[str]:
    if added:
        yield f"The base has no {listing(added, 4)}: added from the adapter."
        ids = {id(_get_tensor(model, path)) for path in tensors_by_path if tensors_by_path[path]}
        lacking = [path for path, parameter in model.named_parameters() if id(parameter) not in ids]
        if lacking:
            yield (
                f"Neither the base nor the adapter has {listing(lacking, 4)}: loading the result"
                " starts it anew."
            )


def _get_tensor(model: nn.Module, path: str) -> Tensor:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    return module._parameters[name] if name in module._parameters else module._buffers[name]  # pyright: ignore[reportReturnType]


def _collect_edits(
    model: nn.Module, attached: Mapping[str, Adapter], names: Mapping[int, str]
) -> dict[str, TensorEdit]:
    """The edit of each parameter and running statistic that an adapter changes, by its path."""
    edits: dict[str, TensorEdit] = {}
    problems = {
        name: (*split_tie_problems(model, name), *output_change_problems(model, name))
        for name in attached
    }
    all_problems = [
        f"{attached[name][0]}: {problem}"
        for name, tie_problems in problems.items()
        for problem in tie_problems
    ]
    raise_all(MergeError, "Nothing was merged", all_problems)
    for adapter, (_, share) in attached.items():
        for module_path, module, weight, change in changes(model, adapter):
            target: Any = module._parameters.get(weight)
            rewrites = type(change.layer).apply_forward_rewrite is not Layer.apply_forward_rewrite
            rewrites = rewrites and getattr(module, "max_norm", None) is not None
            if target is None or change.storage.name != "plain" or rewrites:
                problem = (
                    f"a change of {parameter_path(module_path, weight)!r}, which is computed or"
                    " rewritten as it is read"
                )
                do = "merge it in memory (veneer.merge), and save the model"
                raise MergeError(problem, "weights that lie in the files as they are used", do)
            edit = edits.get(names[id(target)], TensorEdit(names[id(target)], target.shape))
            edits[edit.path] = replace(edit, changes=(*edit.changes, (share, change)))
        for _, module, parameters in adapters_of(model, adapter):
            for name, value in {**parameters.full._parameters, **parameters.full._buffers}.items():
                target = {**module._parameters, **module._buffers}[name]
                if value is None or target is None:
                    continue
                edit = edits.get(names[id(target)], TensorEdit(names[id(target)], target.shape))
                # a tied parameter has one copy under several names
                if not any(value is known_value for _, known_value in edit.full):
                    edits[edit.path] = replace(edit, full=(*edit.full, (share, value.detach())))
    if conflicts := [path for path, edit in edits.items() if edit.changes and edit.full]:
        problem = f"{listing(conflicts)}, which one adapter changes and another replaces"
        raise MergeError(problem, "one or the other", "merge one adapter after the other")
    return edits


def _coverage_problems(
    path: str,
    edit: TensorEdit,
    slices_by_tensor: Mapping[str, models.ParamSlice],
    checkpoint: Checkpoint,
):
    """Problems of the files with one parameter: no tensor for all of it, or another shape or
    dtype."""
    if not slices_by_tensor and not edit.changes and not edit.full[0][1].is_floating_point():
        return  # the counter of a norm, absent in old files
    covered = (
        torch.zeros(edit.shape, dtype=torch.bool)
        if any(each.index for each in slices_by_tensor.values())
        else None
    )
    for tensor, param_slice in slices_by_tensor.items():
        shape, file_shape = (
            slice_shape(edit.shape, param_slice.index),
            slice_shape(checkpoint.shape(tensor), param_slice.within),
        )
        if shape.numel() != file_shape.numel() or (not param_slice.index and shape != file_shape):
            yield sentence(
                f"{tensor!r} of shape {tuple(file_shape)}",
                f"{tuple(shape)}",
                "name the base of the adapter",
            )
        dtype = checkpoint.dtype(tensor)
        if edit.changes and dtype not in (
            torch.float64,
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            yield sentence(
                f"{tensor!r} in {dtype}",
                "a floating-point type of at least 16 bits",
                "dequantise it first",
            )
        if covered is not None:
            covered[param_slice.index] = True
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
    if not slices_by_tensor or (covered is not None and not covered.all()):
        problem = f"no tensor that is {path!r}" + (" as a whole" if slices_by_tensor else "")
        yield sentence(
            problem, "every weight that the adapter changes", "name the base that it was trained on"
        )


def _order_tensors(slices_by_tensor: Mapping[str, models.ParamSlice]) -> tuple[str, ...]:
    """The tensors that make up a parameter, in order; one of them if each holds all of it."""
    ordered = sorted(
        slices_by_tensor,
        key=lambda tensor: [axis_slice.start for axis_slice in slices_by_tensor[tensor].index],
    )
    return tuple(ordered if slices_by_tensor[ordered[0]].index else ordered[:1])
