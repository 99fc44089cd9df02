"""Check that a model is the base that an adapter was trained on: compare the fingerprints of the
model's weights (``base_proof.py``) with the fingerprints in the adapter's record."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from veneer.adapter_files.base_proof import (
    call_modified_weights,
    earlier_fingerprints,
    fingerprint_without_rows,
    fingerprints_of,
    was_modified_by_call,
)
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import means_parameter, ref_at
from veneer.attach import ModelIndex
from veneer.errors import BaseMismatchError, listing, sentence
from veneer.fileio.hashing import recorded_fingerprints, recorded_hash_kind
from veneer.formats import peft_paths
from veneer.formats.peft_targets import TensorsLeftOut, describe_ignored
from veneer.models.base_weights import list_weights
from veneer.models.quantize import sources_of
from veneer.variants import VARIANTS


class UnverifiedAdapter(UserWarning):
    """Veneer cannot verify that an adapter was trained on this base: another library wrote the
    folder without fingerprints, or the adapter's record and the model do not list the same tensors.
    ``convert`` also gives this warning if it has no base: it then cannot verify that PEFT's result
    with the adapter is that of changed weights."""


class PartialChange(UserWarning):
    """A folder of PEFT changes the output of a module, while other code of the model may read the
    module's weight directly and so compute without the change."""


def must_be_base(
    model_index: ModelIndex, adapter_files: AdapterFiles, cache: dict[str, dict[str, str]]
) -> None:
    """Compare the fingerprint of every tensor of the base that the adapter's record lists with that
    of the model's tensor. Warn ``UnverifiedAdapter`` if the two do not have the same tensors and
    the record covers more than the adapted layers.

    Args:
        model_index: the modules of the model by path.
        cache: the model's fingerprints by kind of hash and by name. New ones are added.

    Raises:
        BaseMismatchError: fingerprints differ.
    """
    base_record = adapter_files.metadata["base"]
    expected_fingerprints = recorded_fingerprints(base_record)
    hash_kind = recorded_hash_kind(base_record)
    fingerprints = cache.setdefault(hash_kind, {})
    token_weight_fingerprints = {
        weight_path: expected_fingerprints.pop(weight_path)
        for weight_path, change in adapter_files.metadata["changes"].items()
        if "tokens" in change
    }
    uncached_names = expected_fingerprints.keys() - fingerprints.keys()
    if uncached_names:
        uncached_weights = [
            module_weight
            for module_weight in list_weights(model_index)
            if module_weight.is_readable and not uncached_names.isdisjoint(module_weight.names)
        ]
        for module_weight, digest in zip(
            uncached_weights, fingerprints_of(uncached_weights, hash_kind=hash_kind), strict=True
        ):
            fingerprints.update(dict.fromkeys(module_weight.names, digest))
    # for a weight that Veneer quantised at loading, the record may have the fingerprint of the
    # packed weight, or that of the checkpoint's weight from which it was made
    file_fingerprints = sources_of(model_index.model)
    accepted_fingerprints = {
        name: (digest, file_fingerprints.get(digest)) for name, digest in fingerprints.items()
    }
    mismatched_names = [
        name
        for name, expected_fingerprint in expected_fingerprints.items()
        if expected_fingerprint not in accepted_fingerprints.get(name, (expected_fingerprint,))
    ]
    mismatched_weights = [
        base_weight
        for base_weight in list_weights(model_index)
        if base_weight.is_readable and not {*mismatched_names}.isdisjoint(base_weight.names)
    ]
    earlier_release_fingerprints = earlier_fingerprints(mismatched_weights, hash_kind)
    mismatched_names = [
        name
        for name in mismatched_names
        if earlier_release_fingerprints.get(name) != expected_fingerprints[name]
    ]
    mismatched_names += [
        weight_path
        for weight_path, expected_fingerprint in token_weight_fingerprints.items()
        if not _untrained_rows_match(model_index, adapter_files, weight_path, expected_fingerprint)
    ]
    if mismatched_names:
        was_called = any(
            was_modified_by_call(base_weight)
            for base_weight in call_modified_weights(mismatched_weights)
            if not {*mismatched_names}.isdisjoint(base_weight.names)
        )
        raise BaseMismatchError(_mismatch_text(adapter_files, mismatched_names, was_called))
    _warn_unproven(
        model_index, adapter_files, expected_fingerprints, fingerprints, token_weight_fingerprints
    )


