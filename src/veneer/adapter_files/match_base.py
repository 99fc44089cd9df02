"""Check that a model is the base that an adapter was trained on: compare the fingerprints of its
weights (``base_proof.py``) with those of the record."""

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
    """It cannot be verified that an adapter was trained on this base: another library wrote it
    without fingerprints, or the base has parameters that its record does not list. In ``convert``:
    or, without a base, that it changes weights alone."""


class PartialChange(UserWarning):
    """A folder of PEFT changes the output of a module, and other code of the model reads the
    module's weight directly, without the change."""


def must_be_base(names: Names, saved: AdapterFiles, cache: dict[str, dict[str, str]]) -> None:
    """Compare the fingerprint of every tensor of the base that the record lists. ``cache``: the
    model's fingerprints by kind and name; new ones are added."""
    record = saved.metadata["base"]
    recorded, kind = recorded_fingerprints(record), recorded_hash_kind(record)
    fingerprints = cache.setdefault(kind, {})
    tokens = {
        weight_path: recorded.pop(weight_path)
        for weight_path, change in saved.metadata["changes"].items()
        if "tokens" in change
    }
    missing = recorded.keys() - fingerprints.keys()
    if missing:
        lacking = [
            tensor
            for tensor in list_weights(names)
            if tensor.is_readable and not missing.isdisjoint(tensor.names)
        ]
        for tensor, fingerprint in zip(lacking, fingerprints_of(lacking, kind=kind), strict=True):
            fingerprints.update(dict.fromkeys(tensor.names, fingerprint))
    # a weight that was quantised at loading may also match by the fingerprint of its file
    sources = sources_of(names.model)
    accepted = {name: (computed, sources.get(computed)) for name, computed in fingerprints.items()}
    different = [
        name
        for name, expected in recorded.items()
        if expected not in accepted.get(name, (expected,))
    ]
    packed = [
        base_weight
        for base_weight in list_weights(names)
        if base_weight.is_readable and not {*different}.isdisjoint(base_weight.names)
    ]
    earlier = earlier_fingerprints(packed, kind)
    different = [name for name in different if earlier.get(name) != recorded[name]]
    different += [
        weight_path
        for weight_path, expected in tokens.items()
        if not _has_other_rows(names, saved, weight_path, expected)
    ]
    if different:
        settled = any(
            was_modified_by_call(base_weight)
            for base_weight in call_modified_weights(packed)
            if not {*different}.isdisjoint(base_weight.names)
        )
        raise BaseMismatchError(_mismatch_text(saved, different, settled))
    _warn_unproven(names, saved, recorded, fingerprints, tokens)


def _warn_unproven(
    names: Names,
    saved: AdapterFiles,
    recorded: Mapping[str, str],
    fingerprints: Mapping[str, str],
    tokens: Mapping[str, str],
) -> None:
    """Warn of parameters of the model that the record does not list, and of recorded tensors that
    the model lacks.

    Args:
        recorded: the fingerprints of the record by name, without those in ``tokens``.
        fingerprints: the model's fingerprints by name.
        tokens: the fingerprints of weights with trained token rows.
    """
    record = saved.metadata["base"]
    lacking = [name for name in recorded if name not in fingerprints]
    named = {*recorded, *tokens, *record.get("fresh", ())}
    full_names = {
        f"{peft_paths.strip_wrappers(path)[0]}.{name}".lstrip(".")
        for path, full in saved.full.items()
        for name in full
    }
    unknown = [
        tensor.path
        for tensor in list_weights(names)
        if isinstance(tensor.weight, nn.Parameter)
        and named.isdisjoint(tensor.names)
        and full_names.isdisjoint(tensor.names)
    ]
    paths_by_problem = {"parameters of this model are not in its record": unknown}
    paths_by_problem["tensors of its record are not in this model"] = lacking
    counts = [
        f"{len(paths)} {problem} ({listing(paths, 3)})"
        for problem, paths in paths_by_problem.items()
        if paths
    ]
    if counts and "rest" in record:  # earlier releases recorded the adapted layers alone
        text = (
            f"{saved.path} does not prove all of this base: {'; '.join(counts)}. That is right"
            " where nothing that "
        )
        warnings.warn(f"{text}you use reads them.", UnverifiedAdapter, stacklevel=6)


def _has_other_rows(names: Names, saved: AdapterFiles, weight_path: str, expected: str) -> bool:
    """Whether a weight with trained token rows is the base's in all other rows."""
    tensor = next(tensor for tensor in list_weights(names) if weight_path in tensor.names)
    ids = next(
        token_rows.ids
        for path, token_rows in saved.tokens.items()
        if f"{path}.{weight_path.rpartition('.')[2]}" in tensor.names
    )
    return fingerprint_without_rows(tensor, ids, kind=expected) == expected


def warn_foreign(path: str | Path) -> None:
    """Warn of a folder without a record, at the caller of ``veneer.load``, four frames above."""
    warnings.warn(
        f"{path} was written by another library and carries no fingerprint of its base: names and"
        " shapes fit this model, but only you can tell whether it was trained on these weights."
        " Save it with veneer.save to have it checked from now on.",
        UnverifiedAdapter,
        stacklevel=5,
    )


def warn_module_only(path: str | Path, modules: Sequence[str]) -> None:
    """Warn of changes of module outputs alone, at the caller of ``veneer.load``, four frames
    above."""
    if modules:
        warnings.warn(
            f"{path} changes what {listing(modules, 3)} give, whose weights other code of this"
            " model may read past them: there PEFT computes with the base's weights, and so does"
            " this adapter. It cannot be merged. veneer.check tells whether the model reads"
            " them so.",
            PartialChange,
            stacklevel=5,
        )


def _mismatch_text(saved: AdapterFiles, different: Sequence[str], settled: bool) -> str:
    """The text of the error. ``settled``: a call has changed packed weights among ``different``."""
    record, counts = saved.metadata["base"], []
    for key, label in (("weights", "adapted layers"), ("rest", "other tensors")):
        names = [name for name in different if name in record.get(key, {})]
        counts += (
            [f"{len(names)} of {len(record[key])} {label} ({listing(names, 3)})"] if names else []
        )
    problem = f"other weights in {' and '.join(counts)}"
    expected = f"the base that it was trained on, {record['name'] or record['architecture']}"
    do = (
        "load that base, or pass verify_base=False if these are the same weights in another"
        " precision"
    )
    if (quantised := record.get("quantized")) and not quantised.get("original"):
        expected += (
            f", quantised by {quantised.get('by')} ({quantised.get('as', 'as its config says')})"
        )
        do += (
            "; an adapter that `veneer train --quantize` made knows the weights in 16 bits as well"
        )
    if settled:
        problem += (
            ", in 4 bits with scales that a call on a processor with AVX512-BF16 has rounded, as"
            " bitsandbytes does"
        )
        do = (
            "load the base anew and the adapter before the first call (earlier records know such"
            f" weights so), or {do}"
        )
    fresh_names = [name for name in record.get("fresh", ()) if name in different]
    if fresh_names:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in fresh_names))
        problem += (
            f", of which {listing(fresh_names, 3)} were random as the adapter was trained, and are"
            " in no file"
        )
        do = f"train it anew with train_also={modules[:3]!r}, or {do}"
    return f"The adapter {saved.path} was made for another base. {sentence(problem, expected, do)}"
