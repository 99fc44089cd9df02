"""Encrypt each file of a checkpoint for the owners of public keys, in the format of age
(age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from veneer.errors import DataError

SUFFIX = ".age"


def read_recipients(texts: Sequence[str]) -> list[Any]:
    """Parse public keys. ``DataError``: a text is no key, or pyrage is not installed."""
    if not texts:
        return []
    try:
        pyrage = _import_pyrage()
    except ModuleNotFoundError as error:
        problem = "age_encryption_recipients on a server without pyrage"
        raise DataError(
            problem, "it", "pip install 'veneer[tinker]', or encrypt what was downloaded"
        ) from error
    recipients = []
    for text in texts:
        kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
        try:
            recipients.append(kind.Recipient.from_str(text))
        except pyrage.RecipientError as error:
            expected = "a public key of age or SSH (age1…, ssh-ed25519 …, ssh-rsa …)"
            raise DataError(
                f"the recipient {text[:80]!r} ({error})", expected, "check it"
            ) from error
    return recipients


def encrypt_files(folder: Path, recipients: Sequence[Any]) -> None:
    """Replace the files of a folder by encrypted ones."""
    pyrage = _import_pyrage()
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        pyrage.encrypt_file(str(file), f"{file}{SUFFIX}", recipients)
        file.unlink()


def _import_pyrage() -> Any:
    # pyrage has no type stubs: an untyped value passes the type check whether or not it is
    # installed
    return import_module("pyrage")
