"""Read the source of a conversion as an adapter folder in PEFT's layout.

A source in another format is first written to a scratch folder in PEFT's layout, so that the same
code checks and reads the adapters of every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import folder, save
from veneer.adapter_files.base_proof import earlier_fingerprints, fingerprints_of
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import ModelIndex, detach
from veneer.config import LoraConfig
from veneer.errors import AdapterError, BaseMismatchError, listing
from veneer.fileio.hashing import recorded_fingerprints, recorded_hash_kind
from veneer.fileio.untrusted import read_json
from veneer.formats import FORMATS, BaseFacts, Contents, Options, peft, peft_tuners
from veneer.models.base_weights import list_weights
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.convert import deltas
from veneer.tools.convert.base_info import BaseInfo


def read_source(
    source: Path,
    source_format: str,
    scratch_folder: Path,
    base_info: BaseInfo,
    options: Options,
    verify_base: bool,
) -> tuple[AdapterFiles, Contents, dict[str, float]]:
    """Read ``source`` as an adapter folder. If it is no folder in PEFT's layout, its changes are
    first written as one to ``scratch_folder``.

    Returns:
        the content of the adapter folder; what the reader of the source's format found (empty for a
        source in PEFT's layout); the error ‖ΔW − B A‖ / ‖ΔW‖ of each dense change that was
        factored, by path.

    Raises:
        AdapterError: the source has no change, only some of its layers are DoRA, dense changes are
            to be factored without a base, or only the model tells the order of its parameters.
        BaseMismatchError: ``verify_base`` is True, and the dense changes are of another base.
    """
    read_contents = FORMATS[source_format].read
    if read_contents is None:
        adapter_files = folder.read(source, _weight_lookup(base_info.facts))
        return FrozenWeights(None, base_info.structure).read_adapter(adapter_files), Contents(), {}
    contents = read_contents(source, base_info.facts, options)
    if not contents.low and not contents.deltas:
        raise AdapterError(f"no change at all in {source}", "at least one", "check the file")
    if contents.deltas:
        relative_errors = _write_from_deltas(
            source, contents, scratch_folder, base_info, options, verify_base
        )
        return folder.read(scratch_folder), contents, relative_errors
    dora_flags = [bool(layer.extras) for layer in contents.low.values()]
    if any(dora_flags) and not all(dora_flags):
        raise AdapterError(
            f"{source}, where {sum(dora_flags)} of {len(dora_flags)} layers are DoRA",
            "all of them or none",
            "merge it with the tool that made it",
        )
    config_only_adapter = AdapterFiles(
        path=source,
        config=LoraConfig(),
        peft_config={
            "peft_type": "LORA",
            "base_model_name_or_path": contents.base_name,
            "r": 1,
            "lora_alpha": 1,
            "fan_in_fan_out": contents.transposed,
        },
        record=None,
        low={},
        full={},
        adapter_parameters={},
    )
    write_derived(
        scratch_folder,
        [config_only_adapter],
        contents.low,
        variant="dora" if any(dora_flags) else "lora",
    )
    return folder.read(scratch_folder), contents, {}


def read_tuner_type(source: Path) -> str | None:
    """The ``peft_type`` of a PEFT folder if its tuner is not LoRA, else None."""
    tuner = (
        peft_tuners.tuner_of(read_json(source / peft.CONFIG))
        if (source / peft.CONFIG).is_file()
        else None
    )
    return None if tuner is None else tuner.type


def _weight_lookup(facts: BaseFacts) -> peft_tuners.WeightLookup | None:
    """A function that maps the path of a weight to its shape and dtype (None if the base's config
    names no dtype), or to None if the base lacks the weight. None without a base."""
    dtype_name = facts.config.get("dtype") or facts.config.get("torch_dtype")
    dtype = getattr(torch, str(dtype_name).removeprefix("torch."), None)

    def shape_and_dtype(name: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        return None if name not in facts.shapes else (facts.shapes[name], dtype)

    return shape_and_dtype if facts.shapes else None


def _write_from_deltas(
    source: Path,
    contents: Contents,
    scratch_folder: Path,
    base_info: BaseInfo,
    options: Options,
    verify_base: bool,
) -> dict[str, float]:
    """Factor the dense changes in ``contents``, and write them as an adapter folder to
    ``scratch_folder``. The base's model determines which layers they belong to. Returns the error
    ‖ΔW − B A‖ / ‖ΔW‖ of each factored change, by path."""
    if base_info.load_model is None:
        raise AdapterError(
            f"{source}, whose changes only a model's layers make products of",
            "the base that it was made for",
            "give the base",
        )
    model = base_info.load_model()
    if verify_base:
        _verify_fingerprints(model, contents.metadata.get("base") or {}, source)
    full_names = frozenset(contents.deltas) if options.whole else contents.full
    relative_errors = deltas.install_deltas(
        model, contents.deltas, full_names, rank=options.rank, energy=options.energy
    )
    try:
        save(model, scratch_folder, name=deltas.ADAPTER_NAME, base_name=contents.base_name)
    finally:
        detach(model, deltas.ADAPTER_NAME)
    return relative_errors


def _verify_fingerprints(model: nn.Module, base_record: Mapping[str, Any], source: Path) -> None:
    """Raise BaseMismatchError if the weights of ``model`` do not match the fingerprints (hashes) in
    ``base_record``. The dense file ``source`` copied this field from the record of the adapter that
    it was converted from."""
    model_weights = [
        model_weight for model_weight in list_weights(ModelIndex(model)) if model_weight.is_readable
    ]
    fingerprints = zip(
        model_weights,
        fingerprints_of(model_weights, hash_kind=recorded_hash_kind(base_record)),
        strict=True,
    )
    fingerprint_by_name = {
        name: fingerprint
        for model_weight, fingerprint in fingerprints
        for name in model_weight.names
    }
    changed_fingerprints, unchanged_fingerprints = (
        base_record.get("weights") or {},
        base_record.get("rest") or {},
    )
    mismatched_paths = [
        name
        for name, recorded_fingerprint in changed_fingerprints.items()
        if fingerprint_by_name.get(name) != recorded_fingerprint
    ]
    mismatched_paths += [
        name
        for name, recorded_fingerprint in unchanged_fingerprints.items()
        if fingerprint_by_name.get(name, recorded_fingerprint) != recorded_fingerprint
    ]
    earlier_hashes = (
        earlier_fingerprints(model_weights, recorded_hash_kind(base_record))
        if mismatched_paths
        else {}
    )
    mismatched_paths = [
        name
        for name in mismatched_paths
        if earlier_hashes.get(name) != recorded_fingerprints(base_record).get(name, "")
    ]
    if mismatched_paths:
        raise BaseMismatchError(
            f"other weights at {listing(mismatched_paths, 3)} than those of"
            f" {base_record.get('name')}, for which {source} was made",
            "its own base",
            "give that one, or pass verify_base=False",
        )
