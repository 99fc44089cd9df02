"""Encrypt each file of a checkpoint for the owners of public keys, in the format of the tool age
(age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from veneer.errors import DataError

# pyrage is optional and has no type stubs. ``import_module``, unlike ``import``, gives an untyped
# module, so that the type check passes whether or not pyrage is installed.

ENCRYPTED_SUFFIX = ".age"


def read_recipients(public_keys: Sequence[str]) -> list[Any]:
    """Parse public keys of age or SSH into pyrage's recipient objects, for ``encrypt_files``.
    ``DataError``: a key is invalid, or there are keys but pyrage is not installed."""
    if not public_keys:
        return []
    try:
        pyrage: Any = import_module("pyrage")
    except ModuleNotFoundError as error:
        raise DataError(
            "age_encryption_recipients on a server without pyrage",
            "pyrage",
            "pip install 'veneer[tinker]', or encrypt what was downloaded",
        ) from error
    recipients = []
    for public_key in public_keys:
        key_module = pyrage.ssh if public_key.startswith("ssh-") else pyrage.x25519
        try:
            recipients.append(key_module.Recipient.from_str(public_key))
        except pyrage.RecipientError as error:
            raise DataError(
                f"the recipient {public_key[:80]!r} ({error})",
                "a public key of age or SSH (age1…, ssh-ed25519 …, ssh-rsa …)",
                "check it",
            ) from error
    return recipients


def encrypt_files(folder: Path, recipients: Sequence[Any]) -> None:
    """Replace each FILE in a folder and its subfolders by FILE.age, which only the owners of the
    keys ``recipients`` (from ``read_recipients``) can decrypt."""
    pyrage: Any = import_module("pyrage")
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        pyrage.encrypt_file(str(file), f"{file}{ENCRYPTED_SUFFIX}", recipients)
        file.unlink()