def _warn_unproven(
    model_index: ModelIndex,
    adapter_files: AdapterFiles,
    expected_fingerprints: Mapping[str, str],
    fingerprints: Mapping[str, str],
    token_weight_fingerprints: Mapping[str, str],
) -> None:
    """Warn of parameters of the model that the record does not list, and of recorded tensors that
    the model lacks.

    Args:
        expected_fingerprints: the record's fingerprints by name, without those in
            ``token_weight_fingerprints``.
        fingerprints: the model's fingerprints by name.
        token_weight_fingerprints: the record's fingerprints of weights with trained token rows, by
            path.
    """
    base_record = adapter_files.metadata["base"]
    missing_names = [name for name in expected_fingerprints if name not in fingerprints]
    recorded_names = {
        *expected_fingerprints,
        *token_weight_fingerprints,
        *base_record.get("fresh", ()),
    }
    full_tensor_names = {
        f"{peft_paths.strip_wrappers(path)[0]}.{name}".lstrip(".")
        for path, full_tensors in adapter_files.full.items()
        for name in full_tensors
    }
    unlisted_paths = [
        module_weight.path
        for module_weight in list_weights(model_index)
        if isinstance(module_weight.weight, nn.Parameter)
        and recorded_names.isdisjoint(module_weight.names)
        and full_tensor_names.isdisjoint(module_weight.names)
    ]
    paths_by_problem = {
        "parameters of this model are not in its record": unlisted_paths,
        "tensors of its record are not in this model": missing_names,
    }
    problem_texts = [
        f"{len(paths)} {problem} ({listing(paths, 3)})"
        for problem, paths in paths_by_problem.items()
        if paths
    ]
    # do not warn for records of earlier releases, which cover only the adapted layers ("rest", the
    # fingerprints of the other tensors, is missing), as nearly every model has other tensors
    if problem_texts and "rest" in base_record:
        warnings.warn(
            f"{adapter_files.path} does not prove all of this base: {'; '.join(problem_texts)}."
            " That is right where nothing that you use reads them.",
            UnverifiedAdapter,
            stacklevel=6,
        )


def _untrained_rows_match(
    model_index: ModelIndex,
    adapter_files: AdapterFiles,
    weight_path: str,
    expected_fingerprint: str,
) -> bool:
    """Whether a weight of the model equals the base's weight in all rows that the adapter does not
    train. ``expected_fingerprint``: that of the base's weight without the trained tokens' rows."""
    module_weight = next(
        module_weight
        for module_weight in list_weights(model_index)
        if weight_path in module_weight.names
    )
    token_ids = next(
        token_rows.ids
        for path, token_rows in adapter_files.tokens.items()
        if f"{path}.{weight_path.rpartition('.')[2]}" in module_weight.names
    )
    return (
        fingerprint_without_rows(module_weight, token_ids, hash_kind=expected_fingerprint)
        == expected_fingerprint
    )


def leave_out_ignored(adapter_files: AdapterFiles, model_index: ModelIndex) -> AdapterFiles:
    """The adapter without the changes that PEFT ignores, as ``formats/peft_targets.py`` describes,
    where only the model tells: if ``target_parameters`` names a parameter without its module, any
    change of the file may be of such a parameter. The warning that names their modules points at
    the call of ``veneer.load``, four frames above."""
    peft_config = adapter_files.peft_config
    has_bare_target = any("." not in name for name in peft_config.get("target_parameters") or ())
    # PEFT also adapts modules that are tied to a target, which no name matches
    is_tied = peft_config.get("ensure_weight_tying")
    if adapter_files.record is not None or not has_bare_target or is_tied:
        return adapter_files
    ignored_paths = {
        path: ref[0]
        for path in adapter_files.low
        if (ref := ref_at(model_index, path, peft_config)) is not None
        and not means_parameter(model_index, ref, peft_config)
        and peft_paths.expected_paths(
            peft_config,
            {
                peft_paths.strip_wrappers(name)[0]
                for name in (path, peft_paths.attention_of(path) or path)
            },
        )
        == set()
    }
    if ignored_paths:
        warnings.warn(
            f"{adapter_files.path} holds {describe_ignored(ignored_paths.values())}.",
            TensorsLeftOut,
            stacklevel=5,
        )
    return replace(
        adapter_files,
        low={path: layer for path, layer in adapter_files.low.items() if path not in ignored_paths},
        ignored_modules=(*adapter_files.ignored_modules, *ignored_paths.values()),
    )


