"""Check that a model is the base that an adapter was trained on: compare the fingerprints of the
model's weights (``base_proof.py``) with the fingerprints in the adapter's record."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
from veneer.attach import Names
from veneer.errors import BaseMismatchError, listing, sentence
from veneer.fileio.hashing import recorded_fingerprints, recorded_hash_kind
from veneer.formats import peft_paths
from veneer.models.base_weights import list_weights
from veneer.models.quantize import sources_of


class UnverifiedAdapter(UserWarning):
    """Veneer cannot verify that an adapter was trained on this base: another library wrote the
    folder without fingerprints, or the adapter's record and the model do not list the same tensors.
    ``convert`` also gives this warning if it has no base, and so cannot verify that the adapter
    changes only weights."""


class PartialChange(UserWarning):
    """A folder of PEFT changes the output of a module, while other code of the model may read the
    module's weight directly and so compute without the change."""


def must_be_base(
    names: Names, adapter_files: AdapterFiles, cache: dict[str, dict[str, str]]
) -> None:
    """Compare the fingerprint of every tensor of the base that the record lists.

    Args:
        cache: the model's fingerprints by kind of hash and by name. New ones are added.

    Raises:
        BaseMismatchError: fingerprints differ.
    """
    base_record = adapter_files.metadata["base"]
    expected_fingerprints = recorded_fingerprints(base_record)
    hash_kind = recorded_hash_kind(base_record)
    fingerprints = cache.setdefault(hash_kind, {})
    token_weights = {
        weight_path: expected_fingerprints.pop(weight_path)
        for weight_path, change in adapter_files.metadata["changes"].items()
        if "tokens" in change
    }
    uncached_names = expected_fingerprints.keys() - fingerprints.keys()
    if uncached_names:
        uncached_tensors = [
            tensor
            for tensor in list_weights(names)
            if tensor.is_readable and not uncached_names.isdisjoint(tensor.names)
        ]
        for tensor, digest in zip(
            uncached_tensors, fingerprints_of(uncached_tensors, hash_kind=hash_kind), strict=True
        ):
            fingerprints.update(dict.fromkeys(tensor.names, digest))
    # a weight that was quantised at loading may also match by the fingerprint of its checkpoint
    file_fingerprints = sources_of(names.model)
    accepted = {
        name: (digest, file_fingerprints.get(digest)) for name, digest in fingerprints.items()
    }
    mismatches = [
        name
        for name, expected in expected_fingerprints.items()
        if expected not in accepted.get(name, (expected,))
    ]
    mismatched_weights = [
        base_weight
        for base_weight in list_weights(names)
        if base_weight.is_readable and not {*mismatches}.isdisjoint(base_weight.names)
    ]
    old_fingerprints = earlier_fingerprints(mismatched_weights, hash_kind)
    mismatches = [
        name for name in mismatches if old_fingerprints.get(name) != expected_fingerprints[name]
    ]
    mismatches += [
        weight_path
        for weight_path, expected in token_weights.items()
        if not _untrained_rows_match(names, adapter_files, weight_path, expected)
    ]
    if mismatches:
        was_called = any(
            was_modified_by_call(base_weight)
            for base_weight in call_modified_weights(mismatched_weights)
            if not {*mismatches}.isdisjoint(base_weight.names)
        )
        raise BaseMismatchError(_mismatch_text(adapter_files, mismatches, was_called))
    _warn_unproven(names, adapter_files, expected_fingerprints, fingerprints, token_weights)


def _warn_unproven(
    names: Names,
    adapter_files: AdapterFiles,
    expected_fingerprints: Mapping[str, str],
    fingerprints: Mapping[str, str],
    token_weights: Mapping[str, str],
) -> None:
    """Warn of parameters of the model that the record does not list, and of recorded tensors that
    the model lacks.

    Args:
        expected_fingerprints: the record's fingerprints by name, without those in
            ``token_weights``.
        fingerprints: the model's fingerprints by name.
        token_weights: the fingerprints in the record of weights with trained tokens, by path.
    """
    base_record = adapter_files.metadata["base"]
    missing_names = [name for name in expected_fingerprints if name not in fingerprints]
    recorded_names = {*expected_fingerprints, *token_weights, *base_record.get("fresh", ())}
    full_names = {
        f"{peft_paths.strip_wrappers(path)[0]}.{name}".lstrip(".")
        for path, full in adapter_files.full.items()
        for name in full
    }
    unlisted_paths = [
        tensor.path
        for tensor in list_weights(names)
        if isinstance(tensor.weight, nn.Parameter)
        and recorded_names.isdisjoint(tensor.names)
        and full_names.isdisjoint(tensor.names)
    ]
    paths_by_problem = {
        "parameters of this model are not in its record": unlisted_paths,
        "tensors of its record are not in this model": missing_names,
    }
    counts = [
        f"{len(paths)} {problem} ({listing(paths, 3)})"
        for problem, paths in paths_by_problem.items()
        if paths
    ]
    # the records of earlier releases cover the adapted layers alone
    if counts and "rest" in base_record:
        warning_text = (
            f"{adapter_files.path} does not prove all of this base: {'; '.join(counts)}. That is"
            " right where nothing that "
        )
        warnings.warn(f"{warning_text}you use reads them.", UnverifiedAdapter, stacklevel=6)


