"""The names of the files in an adapter folder, and functions to copy and hash the files and to find
the tokenizer that a folder holds if its adapter trains added tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer.adapter_files import model_card
from veneer.adapter_files.record import PARAMETERS, RECORD
from veneer.errors import AdapterError, OutputExistsError, listing, raise_all, sentence
from veneer.fileio.untrusted import location_problems, read_json
from veneer.formats import peft, peft_tokens
from veneer.models.load import tokenizer_at
from veneer.models.safetensors_dir import TOKENIZER_FILES

#: the files that ``folder.read`` opens, all of them JSON or safetensors, which cannot run code
CORE_FILES = (peft.CONFIG, peft.TENSORS, RECORD, PARAMETERS)
#: all files that an adapter folder may have, without those of a tokenizer
FILES = (*CORE_FILES, model_card.CARD_FILE)
#: patterns of the weight files of a complete model in the layout of transformers or diffusers
MODEL_FILE_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*")


def must_hold_no_model(folder: Path, base_name: str | None) -> None:
    """Raise OutputExistsError if ``folder`` holds a complete model, because ``from_pretrained``
    would load that model as the adapter's base. The base itself is permitted. ``base_name``: its
    path or name; None if unknown."""
    weight_files = [path.name for pattern in MODEL_FILE_PATTERNS for path in folder.glob(pattern)]
    if not weight_files or not (folder / "config.json").exists():
        return
    if base_name is None or Path(base_name).resolve() != folder.resolve():
        raise OutputExistsError(
            f"{folder}, which holds a whole model ({listing(weight_files, 3)})",
            "a folder without one: from_pretrained would take it for the adapter's base",
            "choose another folder, or remove the model from it",
        )


def adapter_file_names(path: Path) -> list[str]:
    """The names of the files in a folder that belong to the adapter. A tokenizer belongs to it if
    the adapter trains tokens. ``AdapterError``: one of the files is a link that leaves the folder,
    or no regular file, or adapter_config.json cannot be read."""
    names = (*FILES, *(TOKENIZER_FILES if trains_tokens(path) else ()))
    raise_all(AdapterError, f"{path} cannot be copied", location_problems(path, names))
    return [name for name in names if (path / name).is_file()]


def copy_files(source_folder: Path, target_folder: Path) -> None:
    """Copy the files of the adapter in ``source_folder`` into ``target_folder``, with its tokenizer
    if the adapter trains tokens. ``AdapterError``: as for ``adapter_file_names``."""
    for name in adapter_file_names(source_folder):
        shutil.copyfile(source_folder / name, target_folder / name)


def trains_tokens(path: Path) -> bool:
    """Whether the adapter in a folder trains rows of an embedding for some tokens, as its
    adapter_config.json says. False if the folder has no such file."""
    config_path = path / peft.CONFIG
    peft_config = read_json(config_path) if config_path.is_file() else {}
    is_tokens_type = peft_config.get("peft_type") == peft_tokens.TOKENS_TYPE
    return is_tokens_type or bool(peft_config.get(peft_tokens.INDICES_FIELD))


def tokenizer_folder(path: Path) -> Path | None:
    """``path`` itself if the adapter in this folder trains tokens and the folder has a tokenizer;
    else None. A tokenizer needs a tokenizer.json or tokenizer_config.json, and does not count if
    any of its files is a link out of the folder (``location_problems``)."""
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES[:2])
    return (
        path
        if has_tokenizer
        and trains_tokens(path)
        and not any(location_problems(path, TOKENIZER_FILES))
        else None
    )


def copy_tokenizer(source_folder: Path, target_folder: Path) -> None:
    """Copy the files of the tokenizer in ``source_folder`` into ``target_folder``."""
    for name in TOKENIZER_FILES:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, target_folder / name)


def common_tokenizer(adapter_folders: Mapping[str, Path]) -> Path | None:
    """The folder of the tokenizer that has the tokens of all these adapters; None if no adapter has
    a tokenizer.

    Args:
        adapter_folders: the folders of the adapters, by name.

    Raises:
        AdapterError: two tokenizers have different tokens for one id, or different ids for one
            token.
    """
    tokenizer_folders = {
        name: tokenizer_path
        for name, adapter_folder in adapter_folders.items()
        if (tokenizer_path := tokenizer_folder(adapter_folder)) is not None
    }
    if len(set(tokenizer_folders.values())) < 2:
        return next(iter(tokenizer_folders.values()), None)
    vocabularies = {
        name: tokenizer_at(str(tokenizer_path), str(tokenizer_path)).get_vocab()
        for name, tokenizer_path in tokenizer_folders.items()
    }
    largest_name = max(vocabularies, key=lambda name: len(vocabularies[name]))
    tokens_by_id = {id_: token for token, id_ in vocabularies[largest_name].items()}
    problems = []
    for name, vocabulary in vocabularies.items():
        differences = sorted(
            (id_, token)
            for token, id_ in vocabulary.items()
            if vocabularies[largest_name].get(token) != id_
        )
        if differences:
            different_tokens = listing((f"{token!r} at {id_}" for id_, token in differences), 3)
            token_at_id = tokens_by_id.get(differences[0][0])
            problems.append(
                sentence(
                    f"{name!r} has {different_tokens}, where {largest_name!r} has"
                    f" {'nothing' if token_at_id is None else repr(token_at_id)}",
                    "adapters that one tokenizer serves",
                    "use one of them alone, or train them again with one tokenizer of all these"
                    " tokens",
                )
            )
    raise_all(AdapterError, "The tokens of these adapters differ", problems)
    return tokenizer_folders[largest_name]


def content_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of all files of an adapter.

    Earlier releases did not hash the tokenizer's files (format 1). So that those hashes stay valid,
    a folder without these files is still hashed in format 1; for any other, the text "format 2" is
    hashed before the files."""
    names = adapter_file_names(path)
    tokenizer_files = [name for name in names if name not in FILES]
    return _hash_files(path, names, b"format 2\n" if tokenizer_files else b"")


def has_content(path: Path, expected_hash: str) -> bool:
    """Whether ``expected_hash`` is the ``content_hash`` of the adapter in a folder, or its hash
    without a tokenizer's files, by which earlier releases named the folders of a library."""
    try:
        return expected_hash in (
            content_hash(path),
            _hash_files(path, [name for name in FILES if (path / name).is_file()]),
        )
    except AdapterError:  # files that cannot be read count as changed
        return False


def _hash_files(path: Path, names: Sequence[str], prefix: bytes = b"") -> str:
    """SHA-256 of ``prefix``, followed by the name and the SHA-256 of each file in the folder
    ``path``."""
    folder_hash = hashlib.sha256(prefix)
    for name in names:
        with (path / name).open("rb") as stream:
            file_hash = hashlib.file_digest(stream, "sha256").hexdigest()
            folder_hash.update(f"{name} {file_hash}\n".encode())
    return folder_hash.hexdigest()