def warn_foreign(path: str | Path) -> None:
    """Warn that a folder has no record, so that its base cannot be verified. The warning points at
    the call of ``veneer.load``, four frames above."""
    warnings.warn(
        f"{path} was written by another library and carries no fingerprint of its base: names and"
        " shapes fit this model, but only you can tell whether it was trained on these weights."
        " Save it with veneer.save to have it checked from now on.",
        UnverifiedAdapter,
        stacklevel=5,
    )


def warn_module_only(path: str | Path, module_paths: Sequence[str]) -> None:
    """Warn that only calls of the modules at ``module_paths`` see the adapter's change, because
    PEFT adds it to their outputs, while other code reads their unchanged weights. Nothing happens
    if there are no paths. The warning points at the call of ``veneer.load``, four frames above."""
    if module_paths:
        warnings.warn(
            f"{path} changes what {listing(module_paths, 3)} give, whose weights other code of this"
            " model may read past them: there PEFT computes with the base's weights, and so does"
            " this adapter. It cannot be merged. veneer.check tells whether the model reads"
            " them so.",
            PartialChange,
            stacklevel=5,
        )


def _mismatch_text(
    adapter_files: AdapterFiles, mismatched_names: Sequence[str], was_called: bool
) -> str:
    """The text of the BaseMismatchError: which tensors differ, and what to do.

    Args:
        mismatched_names: the tensors whose fingerprints differ from the record's.
        was_called: whether a forward call has changed packed weights among them (bitsandbytes
            rounds the scales of 4-bit weights on some processors), so that the values that the
            adapter was trained on may be lost.
    """
    base_record, count_texts = adapter_files.metadata["base"], []
    for key, label in (("weights", "adapted layers"), ("rest", "other tensors")):
        differing_names = [name for name in mismatched_names if name in base_record.get(key, {})]
        count_texts += (
            [
                f"{len(differing_names)} of {len(base_record[key])} {label}"
                f" ({listing(differing_names, 3)})"
            ]
            if differing_names
            else []
        )
    problem = f"other weights in {' and '.join(count_texts)}"
    base_name = base_record["name"] or base_record["architecture"]
    expected_text = f"the base that it was trained on, {base_name}"
    advice = (
        "load that base, or pass verify_base=False if these are the same weights in another"
        " precision"
    )
    if (quantised := base_record.get("quantized")) and not quantised.get("original"):
        expected_text += (
            f", quantised by {quantised.get('by')} ({quantised.get('as', 'as its config says')})"
        )
        advice += (
            "; an adapter that `veneer train --quantize` made knows the weights in 16 bits as well"
        )
    if VARIANTS[adapter_files.config.variant].makes_up_for_quantization:
        expected_text = f"{base_name}, quantised as it was in training"
        advice = "load the base so: the adapter begins with what the quantisation has lost"
    if was_called:
        problem += (
            ", in 4 bits with scales that a call on a processor with AVX512-BF16 has rounded, as"
            " bitsandbytes does"
        )
        advice = (
            "load the base anew and the adapter before the first call (earlier records know such"
            f" weights so), or {advice}"
        )
    fresh_names = [name for name in base_record.get("fresh", ()) if name in mismatched_names]
    if fresh_names:
        module_paths = list(dict.fromkeys(name.rpartition(".")[0] for name in fresh_names))
        problem += (
            f", of which {listing(fresh_names, 3)} were random as the adapter was trained, and are"
            " in no file"
        )
        advice = f"train it anew with train_also={module_paths[:3]!r}, or {advice}"
    mismatch = sentence(problem, expected_text, advice)
    return f"The adapter {adapter_files.path} was made for another base. {mismatch}"
