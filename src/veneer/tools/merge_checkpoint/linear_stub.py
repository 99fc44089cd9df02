"""The part of a model that adapters change, from what they and the checkpoint say, without the
model's code.

    linear_stub_model(checkpoint, saved_adapters) -> a module with the adapted linear layers at
    their paths, or None

An adapter of ours tells of each changed weight its path, the kind of its layer and its fingerprint.
Where the checkpoint has a tensor of that name and fingerprint, that tensor is the weight: nothing
was renamed, turned or joined on the way into the model. Left to the model itself is whatever may
have a second name: what is as large as the vocabulary (a tie of an embedding and a head), and all
of it where a layer's like is not changed. And so is every other kind of layer, and what is trained
in full.
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
    """A model without weights, for ``merge_plan.recipe_for``; None where only the real one will do.
    It is right for tensors that have the fingerprints in the adapters' records, which is for the
    caller to see."""
    config = checkpoint.folder / "config.json"
    try:
        vocabularies = set(_sizes(json.loads(config.read_text())))
    except (OSError, ValueError):
        return None  # whoever looks for the model will say what is wrong with it
    shapes: dict[str, tuple[int, int]] = {}
    for saved in saved_adapters:
        for weight, said in saved.metadata.get("changes", {}).items():
            known = weight in checkpoint.where and weight in saved.metadata["base"]["weights"]
            shape = list(checkpoint.shape(weight)) if known else []
            plain = said.get("kind") == "linear" and weight.endswith(".weight") and len(shape) == 2
            if not plain or vocabularies.intersection(shape):
                return None
            shapes[weight.removesuffix(".weight")] = shape[0], shape[1]
        if not saved.metadata or saved.full:
            return None
    alike = {(path.rpartition(".")[2], shape) for path, shape in shapes.items()}
    for name in checkpoint.where:
        path, _, last = name.rpartition(".")
        unchanged = last == "weight" and path not in shapes
        if unchanged and (path.rpartition(".")[2], tuple(checkpoint.shape(name))) in alike:
            return None
    whole = nn.Module()
    try:
        for path, (out, in_) in shapes.items():
            *above, name = path.split(".")
            module = whole
            for part in above:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.add_module(name, nn.Linear(in_, out, bias=False, device="meta"))
    except KeyError:  # names that no model can have
        return None
    return whole


def _sizes(config: Any) -> Iterator[int]:
    """Each size of a vocabulary that a configuration names, at any depth."""
    items = (
        config.items()
        if isinstance(config, dict)
        else enumerate(config)
        if isinstance(config, list)
        else ()
    )
    for name, value in items:
        if isinstance(value, int) and "vocab" in str(name):
            yield value
        yield from _sizes(value)
