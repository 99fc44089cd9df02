"""Find and verify the adapter that a request to vLLM names, and give vLLM a folder with a copy of
it, which nothing changes later.

    VENEER_LIBRARY=DIR              a library; "french" is the adapter of this name
    VENEER_LIBRARY=s3://…           a remote address; "french" is the adapter at s3://…/french
    VENEER_LIBRARY=hf://owner       "french" is the repository hf://owner/french
    "french@HASH"                   the adapter "french", only if its files have this hash: in a
                                    library `Entry.object`, at a remote address the part after the
                                    "@" of what `push` returned

vLLM keeps the path that it gets. When it has dropped an adapter from memory and needs it again, it
reads the files again and does not verify them; and its KV cache is keyed by name and path. So the
path is that of a copy in a cache of our own, named by its hash: a changed adapter has another path,
and neither `gc` nor a writer of the library changes the copy. (If the files are gone when vLLM 0.32
reads them again, its engine ends, and with it the server.)

The base is compared with the fingerprints in the adapter's record. A process reads each weight of
the base at most once. vLLM names its base by a folder or a hub id. A base whose files are not on
this machine is compared by its name alone.
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


class AdapterCopy(NamedTuple):
    """A verified adapter for vLLM. ``path``: its folder, whose name is a hash. ``lora_id``: its
    integer id in vLLM, made from the hash."""

    path: Path
    lora_id: int


class BaseProofs:
    """Compares bases with the records of adapters. Each weight of a base is read only once. Several
    threads may call ``check`` at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights: dict[str, BaseWeights | None] = {}

    def check(self, base: str, path: Path) -> str:
        """Compare a base (a folder or a hub id) with the record of the adapter folder ``path``.
        Returns a text for the log, which says what was proven. ``BaseMismatchError``: the adapter
        was made for another base."""
        # reading the header is enough, since the files were verified when they were copied
        adapter_record = record_in_header(path, read_header(path / peft.TENSORS).metadata)
        if adapter_record is None:
            return "unknown, as another library wrote the adapter"
        base_record = adapter_record["base"]
        with self._lock:
            if base not in self._weights:
                self._weights[base] = _open_weights(base)
            weights, recorded, hash_kind = (
                self._weights[base],
                recorded_fingerprints(base_record),
                recorded_hash_kind(base_record),
            )
            if weights is None:
                base_name = base_record.get("name")
                comparison = "the same" if base_name == base else f"the adapter's is {base_name}"
                reason = "its weights are not in safetensors here"
                return f"by its name alone ({comparison}), as {reason}"
            fingerprints = {
                weight_name: weights.fingerprint(weight_name, hash_kind) for weight_name in recorded
            }
        different = [
            weight_name
            for weight_name, fingerprint in fingerprints.items()
            if fingerprint not in (None, recorded[weight_name])
        ]
        missing = [
            weight_name
            for weight_name in base_record["weights"]
            if fingerprints[weight_name] is None
        ]
        if different or missing:
            differences = [
                f"{words} {len(names)} of {len(recorded)} tensors ({listing(names, 3)})"
                for words, names in (("other numbers in", different), ("none of", missing))
                if names
            ]
            trained_base = base_record.get("name") or base_record.get("architecture")
            message = sentence(
                f"{' and '.join(differences)} in {base}",
                f"the base that it was trained on, {trained_base}",
                "serve that base, or set VENEER_VERIFY_BASE=0 if these are the same weights,"
                " quantised",
            )
            raise BaseMismatchError(f"The adapter was made for another base. {message}")
        proven_count = sum(fingerprint is not None for fingerprint in fingerprints.values())
        return f"{proven_count} of {len(recorded)} tensors proven"


class Adapters:
    """The adapters of one library or remote address. Several threads may call ``find`` at once."""

    def __init__(
        self, address: str, *, verify_base: bool = True, cache: Path | None = None
    ) -> None:
        """``cache``: the folder for copies; None: ``veneer/adapters`` in ``$XDG_CACHE_HOME``
        or ``~/.cache``."""
        self._source = (
            RemoteSource(address) if is_remote(address) else LibrarySource(Library(address))
        )
        self.verify_base, self._cache = verify_base, cache
        self._proofs = BaseProofs()

    def find(self, base: str, name: str) -> AdapterCopy | None:
        """The adapter of a name for ``base`` (a folder or a hub id). None: no adapter can have this
        name.

        Raises:
            LibraryError, RemoteError: there is no such adapter, or its hash is another one now.
            AdapterError: the adapter was altered, was made for another base, or vLLM cannot
                load it.
        """
        adapter_name, separator, version = name.partition("@")
        if not NAME.fullmatch(adapter_name) or (separator and not _VERSION.fullmatch(version)):
            return None
        path = self._source.pull(adapter_name, version, cache=self._cache)
        raise_all(
            AdapterError,
            "vLLM cannot load it",
            [sentence(reason, *ADVICE) for reason in reasons_against(path)],
        )
        proof = (
            self._proofs.check(base, path)
            if self.verify_base
            else "not compared, as VENEER_VERIFY_BASE=0 says"
        )
        log.info("Adapter %r: %s, base: %s", name, path, proof)
        return AdapterCopy(path, 1 + int(path.name[:15], 16))


def _open_weights(base: str) -> BaseWeights | None:
    """Open the weights of a base; a hub id is looked up in the hub's cache. None: this machine has
    no files of the base in safetensors."""
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
    ) as error:  # no folder, or not in the cache
        log.warning("The weights of the base %s cannot be compared: %s", base, error)
        return None
