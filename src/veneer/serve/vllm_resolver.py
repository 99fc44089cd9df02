"""Find and verify the adapter that a request to vLLM names, and give vLLM a copy of its folder that
nothing changes later (for ``vllm_plugin.py``).

    VENEER_LIBRARY=DIR              a library; "french" is the adapter of this name
    VENEER_LIBRARY=s3://…           a remote address; "french" is the adapter at s3://…/french
    VENEER_LIBRARY=hf://owner       "french" is the repository hf://owner/french
    "french@HASH"                   the adapter "french", only if its files have this hash: in a
                                    library `Entry.object`, at a remote address the part after the
                                    "@" in the result of `push`

vLLM keeps the path that it gets. When it has dropped an adapter from memory and needs it again, it
reads the files again and does not verify them; and its prefix cache finds entries by the adapter's
name and path. So the path is that of a copy in a cache folder of Veneer, which is named by the hash
of its content. Then a changed adapter has another path, and neither `gc` nor a program that writes
to the library changes the copy. (If the files are gone when vLLM 0.32 reads them again, its engine
ends, and with it the server.)

An adapter gives wrong answers on another base than the one it was trained on. So the hashes of the
base's weights in the adapter's record (fingerprints) are compared with the weights of vLLM's base,
which vLLM names by a folder or a hub id. A process reads each weight of the base at most once. If
the base's files are not on this machine, only its name is compared, and the result is logged.
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

#: the hash after the "@" of a name
_VERSION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class AdapterCopy(NamedTuple):
    """A verified copy of an adapter for vLLM. ``path``: its folder, whose name is the hash of its
    content. ``lora_id``: its integer id in vLLM, made from the hash."""

    path: Path
    lora_id: int


class BaseVerifier:
    """Compares bases with the hashes of base weights (fingerprints) in the records of adapters. The
    hash of each weight is computed only once. Several threads may call ``check`` at the same
    time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._base_weights: dict[str, BaseWeights | None] = {}

    def check(self, base: str, path: Path) -> str:
        """Compare ``base`` (a folder or a hub id) with the record of the adapter in the folder
        ``path``. Without a record, or if the base's files are not on this machine, nothing is
        proven, which is no error. Returns a text for the log that says what was compared.
        ``BaseMismatchError``: the adapter was made for another base."""
        # read only the header of the weights' file, since the files were verified when they were
        # copied
        adapter_record = record_in_header(path, read_header(path / peft.TENSORS).metadata)
        if adapter_record is None:
            return "unknown, as another library wrote the adapter"
        base_record = adapter_record["base"]
        with self._lock:
            if base not in self._base_weights:
                self._base_weights[base] = _open_weights(base)
            base_weights, recorded_hashes, hash_kind = (
                self._base_weights[base],
                recorded_fingerprints(base_record),
                recorded_hash_kind(base_record),
            )
            if base_weights is None:
                base_name = base_record.get("name")
                comparison = "the same" if base_name == base else f"the adapter's is {base_name}"
                reason = "its weights are not in safetensors here"
                return f"by its name alone ({comparison}), as {reason}"
            fingerprints = {
                weight_name: base_weights.fingerprint(weight_name, hash_kind)
                for weight_name in recorded_hashes
            }
        different_names = [
            weight_name
            for weight_name, fingerprint in fingerprints.items()
            if fingerprint not in (None, recorded_hashes[weight_name])
        ]
        missing_names = [
            weight_name
            for weight_name in base_record["weights"]
            if fingerprints[weight_name] is None
        ]
        if different_names or missing_names:
            differences = [
                f"{difference} {len(names)} of {len(recorded_hashes)} tensors ({listing(names, 3)})"
                for difference, names in (
                    ("other numbers in", different_names),
                    ("none of", missing_names),
                )
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
        return f"{proven_count} of {len(recorded_hashes)} tensors proven"


class Adapters:
    """The adapters of one library or remote address, for vLLM. Several threads may call ``find`` at
    once."""

    def __init__(
        self, address: str, *, verify_base: bool = True, cache: Path | None = None
    ) -> None:
        """
        Args:
            address: the path of a library, or a remote address.
            verify_base: whether ``find`` compares the base with the adapter's record.
            cache: the folder for copies; None: ``veneer/adapters`` in ``$XDG_CACHE_HOME`` or
                ``~/.cache``.
        """
        self._source = (
            RemoteSource(address) if is_remote(address) else LibrarySource(Library(address))
        )
        self.verify_base, self._cache = verify_base, cache
        self._base_verifier = BaseVerifier()

    def find(self, base: str, name: str) -> AdapterCopy | None:
        """A verified copy of the adapter ``name`` ("french" or "french@HASH"), for use with
        ``base`` (a folder or a hub id). None if ``name`` does not have the form of an adapter's
        name.

        Raises:
            LibraryError, RemoteError: there is no such adapter, or it has another hash than HASH.
            AdapterError: its files are damaged, it was made for another base, or vLLM cannot load
                it.
        """
        adapter_name, separator, version_hash = name.partition("@")
        if not NAME.fullmatch(adapter_name) or (separator and not _VERSION.fullmatch(version_hash)):
            return None
        path = self._source.pull(adapter_name, version_hash, cache=self._cache)
        raise_all(
            AdapterError,
            "vLLM cannot load it",
            [sentence(reason, *ADVICE) for reason in reasons_against(path)],
        )
        base_comparison = (
            self._base_verifier.check(base, path)
            if self.verify_base
            else "not compared, as VENEER_VERIFY_BASE=0 says"
        )
        log.info("Adapter %r: %s, base: %s", name, path, base_comparison)
        return AdapterCopy(path, 1 + int(path.name[:15], 16))


def _open_weights(base: str) -> BaseWeights | None:
    """Open the files with the weights of ``base``, a folder or a hub id. For a hub id, only the
    local cache of huggingface_hub is searched; nothing is downloaded. None: this machine has no
    files of the base in the safetensors format."""
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
