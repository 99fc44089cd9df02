"""Build a stub of the model that has only the linear layers that adapters change. A merge with the
stub needs neither the model's code nor transformers, which takes seconds to import.

    linear_stub_model(checkpoint, saved_adapters) -> a module with these layers at their paths

The record of a Veneer adapter has the path, layer kind and fingerprint (hash) of each changed
weight. If the checkpoint has a tensor with this name and fingerprint, the tensor is the weight
itself. So loading the model does not rename, transpose or split the tensor.

``linear_stub_model`` returns None, and the model itself is needed, in these cases:

    a dimension of a changed weight equals the size of the vocabulary: the weight may belong to an
        embedding and head that are tied (share one weight), and the stub shows no ties
    an unchanged tensor has the shape of a changed layer, and its module has the same last name: the
        two layers may be tied, and the file may hold a copy of their weight for each
    a layer of another kind changes, a parameter is trained in full, an adapter has no record, or it
        has the labels of a classifier, which may change config.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.record import labels_in
from veneer.models.safetensors_dir import Checkpoint


def linear_stub_model(
    checkpoint: Checkpoint, saved_adapters: Sequence[AdapterFiles]
) -> nn.Module | None:
    """A stub of the model for ``merge_plan.plan_merge``: a module with only the linear layers that
    the adapters change, without weights. None if the stub could be wrong, so that the model itself
    is needed. The stub assumes that each tensor has the name of its weight. Therefore the caller
    must compare the tensors with the fingerprints in the adapters' records."""
    config_path = checkpoint.folder / "config.json"
    try:
        vocabulary_sizes = set(_vocabulary_sizes(json.loads(config_path.read_text())))
    except (OSError, ValueError):
        return None  # the caller then builds the model itself, which reports the error
    shapes_by_path: dict[str, tuple[int, int]] = {}
    for saved_adapter in saved_adapters:
        for weight, change in saved_adapter.metadata.get("changes", {}).items():
            is_recorded = (
                weight in checkpoint.file_of and weight in saved_adapter.metadata["base"]["weights"]
            )
            shape = list(checkpoint.shape(weight)) if is_recorded else []
            is_linear = (
                change.get("kind") == "linear" and weight.endswith(".weight") and len(shape) == 2
            )
            if not is_linear or vocabulary_sizes.intersection(shape):
                return None
            shapes_by_path[weight.removesuffix(".weight")] = shape[0], shape[1]
        if (
            not saved_adapter.metadata
            or saved_adapter.full
            or labels_in(saved_adapter.metadata) is not None
        ):
            return None
    changed_names_and_shapes = {
        (path.rpartition(".")[2], shape) for path, shape in shapes_by_path.items()
    }
    for name in checkpoint.file_of:
        path, _, leaf_name = name.rpartition(".")
        is_unchanged = leaf_name == "weight" and path not in shapes_by_path
        if (
            is_unchanged
            and (path.rpartition(".")[2], tuple(checkpoint.shape(name))) in changed_names_and_shapes
        ):
            return None
    stub = nn.Module()
    try:
        for path, (out_size, in_size) in shapes_by_path.items():
            *parents, name = path.split(".")
            parent = stub
            for component in parents:
                if component not in parent._modules:
                    parent.add_module(component, nn.Module())
                parent = parent._modules[component]
            parent.add_module(name, nn.Linear(in_size, out_size, bias=False, device="meta"))
    except KeyError:  # ``add_module`` refuses the name, so it is not the name of a layer
        return None
    return stub


def _vocabulary_sizes(config: Any) -> Iterator[int]:
    """The integers in a config whose key contains "vocab", at any depth. ``config``: the parsed
    config.json, or a value in it."""
    entries = (
        config.items()
        if isinstance(config, dict)
        else enumerate(config)
        if isinstance(config, list)
        else ()
    )
    for key, entry in entries:
        if isinstance(entry, int) and "vocab" in str(key):
            yield entry
        yield from _vocabulary_sizes(entry)
