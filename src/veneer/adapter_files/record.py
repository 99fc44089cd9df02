"""The record of an adapter folder: facts about the adapter and its base, and hashes that tell
whether the files changed after they were written.

    veneer.json, and the same in the header of adapter_model.safetensors:
    format      of the record
    base        name, architecture, the labels of a classifier; weights, rest: the fingerprints of
                the changed and of the other tensors (``base_proof.py``; earlier releases recorded
                no rest);
                quantized: how the base was packed in training, and whether the fingerprints are
                those of the unpacked weights
    changes     rank, alpha and rows of each changed weight; the trained tokens, and the number of
                rows of the weight
    config      the LoraConfig
    hashes      of the tensors, of adapter_config.json, of veneer.safetensors, and of the record
                itself
    versions, provenance    the versions of the libraries; the mapping that the caller passed

Hashes detect accidents, not attacks: the author of a folder can write any hashes. So a record never
decides about anything but the adapter itself.
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

RECORD = "veneer.json"
PARAMETERS = "veneer.safetensors"
FORMAT = 1


def seal_record(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The record with the hashes of all files and its own hash."""
    record = {
        "format": FORMAT,
        **record,
        "hashes": {"tensors": hash_tensors(tensors), peft.CONFIG: hash_json(peft_config)},
        "versions": dict(_versions()),
        "provenance": _plain(dict(provenance)),
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
    """The versions of the libraries by name. Cached: reading them takes a quarter of the time of a
    small save."""
    versions = {}
    for package in ("veneer", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _plain(value: Any) -> Any:
    """A provenance as strict JSON: an infinite number becomes the text "inf", and a lone surrogate,
    which a file name may hold, becomes "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, list | tuple) else value


def record_in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in the header of the tensor file; None if another library wrote the file."""
    if "veneer" not in metadata:
        if (path / RECORD).exists():
            problem = f"{RECORD} beside a {peft.TENSORS} without Veneer's record"
            do = f"remove {RECORD} if another library rewrote the tensors"
            raise AdapterError(problem, "files that belong together", do)
        return None
    try:
        record = parse(metadata["veneer"])
        if not isinstance(record, dict) or not isinstance(record.get("hashes"), dict):
            raise ValueError("it holds no hashes")
        return record
    except ValueError as error:
        problem = f"a damaged record in {path / peft.TENSORS} ({error})"
        raise AdapterError(problem, "Veneer's record", "get it again") from error


def compare_hashes(
    path: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor] | None,
) -> dict[str, bool]:
    """Whether each file or tensor set that the record has a hash of has changed, by a description
    of it. ``parameters``: the tensors of ``veneer.safetensors``; None if they could not be read."""
    hashes = record["hashes"]
    checks = {
        "the record in its header": hash_record(record) != hashes.get("record"),
        "its tensors": hash_tensors(tensors) != hashes.get("tensors"),
        peft.CONFIG: hash_json(config) != hashes.get(peft.CONFIG),
    }
    if (path / RECORD).exists():
        checks[RECORD] = read_json(path / RECORD) != record
    if parameters is not None and (parameters or PARAMETERS in hashes):
        checks[PARAMETERS] = hash_tensors(parameters) != hashes.get(PARAMETERS)
    return checks


def require_unchanged(checks: Mapping[str, bool], path: Path) -> None:
    """Raise AdapterError if any check of ``compare_hashes`` found a change."""
    changed = [subject for subject, is_changed in checks.items() if is_changed]
    if changed:
        problem = f"{path}, of which {' and '.join(changed)} changed after it was written"
        if changed == [PARAMETERS]:
            problem = f"{path / PARAMETERS}, which changed after it was written"
        raise AdapterError(
            problem, "the files as they were saved", "get another copy of the folder"
        )


def labels_in(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels of the classifier that was adapted, in the order of its outputs; None if it was no
    classifier, or if neither the record nor the run of ``veneer train`` lists them."""
    task = record.get("provenance", {}).get("task")
    for labels in (
        record.get("base", {}).get("labels"),
        task.get("labels") if isinstance(task, dict) else None,
    ):
        if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
            return tuple(labels)
    return None


def record_problems(record: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The problems of a record that can be found without a model."""
    if record.get("format") != FORMAT:
        yield sentence(
            f"format {_brief(record.get('format'))} in {path}",
            f"{FORMAT}",
            "install a newer Veneer",
        )
        return
    base, changes = record.get("base"), record.get("changes")
    weights = base.get("weights") if isinstance(base, dict) else None
    if (
        not isinstance(weights, dict)
        or not isinstance(changes, dict)
        or not isinstance(record.get("config"), dict)
    ):
        yield sentence(
            "no base, changes or config in it", "all three", "save it again with this Veneer"
        )
        return
    texts = [
        base.get("name") or "",
        base.get("architecture") or "",
        *weights.values(),
        *record["hashes"].values(),
    ]
    tables = [record.get(name, {}) for name in ("versions", "provenance")] + [
        base.get("quantized", {})
    ]
    rest, fresh = base.get("rest", {}), base.get("fresh", [])
    if isinstance(rest, dict) and isinstance(fresh, list):
        texts += [*rest.values(), *fresh]
    else:
        tables.append(None)
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(table, dict) for table in tables
    ):
        expected = "text for names and hashes; versions, provenance and quantized by name"
        yield sentence("fields of other types", expected, "get another copy")
    if weights.keys() != changes.keys():
        odd = listing(sorted(weights.keys() ^ changes.keys()), 3)
        yield sentence(
            f"changes and fingerprints of other weights ({odd})", "the same", "get another copy"
        )
    for weight_path, change in changes.items():
        yield from _change_problems(weight_path, change)


def _change_problems(weight_path: str, change: Any) -> Iterator[str]:
    """The problems of one entry of "changes"."""
    fields = change if isinstance(change, dict) else {}
    rank, alpha, tokens = fields.get("rank"), fields.get("alpha"), fields.get("tokens")
    least = 0 if tokens else 1
    if (
        type(rank) is not int
        or not least <= rank <= peft.MAX_RANK
        or type(alpha) not in (int, float)
    ):
        expected = f"a rank of at least {least} and a number"
        yield sentence(
            f"rank {_brief(rank)} and alpha {_brief(alpha)} for {weight_path!r}",
            expected,
            "get another copy",
        )
    if type(fields.get("module_only", False)) is not bool:
        yield sentence(
            f"module_only {_brief(fields['module_only'])} for {weight_path!r}",
            "true or false",
            "get another copy",
        )
    for field in ("rows", "tokens"):
        if field in fields and not _ranges(fields[field]):
            yield sentence(
                f"{field} {_brief(fields[field])} for {weight_path!r}",
                "(start, stop) pairs",
                "get another copy",
            )
    if "tokens" in fields and type(fields.get("of")) is not int:
        problem = f"tokens of {_brief(fields.get('of'))} rows for {weight_path!r}"
        yield sentence(problem, "the number of rows of its weight", "get another copy")


def _ranges(value: Any) -> bool:
    """Whether ``value`` is a list of (start, stop) pairs, ascending or not."""
    pairs = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    )
    return pairs and all(type(end) is int and end >= 0 for pair in value for end in pair)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def ranges_of(indices: Iterable[int]) -> list[list[int]]:
    """Ascending runs of indices as (start, stop)."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1])
    return ranges


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in throttle(sorted(tensors)):
        total.update(f"{key} {tuple(tensors[key].shape)} {digest(tensors[key])}\n".encode())
    return total.hexdigest()


def hash_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record["hashes"].items() if key != "record"}
    return hash_json({**record, "hashes": rest})