def _untrained_rows_match(
    names: Names, adapter_files: AdapterFiles, weight_path: str, expected: str
) -> bool:
    """Whether a weight with trained token rows equals the base's weight in all other rows.
    ``expected``: the fingerprint of the base's weight without the trained rows."""
    tensor = next(tensor for tensor in list_weights(names) if weight_path in tensor.names)
    ids = next(
        token_rows.ids
        for path, token_rows in adapter_files.tokens.items()
        if f"{path}.{weight_path.rpartition('.')[2]}" in tensor.names
    )
    return fingerprint_without_rows(tensor, ids, hash_kind=expected) == expected


def warn_foreign(path: str | Path) -> None:
    """Warn of a folder without a record. The warning points at the call of ``veneer.load``, four
    frames above."""
    warnings.warn(
        f"{path} was written by another library and carries no fingerprint of its base: names and"
        " shapes fit this model, but only you can tell whether it was trained on these weights."
        " Save it with veneer.save to have it checked from now on.",
        UnverifiedAdapter,
        stacklevel=5,
    )


def warn_module_only(path: str | Path, modules: Sequence[str]) -> None:
    """Warn of changes of module outputs alone. The warning points at the call of ``veneer.load``,
    four frames above."""
    if modules:
        warnings.warn(
            f"{path} changes what {listing(modules, 3)} give, whose weights other code of this"
            " model may read past them: there PEFT computes with the base's weights, and so does"
            " this adapter. It cannot be merged. veneer.check tells whether the model reads"
            " them so.",
            PartialChange,
            stacklevel=5,
        )


def _mismatch_text(adapter_files: AdapterFiles, mismatches: Sequence[str], was_called: bool) -> str:
    """The text of the BaseMismatchError. ``mismatches``: the names of tensors with other
    fingerprints. ``was_called``: whether a forward call has changed packed weights among them."""
    base_record, counts = adapter_files.metadata["base"], []
    for key, label in (("weights", "adapted layers"), ("rest", "other tensors")):
        names = [name for name in mismatches if name in base_record.get(key, {})]
        counts += (
            [f"{len(names)} of {len(base_record[key])} {label} ({listing(names, 3)})"]
            if names
            else []
        )
    problem = f"other weights in {' and '.join(counts)}"
    base_name = base_record["name"] or base_record["architecture"]
    expected = f"the base that it was trained on, {base_name}"
    do = (
        "load that base, or pass verify_base=False if these are the same weights in another"
        " precision"
    )
    if (quantised := base_record.get("quantized")) and not quantised.get("original"):
        expected += (
            f", quantised by {quantised.get('by')} ({quantised.get('as', 'as its config says')})"
        )
        do += (
            "; an adapter that `veneer train --quantize` made knows the weights in 16 bits as well"
        )
    if was_called:
        problem += (
            ", in 4 bits with scales that a call on a processor with AVX512-BF16 has rounded, as"
            " bitsandbytes does"
        )
        do = (
            "load the base anew and the adapter before the first call (earlier records know such"
            f" weights so), or {do}"
        )
    fresh_names = [name for name in base_record.get("fresh", ()) if name in mismatches]
    if fresh_names:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in fresh_names))
        problem += (
            f", of which {listing(fresh_names, 3)} were random as the adapter was trained, and are"
            " in no file"
        )
        do = f"train it anew with train_also={modules[:3]!r}, or {do}"
    mismatch = sentence(problem, expected, do)
    return f"The adapter {adapter_files.path} was made for another base. {mismatch}"
