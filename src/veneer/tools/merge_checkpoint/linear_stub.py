"""A stub of the model with the linear layers that adapters change, built from their records and the
checkpoint without the model's code.

    linear_stub_model(checkpoint, saved_adapters) -> a module with these layers at their paths, or
    None

The record of a Veneer adapter has the path, layer kind and fingerprint of each changed weight. If
the checkpoint has a tensor of that name and fingerprint, the tensor is the weight: loading did not
rename, transpose or join it. The stub is not used (None) where a weight may have a second name: a
dimension equals the size of the vocabulary (embedding and head may be tied), or a tensor with the
name and shape of a changed layer is unchanged. Nor is it used for other layer kinds and for
parameters trained in full.
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
    """A stub without weights for ``merge_plan.plan_merge``; None if the real model is needed. The
    caller must check the fingerprints in the adapters' records."""
    config = checkpoint.folder / "config.json"
    try:
        vocabularies = set(_sizes(json.loads(config.read_text())))
    except (OSError, ValueError):
        return None  # the code that builds the model reports the error
    shapes: dict[str, tuple[int, int]] = {}
    for saved in saved_adapters:
        for weight, change in saved.metadata.get("changes", {}).items():
            in_files = weight in checkpoint.file_of and weight in saved.metadata["base"]["weights"]
            shape = list(checkpoint.shape(weight)) if in_files else []
            is_linear = (
                change.get("kind") == "linear" and weight.endswith(".weight") and len(shape) == 2
            )
            if not is_linear or vocabularies.intersection(shape):
                return None
            shapes[weight.removesuffix(".weight")] = shape[0], shape[1]
        if not saved.metadata or saved.full:
            return None
    changed_forms = {(path.rpartition(".")[2], shape) for path, shape in shapes.items()}
    for name in checkpoint.file_of:
        path, _, leaf_name = name.rpartition(".")
        unchanged = leaf_name == "weight" and path not in shapes
        if unchanged and (path.rpartition(".")[2], tuple(checkpoint.shape(name))) in changed_forms:
            return None
    stub = nn.Module()
    try:
        for path, (out, in_) in shapes.items():
            *parents, name = path.split(".")
            module = stub
            for component in parents:
                if component not in module._modules:
                    module.add_module(component, nn.Module())
                module = module._modules[component]
            module.add_module(name, nn.Linear(in_, out, bias=False, device="meta"))
    except KeyError:  # names that no model can have
        return None
    return stub


def _sizes(config: Any) -> Iterator[int]:
    """The vocabulary sizes in a config, at any depth."""
    entries = (
        config.items()
        if isinstance(config, dict)
        else enumerate(config)
        if isinstance(config, list)
        else ()
    )
    for name, value in entries:
        if isinstance(value, int) and "vocab" in str(name):
            yield value
        yield from _sizes(value)
