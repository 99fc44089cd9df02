"""The record of an adapter folder: facts about the adapter and its base, and hashes that tell
whether the files changed after they were written.

The file veneer.json and the header of adapter_model.safetensors hold the same record:

    format      the version of the record's format
    base        name, architecture, the labels of a classifier; weights, rest: the fingerprints of
                the changed and of all other tensors (``base_proof.py``; earlier releases recorded
                no rest); fresh: the parameters that no checkpoint holds; quantized: how the base
                was packed in training, and whether the fingerprints are of the unpacked weights
    changes     of each weight with a low-rank change or trained tokens: the kind of its layer,
                rank, alpha; where they apply, "module_only", the changed rows ("rows"), the trained
                tokens ("tokens") and, with them, the number of rows of the weight ("of")
    config      the LoraConfig
    hashes      of the tensors, of adapter_config.json, of veneer.safetensors, and of the record
    versions    the versions of the libraries
    provenance  the mapping that the caller of ``save`` passed

The hashes detect accidents, not attacks, because the author of a folder can write any hashes. So
Veneer uses a record only for its own adapter and for adapters that are computed from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, listing, sentence
from veneer.fileio.hashing import digest, hash_json
from veneer.fileio.throttle import throttle
from veneer.fileio.untrusted import parse, read_json
from veneer.formats import peft

#: RECORD: the name of the file with the record. PARAMETERS: the name of the file with the
#: parameters of a variant that PEFT lacks
RECORD = "veneer.json"
PARAMETERS = "veneer.safetensors"
RECORD_FORMAT = 1


def seal_record(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The record of a folder, completed by its format, the hashes of all files and of the record
    itself, the versions of the libraries and the provenance.

    Args:
        record: the entries "base", "changes" and "config".
        tensors: the tensors of adapter_model.safetensors, by key.
        parameters: the tensors of veneer.safetensors, by key; empty if there is no such file.

    Raises:
        AdapterError: the provenance cannot be written as JSON.
    """
    record = {
        "format": RECORD_FORMAT,
        **record,
        "hashes": {"tensors": hash_tensors(tensors), peft.CONFIG: hash_json(peft_config)},
        "versions": dict(_versions()),
        "provenance": _to_json_value(dict(provenance)),
    }
    if parameters:
        record["hashes"][PARAMETERS] = hash_tensors(parameters)
    try:
        # hash the record as it will be read: JSON turns the keys of a mapping into strings
        record = json.loads(json.dumps(record))
    except TypeError as error:
        raise AdapterError(
            f"a provenance that is not JSON ({error})", "plain values", "convert it"
        ) from error
    record["hashes"]["record"] = hash_record(record)
    return record


@functools.cache
def _versions() -> dict[str, str]:
    """The versions of the libraries by name. They are cached, because to read them takes a quarter
    of the time in which a small adapter is saved."""
    versions = {}
    for package in ("veneer", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _to_json_value(value: Any) -> Any:
    """A value of a provenance as strict JSON: an infinite number becomes the text "inf", and a lone
    surrogate, which a file name may hold, becomes "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _to_json_value(member) for key, member in value.items()}
    return (
        [_to_json_value(member) for member in value] if isinstance(value, list | tuple) else value
    )


def record_in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in the header of adapter_model.safetensors; None if another library wrote the
    file. ``path``: the folder. ``metadata``: the header's texts by key.

    Raises:
        AdapterError: the record is damaged, or is in veneer.json alone.
    """
    if "veneer" not in metadata:
        if (path / RECORD).exists():
            raise AdapterError(
                f"{RECORD} beside a {peft.TENSORS} without Veneer's record",
                "files that belong together",
                f"remove {RECORD} if another library rewrote the tensors",
            )
        return None
    try:
        record = parse(metadata["veneer"])
        if not isinstance(record, dict) or not isinstance(record.get("hashes"), dict):
            raise ValueError("it holds no hashes")
        return record
    except ValueError as error:
        raise AdapterError(
            f"a damaged record in {path / peft.TENSORS} ({error})",
            "Veneer's record",
            "get it again",
        ) from error


def compare_hashes(
    path: Path,
    record: Mapping[str, Any],
    peft_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor] | None,
) -> dict[str, bool]:
    """Tell which contents of the folder ``path`` have changed since they were hashed: {description
    of the content: whether it has changed}.

    Args:
        record: the record, with the hashes.
        peft_config: the fields of ``adapter_config.json``.
        tensors: the tensors of ``adapter_model.safetensors``, by key.
        parameters: the tensors of ``veneer.safetensors``; None if the file could not be read.
    """
    hashes = record["hashes"]
    changed_by_content = {
        "the record in its header": hash_record(record) != hashes.get("record"),
        "its tensors": hash_tensors(tensors) != hashes.get("tensors"),
        peft.CONFIG: hash_json(peft_config) != hashes.get(peft.CONFIG),
    }
    if (path / RECORD).exists():
        changed_by_content[RECORD] = read_json(path / RECORD) != record
    if parameters is not None and (parameters or PARAMETERS in hashes):
        changed_by_content[PARAMETERS] = hash_tensors(parameters) != hashes.get(PARAMETERS)
    return changed_by_content


