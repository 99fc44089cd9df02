"""Build a stub of the model that has only the linear layers that adapters change. It needs the
adapters' records and the checkpoint, but not the model's code.

    linear_stub_model(checkpoint, saved_adapters) -> a module with these layers at their paths

The record of a Veneer adapter has the path, layer kind and fingerprint of each changed weight. If
the checkpoint has a tensor with this name and fingerprint, the tensor is the weight itself, which
loading the model does not rename, transpose or join with others.

A weight may be tied under a second name, which the stub does not show. So there is no stub (None)
if a dimension of a changed weight equals the size of the vocabulary, because embedding and head may
be tied. There is none either if an unchanged tensor has the shape of a changed layer and the same
last component in its module's path, if a layer of another kind changes, or if a parameter is
trained in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.models.safetensors_dir import Checkpoint


def linear_stub_model(
    checkpoint: Checkpoint, saved_adapters: Sequence[AdapterFiles]
) -> nn.Module | None:
    """A stub without weights for ``merge_plan.plan_merge``; None if the model itself is needed. The
    caller must check the fingerprints in the adapters' records."""
    config = checkpoint.folder / "config.json"
    try:
        vocabulary_sizes = set(_vocabulary_sizes(json.loads(config.read_text())))
    except (OSError, ValueError):
        return None  # building the model itself reports the error
    shapes: dict[str, tuple[int, int]] = {}
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
            shapes[weight.removesuffix(".weight")] = shape[0], shape[1]
        if not saved_adapter.metadata or saved_adapter.full:
            return None
    changed_names_and_shapes = {(path.rpartition(".")[2], shape) for path, shape in shapes.items()}
    for name in checkpoint.file_of:
        path, _, leaf_name = name.rpartition(".")
        is_unchanged = leaf_name == "weight" and path not in shapes
        if (
            is_unchanged
            and (path.rpartition(".")[2], tuple(checkpoint.shape(name))) in changed_names_and_shapes
        ):
            return None
    stub = nn.Module()
    try:
        for path, (out, in_) in shapes.items():
            *parents, name = path.split(".")
            parent = stub
            for component in parents:
                if component not in parent._modules:
                    parent.add_module(component, nn.Module())
                parent = parent._modules[component]
            parent.add_module(name, nn.Linear(in_, out, bias=False, device="meta"))
    except KeyError:  # no module can have such a name
        return None
    return stub


def _vocabulary_sizes(config: Any) -> Iterator[int]:
    """The vocabulary sizes in a config, at any depth."""
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
