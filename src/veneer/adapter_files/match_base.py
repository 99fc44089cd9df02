"""Is a model the base that an adapter was trained on? Its fingerprints (``base_proof.py``) against
the record's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from veneer.adapter_files.base_proof import (
    earlier_fingerprints,
    fingerprint_beside,
    fingerprints_of,
    has_settled,
    settling,
)
from veneer.adapter_files.folder import AdapterFiles
from veneer.attach.targets import Names
from veneer.errors import BaseMismatchError, listing, sentence
from veneer.fileio.hashing import kind_in, prints_in
from veneer.formats import peft
from veneer.models.base_weights import list_weights
from veneer.models.quantize import sources_of


class UnverifiedAdapter(UserWarning):
    """Nobody can tell whether an adapter was made for this base: another library wrote it, so it
    carries no fingerprint, or the base has parameters of which its record does not speak. Of
    ``convert``: or whether it is one of weights, as there is no base."""


class PartialChange(UserWarning):
    """A folder of PEFT changes what a module gives, and not what others read of its weight past
    it."""


def must_be_base(names: Names, saved: AdapterFiles, known: dict[str, dict[str, str]]) -> None:
    """Compare the fingerprint of every tensor of the base that the record speaks of. ``known`` are
    fingerprints of the model by kind and name; what is computed is added."""
    record = saved.metadata["base"]
    recorded, kind = prints_in(record), kind_in(record)
    fingerprints = known.setdefault(kind, {})
    tokens = {
        at: recorded.pop(at) for at, said in saved.metadata["changes"].items() if "tokens" in said
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
    # a weight that was quantised as it was loaded goes by that of the file, too
    sources = sources_of(names.model)
    own = {name: (found, sources.get(found)) for name, found in fingerprints.items()}
    different = [
        name for name, expected in recorded.items() if expected not in own.get(name, (expected,))
    ]
    packed = [
        one
        for one in list_weights(names)
        if one.is_readable and not {*different}.isdisjoint(one.names)
    ]
    earlier = earlier_fingerprints(packed, kind)
    different = [name for name in different if earlier.get(name) != recorded[name]]
    different += [
        at for at, expected in tokens.items() if not _has_other_rows(names, saved, at, expected)
    ]
    if different:
        settled = any(
            has_settled(one) for one in settling(packed) if not {*different}.isdisjoint(one.names)
        )
        raise BaseMismatchError(_another_base(saved, different, settled))
    lacking = [name for name in recorded if name not in fingerprints]
    told = {*recorded, *tokens, *record.get("fresh", ())}
    own = {
        f"{peft.unnested(path)[0]}.{name}".lstrip(".")
        for path, full in saved.full.items()
        for name in full
    }
    unknown = [
        tensor.path
        for tensor in list_weights(names)
        if isinstance(tensor.weight, nn.Parameter)
        and told.isdisjoint(tensor.names)
        and own.isdisjoint(tensor.names)
    ]
    said = {"parameters of this model are not in its record": unknown}
    said["tensors of its record are not in this model"] = lacking
    parts = [f"{len(paths)} {what} ({listing(paths, 3)})" for what, paths in said.items() if paths]
    if parts and "rest" in record:  # one of an earlier Veneer speaks of adapted layers alone
        text = (
            f"{saved.path} does not prove all of this base: {'; '.join(parts)}. That is right where"
            " nothing that "
        )
        warnings.warn(f"{text}you use reads them.", UnverifiedAdapter, stacklevel=5)


def _has_other_rows(names: Names, saved: AdapterFiles, at: str, expected: str) -> bool:
    """Whether a weight of which the adapter trains tokens is the base's in all other rows."""
    tensor = next(tensor for tensor in list_weights(names) if at in tensor.names)
    ids = next(
        one.ids
        for path, one in saved.tokens.items()
        if f"{path}.{at.rpartition('.')[2]}" in tensor.names
    )
    return fingerprint_beside(tensor, ids, kind=expected) == expected


def warn_foreign(path: str | Path) -> None:
    """Warn of a folder without a record. Whoever called ``veneer.load`` is four frames above."""
    warnings.warn(
        f"{path} was written by another library and carries no fingerprint of its base: names and"
        " shapes fit this model, but only you can tell whether it was trained on these weights."
        " Save it with veneer.save to have it checked from now on.",
        UnverifiedAdapter,
        stacklevel=5,
    )


def warn_module_only(path: str | Path, modules: Sequence[str]) -> None:
    """Warn of changes that are none of weights. Whoever called ``veneer.load`` is four frames
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


def _another_base(saved: AdapterFiles, different: Sequence[str], settled: bool) -> str:
    """The text of the error. ``settled``: packed weights among these are no longer as they were
    loaded."""
    record, parts = saved.metadata["base"], []
    for key, what in (("weights", "adapted layers"), ("rest", "other tensors")):
        names = [name for name in different if name in record.get(key, {})]
        parts += (
            [f"{len(names)} of {len(record[key])} {what} ({listing(names, 3)})"] if names else []
        )
    found = f"other weights in {' and '.join(parts)}"
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
        found += (
            ", in 4 bits with scales that a call on a processor with AVX512-BF16 has rounded, as"
            " bitsandbytes does"
        )
        do = (
            "load the base anew and the adapter before the first call (earlier records know such"
            f" weights so), or {do}"
        )
    lost = [name for name in record.get("fresh", ()) if name in different]
    if lost:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in lost))
        found += (
            f", of which {listing(lost, 3)} were random as the adapter was trained, and are in no"
            " file"
        )
        do = f"train it anew with train_also={modules[:3]!r}, or {do}"
    return f"The adapter {saved.path} was made for another base. {sentence(found, expected, do)}"
