"""Adapters for vLLM, by the name in a request: found, verified, handed over as a folder that stays
what it is.

    VENEER_LIBRARY=DIR              a library; "french" is a name of it
    VENEER_LIBRARY=s3://…           a remote place; "french" is what was pushed to s3://…/french
    VENEER_LIBRARY=hf://owner       "french" is the repository hf://owner/french
    "french@HASH"                   the same name while it stands for these very files: `Entry.object` in a library, at
                                    a remote place what `push` returned after the "@"

vLLM keeps the path that it is given: it reads the files again, and checks nothing, when an adapter
comes back after it had to make room, and its cache of keys and values goes by name and path. So the
path is that of a copy in our own cache, by hash: another adapter has another path, and neither `gc`
nor whoever writes to the library reaches it. (In vLLM 0.32 an adapter whose files are gone by then
ends the engine, and with it the server.)

The base is proven as elsewhere, by the fingerprints in the adapter's record, each weight read once
a process. vLLM names its base by a folder or a hub id; one whose files are not on this machine goes
by its name alone.
"""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import NamedTuple

from veneer.adapter_files.record import record_in_header
from veneer.errors import (
    AdapterError,
    BaseMismatchError,
    CheckpointError,
    listing,
    raise_all,
    sentence,
)
from veneer.fileio.hashing import recorded_fingerprints, recorded_hash_kind
from veneer.fileio.untrusted import read_header
from veneer.formats import peft
from veneer.models.base_weights import BaseWeights, open_base_weights
from veneer.serve.vllm import ADVICE, reasons_against
from veneer.store.catalogue import LibrarySource, RemoteSource
from veneer.store.library import NAME, Library
from veneer.store.remote import is_remote

log = logging.getLogger("vllm.veneer")

_VERSION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Found(NamedTuple):
    """An adapter for vLLM: its folder, and a number that goes by the folder's name, which is a
    hash."""

    path: Path
    number: int


class BaseProofs:
    """Proofs that a base is the one that an adapter's record speaks of. Each weight of a base is
    read once. Several threads may ask at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights: dict[str, BaseWeights | None] = {}

    def check(self, base: str, path: Path) -> str:
        """How far the base is that of the adapter's record, in words. ``BaseMismatchError``: it is
        not."""
        saved = record_in_header(
            path, read_header(path / peft.TENSORS).metadata
        )  # the rest was verified as it was pulled
        if saved is None:
            return "unknown, as another library wrote the adapter"
        record = saved["base"]
        with self._lock:
            if base not in self._weights:
                self._weights[base] = _weights(base)
            weights, recorded, kind = (
                self._weights[base],
                recorded_fingerprints(record),
                recorded_hash_kind(record),
            )
            if weights is None:
                base_name = record.get("name")
                same = "the same" if base_name == base else f"the adapter's is {base_name}"
                return f"by its name alone ({same}), as its weights are not in safetensors here"
            fingerprints = {
                weight_name: weights.fingerprint(weight_name, kind) for weight_name in recorded
            }
        different = [
            weight_name
            for weight_name, value in fingerprints.items()
            if value not in (None, recorded[weight_name])
        ]
        lacking = [
            weight_name for weight_name in record["weights"] if fingerprints[weight_name] is None
        ]
        if different or lacking:
            differences = [
                f"{words} {len(names)} of {len(recorded)} tensors ({listing(names, 3)})"
                for words, names in (("other numbers in", different), ("none of", lacking))
                if names
            ]
            expected = f"the base that it was trained on, {record.get('name') or record.get('architecture')}"
            do = "serve that base, or set VENEER_VERIFY_BASE=0 if these are the same weights, quantised"
            problem = f"{' and '.join(differences)} in {base}"
            raise BaseMismatchError(
                f"The adapter was made for another base. {sentence(problem, expected, do)}"
            )
        proven = sum(value is not None for value in fingerprints.values())
        return f"{proven} of {len(recorded)} tensors proven"


class Adapters:
    """The adapters of one place. Several threads may ask at once."""

    def __init__(self, place: str, *, verify_base: bool = True, cache: Path | None = None) -> None:
        """``cache``: where copies are kept; None takes ``veneer/adapters`` in ``$XDG_CACHE_HOME``
        or ``~/.cache``."""
        self._source = RemoteSource(place) if is_remote(place) else LibrarySource(Library(place))
        self.verify_base, self._cache = verify_base, cache
        self._proofs = BaseProofs()

    def find(self, base: str, name: str) -> Found | None:
        """The adapter of a name for ``base`` (a folder or a hub id), or None if it can be no name
        of ours.

        Raises:
            LibraryError, RemoteError: there is no such adapter, or no longer with this hash.
            AdapterError: it was altered, was made for another base, or is one that vLLM cannot
                serve.
        """
        plain, separator, version = name.partition("@")
        if not NAME.fullmatch(plain) or (separator and not _VERSION.fullmatch(version)):
            return None
        path = self._source.pull(plain, version, cache=self._cache)
        raise_all(
            AdapterError,
            "vLLM cannot load it",
            [sentence(why, *ADVICE) for why in reasons_against(path)],
        )
        proven = (
            self._proofs.check(base, path)
            if self.verify_base
            else "not compared, as VENEER_VERIFY_BASE=0 says"
        )
        log.info("Adapter %r: %s, base: %s", name, path, proven)
        return Found(path, 1 + int(path.name[:15], 16))


def _weights(base: str) -> BaseWeights | None:
    """The weights of a base, if they are on this machine in safetensors; a hub id is looked for in
    the hub's cache."""
    folder = Path(base).expanduser()
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(base, local_files_only=True))
        return open_base_weights(folder)
    except (
        ImportError,
        OSError,
        ValueError,
        CheckpointError,
    ) as error:  # neither a folder nor there
        log.warning("The weights of the base %s cannot be compared: %s", base, error)
        return None
