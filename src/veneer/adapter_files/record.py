"""The record of an adapter folder: what it says about the adapter, its hashes, and whether the
files are still those.

    veneer.json, and the same in the header of adapter_model.safetensors:
    format      of the record
    base        name, architecture, the labels of a classifier, the fingerprint of each tensor (``base_proof.py``):
                those that the adapter changes apart from the rest, of which folders of an earlier
                Veneer say nothing; quantized: how it was packed as the adapter was trained, and
                whether the fingerprints are of what it was packed from
    changes     rank, alpha and rows of each changed weight; the tokens that are trained, and of how many rows
    config      the LoraConfig
    hashes      of the tensors, of adapter_config.json, of veneer.safetensors, and of the record itself
    versions, provenance    of the libraries; what the caller gave

A hash tells what an accident changed; whoever writes a folder can write its hashes. So nothing that
a record says decides about more than the adapter itself.
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
from veneer.fileio.throttle import throttled
from veneer.fileio.untrusted import parse, read_json
from veneer.formats import peft

RECORD = "veneer.json"
PARAMETERS = "veneer.safetensors"
FORMAT = 1


def sealed(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A record with the hashes of everything, its own included."""
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
        # as it will be read: JSON turns the keys of a mapping into strings
        record = json.loads(json.dumps(record))
    except TypeError as error:
        raise AdapterError(
            f"a provenance that is not JSON ({error})", "plain values", "convert it"
        ) from error
    record["hashes"]["record"] = hash_record(record)
    return record


@functools.cache
def _versions() -> dict[str, str]:
    """Of the libraries. Each is read from a file of text, which is a quarter of the time that a
    small save takes."""
    found = {}
    for package in ("veneer", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _plain(value: Any) -> Any:
    """A provenance as strict JSON has it: an infinite loss is the text "inf", as JSON has no such
    number, and half of a surrogate pair, as a file name may hold one, is "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, list | tuple) else value


def record_in(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in the header of the tensors, which are another library's if there is none."""
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


def altered(
    path: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor] | None,
) -> dict[str, bool]:
    """For each part of a folder that the record has a hash of, in words: whether it has changed.
    ``parameters``: those of ``veneer.safetensors``; None if they could not be read."""
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


def must_belong(checks: Mapping[str, bool], path: Path) -> None:
    changed = [what for what, other in checks.items() if other]
    if changed:
        problem = f"{path}, of which {' and '.join(changed)} changed after it was written"
        if changed == [PARAMETERS]:
            problem = f"{path / PARAMETERS}, which changed after it was written"
        raise AdapterError(
            problem, "the files as they were saved", "get another copy of the folder"
        )


def labels_in(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels of the classifier that a record is of, in the order of its outputs; None: it is of
    none, or an earlier Veneer wrote it and no run of ``veneer train`` says them either."""
    task = record.get("provenance", {}).get("task")
    for labels in (
        record.get("base", {}).get("labels"),
        task.get("labels") if isinstance(task, dict) else None,
    ):
        if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
            return tuple(labels)
    return None


def malformed(record: Mapping[str, Any], path: Path) -> Iterator[str]:
    """What is wrong with a record, as far as it can be told without a model."""
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
    for at, change in changes.items():
        said = change if isinstance(change, dict) else {}
        rank, alpha, tokens = said.get("rank"), said.get("alpha"), said.get("tokens")
        least = 0 if tokens else 1
        if (
            type(rank) is not int
            or not least <= rank <= peft.MAX_RANK
            or type(alpha) not in (int, float)
        ):
            expected = f"a rank of at least {least} and a number"
            yield sentence(
                f"rank {_brief(rank)} and alpha {_brief(alpha)} for {at!r}",
                expected,
                "get another copy",
            )
        if type(said.get("module_only", False)) is not bool:
            yield sentence(
                f"module_only {_brief(said['module_only'])} for {at!r}",
                "true or false",
                "get another copy",
            )
        for field in ("rows", "tokens"):
            if field in said and not _ranges(said[field]):
                yield sentence(
                    f"{field} {_brief(said[field])} for {at!r}",
                    "(start, stop) pairs",
                    "get another copy",
                )
        if "tokens" in said and type(said.get("of")) is not int:
            problem = f"tokens of {_brief(said.get('of'))} rows for {at!r}"
            yield sentence(problem, "the number of rows of its weight", "get another copy")


def _ranges(value: Any) -> bool:
    """Whether these are (start, stop) pairs, ascending or not."""
    pairs = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, list) and len(part) == 2 for part in value)
    )
    return pairs and all(type(end) is int and end >= 0 for part in value for end in part)


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
    whole = hashlib.sha256()
    for key in throttled(sorted(tensors)):
        whole.update(f"{key} {tuple(tensors[key].shape)} {digest(tensors[key])}\n".encode())
    return whole.hexdigest()


def hash_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record["hashes"].items() if key != "record"}
    return hash_json({**record, "hashes": rest})