def require_unchanged(changed_by_content: Mapping[str, bool], path: Path) -> None:
    """Raise AdapterError if any content of the folder ``path`` has changed since it was written.
    ``changed_by_content``: the result of ``compare_hashes``."""
    changed_contents = [
        content for content, has_changed in changed_by_content.items() if has_changed
    ]
    if changed_contents:
        problem = f"{path}, of which {' and '.join(changed_contents)} changed after it was written"
        if changed_contents == [PARAMETERS]:
            problem = f"{path / PARAMETERS}, which changed after it was written"
        raise AdapterError(
            problem, "the files as they were saved", "get another copy of the folder"
        )


def labels_in(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels of the adapted classifier, in the order of its outputs: those of the base, or
    those in the settings of the ``veneer train`` run that the provenance holds. None if there are
    none."""
    task_settings = record.get("provenance", {}).get("task")
    for labels in (
        record.get("base", {}).get("labels"),
        task_settings.get("labels") if isinstance(task_settings, dict) else None,
    ):
        if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
            return tuple(labels)
    return None


def record_problems(record: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The error texts for a record with invalid fields, as far as they can be checked without a
    model. ``path``: the folder, for the texts."""
    if record.get("format") != RECORD_FORMAT:
        yield sentence(
            f"format {_short_repr(record.get('format'))} in {path}",
            f"{RECORD_FORMAT}",
            "install a newer Veneer",
        )
        return
    base_record, changes = record.get("base"), record.get("changes")
    fingerprints = base_record.get("weights") if isinstance(base_record, dict) else None
    if (
        not isinstance(fingerprints, dict)
        or not isinstance(changes, dict)
        or not isinstance(record.get("config"), dict)
    ):
        yield sentence(
            "no base, changes or config in it", "all three", "save it again with this Veneer"
        )
        return
    rest_fingerprints, fresh_names = base_record.get("rest", {}), base_record.get("fresh", [])
    mappings = [
        rest_fingerprints,
        base_record.get("quantized", {}),
        record.get("versions", {}),
        record.get("provenance", {}),
    ]
    has_containers = isinstance(fresh_names, list) and all(
        isinstance(mapping, dict) for mapping in mappings
    )
    if not has_containers or not all(
        isinstance(text, str)
        for text in (
            base_record.get("name") or "",
            base_record.get("architecture") or "",
            *fingerprints.values(),
            *rest_fingerprints.values(),
            *fresh_names,
            *record["hashes"].values(),
        )
    ):
        expected = "text for names and hashes; versions, provenance and quantized by name"
        yield sentence("fields of other types", expected, "get another copy")
    if fingerprints.keys() != changes.keys():
        different_paths = listing(sorted(fingerprints.keys() ^ changes.keys()), 3)
        yield sentence(
            f"changes and fingerprints of other weights ({different_paths})",
            "the same",
            "get another copy",
        )
    for weight_path, change in changes.items():
        yield from _change_problems(weight_path, change)


def _change_problems(weight_path: str, change: Any) -> Iterator[str]:
    """The error texts for invalid fields in ``change``, the settings that the record lists for the
    weight at ``weight_path``."""
    fields = change if isinstance(change, dict) else {}
    rank, alpha = fields.get("rank"), fields.get("alpha")
    module_only, row_count = fields.get("module_only", False), fields.get("of")
    min_rank = 0 if fields.get("tokens") else 1
    is_rank_valid = type(rank) is int and min_rank <= rank <= peft.MAX_RANK
    checks = [
        (
            is_rank_valid and type(alpha) in (int, float),
            "rank {} and alpha {}",
            (rank, alpha),
            f"a rank of at least {min_rank} and a number",
        ),
        (type(module_only) is bool, "module_only {}", (module_only,), "true or false"),
        *(
            (
                _is_range_list(fields[field]),
                f"{field} {{}}",
                (fields[field],),
                "(start, stop) pairs",
            )
            for field in ("rows", "tokens")
            if field in fields
        ),
        (
            "tokens" not in fields or type(row_count) is int,
            "tokens of {} rows",
            (row_count,),
            "the number of rows of its weight",
        ),
    ]
    for is_valid, template, values, expected in checks:
        if not is_valid:
            problem = template.format(*map(_short_repr, values))
            yield sentence(f"{problem} for {weight_path!r}", expected, "get another copy")


def _is_range_list(value: Any) -> bool:
    """Whether ``value`` is a list of pairs [start, stop] of integers that are not negative. It may
    not be empty, but the pairs may be in any order."""
    has_pairs = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    )
    return has_pairs and all(type(bound) is int and bound >= 0 for pair in value for bound in pair)


def _short_repr(value: Any) -> str:
    """The ``repr`` of a value, truncated to 200 characters."""
    value_repr = repr(value)
    return value_repr if len(value_repr) <= 200 else f"{value_repr[:200]}…"


def ranges_of(indices: Iterable[int]) -> list[list[int]]:
    """The runs of consecutive numbers in ascending indices, each as [start, stop]."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1])
    return ranges


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the keys, shapes and contents of tensors."""
    combined_hash = hashlib.sha256()
    for key in throttle(sorted(tensors)):
        combined_hash.update(f"{key} {tuple(tensors[key].shape)} {digest(tensors[key])}\n".encode())
    return combined_hash.hexdigest()


def hash_record(record: Mapping[str, Any]) -> str:
    """The hash of a record, computed without the field ["hashes"]["record"] that holds it."""
    file_hashes = {key: value for key, value in record["hashes"].items() if key != "record"}
    return hash_json({**record, "hashes": file_hashes})
