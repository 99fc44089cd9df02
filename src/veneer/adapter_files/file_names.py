"""The names of the files in an adapter folder, how the files are copied and hashed, and the
tokenizer that a folder holds if its adapter trains added tokens.
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

#: the files that ``folder.read`` opens; to read them runs no code that they contain
CORE_FILES = (peft.CONFIG, peft.TENSORS, RECORD, PARAMETERS)
#: all files that an adapter may have, but for a tokenizer
FILES = (*CORE_FILES, model_card.CARD_FILE)
#: the files of a tokenizer, in the folder of an adapter that trains added tokens
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
#: patterns of the weight files of a complete model in the layout of transformers or diffusers
MODEL_FILE_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*")


def must_hold_no_model(folder: Path, base: str | None) -> None:
    """Raise OutputExistsError if ``folder`` holds a complete model other than ``base``, the path or
    name of the adapter's base: ``from_pretrained`` would load that model as the base."""
    weight_files = [path.name for pattern in MODEL_FILE_PATTERNS for path in folder.glob(pattern)]
    if not weight_files or not (folder / "config.json").exists():
        return
    if base is None or Path(base).resolve() != folder.resolve():
        raise OutputExistsError(
            f"{folder}, which holds a whole model ({listing(weight_files, 3)})",
            "a folder without one: from_pretrained would take it for the adapter's base",
            "choose another folder, or remove the model from it",
        )


def adapter_file_names(path: Path) -> list[str]:
    """The names of the files in a folder that belong to the adapter. A tokenizer belongs to it if
    the adapter trains tokens. ``AdapterError``: one of the files is a link that leaves the folder.
    """
    names = (*FILES, *(TOKENIZER_FILES if trains_tokens(path) else ()))
    raise_all(AdapterError, f"{path} cannot be copied", location_problems(path, names))
    return [name for name in names if (path / name).is_file()]


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of the adapter in ``source`` into ``folder``, with its tokenizer if there is
    one."""
    for name in adapter_file_names(source):
        shutil.copyfile(source / name, folder / name)


def trains_tokens(path: Path) -> bool:
    """Whether the adapter in a folder trains token rows, by its config."""
    config = path / peft.CONFIG
    fields = read_json(config) if config.is_file() else {}
    is_tokens_type = fields.get("peft_type") == peft_tokens.TOKENS_TYPE
    return is_tokens_type or bool(fields.get(peft_tokens.INDICES_FIELD))


def tokenizer_folder(path: Path) -> Path | None:
    """``path`` itself if the adapter in this folder trains tokens and the folder has a tokenizer;
    else None."""
    has_tokenizer = any(
        (path / name).is_file() and not (path / name).is_symlink() for name in TOKENIZER_FILES[:2]
    )
    return (
        path
        if has_tokenizer
        and trains_tokens(path)
        and not any(location_problems(path, TOKENIZER_FILES))
        else None
    )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer in ``source`` into ``folder``."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def common_tokenizer(folders: Mapping[str, Path]) -> Path | None:
    """The folder of the tokenizer that has the tokens of all these adapters; None if none has a
    tokenizer.

    Args:
        folders: the folders of the adapters, by name.

    Raises:
        AdapterError: two tokenizers have different tokens for one id, or different ids for one
            token.
    """
    tokenizers = {
        name: tokenizer
        for name, folder in folders.items()
        if (tokenizer := tokenizer_folder(folder)) is not None
    }
    if len(set(tokenizers.values())) < 2:
        return next(iter(tokenizers.values()), None)
    vocabularies = {
        name: tokenizer_at(str(tokenizer), str(tokenizer)).get_vocab()
        for name, tokenizer in tokenizers.items()
    }
    largest = max(vocabularies, key=lambda name: len(vocabularies[name]))
    tokens_by_id = {id_: token for token, id_ in vocabularies[largest].items()}
    problems = []
    for name, vocabulary in vocabularies.items():
        differences = sorted(
            (id_, token)
            for token, id_ in vocabulary.items()
            if vocabularies[largest].get(token) != id_
        )
        if differences:
            different_tokens = listing((f"{token!r} at {id_}" for id_, token in differences), 3)
            token_at_id = tokens_by_id.get(differences[0][0])
            problem = (
                f"{name!r} has {different_tokens}, where {largest!r} has"
                f" {'nothing' if token_at_id is None else repr(token_at_id)}"
            )
            do = "use one of them alone, or train them again with one tokenizer of all these tokens"
            problems.append(sentence(problem, "adapters that one tokenizer serves", do))
    raise_all(AdapterError, "The tokens of these adapters differ", problems)
    return tokenizers[largest]


def content_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of all files of an adapter.

    Earlier releases left the tokenizer out of the hash (format 1). The hash of a folder with a
    tokenizer therefore begins with a mark of format 2; without a tokenizer, format 1 is used."""
    names = adapter_file_names(path)
    tokenizer_files = [name for name in names if name not in FILES]
    return _hash_files(path, names, b"format 2\n" if tokenizer_files else b"")


def has_content(path: Path, key: str) -> bool:
    """Whether ``key`` is the ``content_hash`` of the adapter in a folder, or its hash in format 1,
    by which earlier releases named the folders of a library."""
    try:
        return key in (
            content_hash(path),
            _hash_files(path, [name for name in FILES if (path / name).is_file()]),
        )
    except AdapterError:  # files that cannot be read count as changed
        return False


def _hash_files(path: Path, names: Sequence[str], prefix: bytes = b"") -> str:
    """SHA-256 of ``prefix`` and then the name and the SHA-256 of each file."""
    folder_hash = hashlib.sha256(prefix)
    for name in names:
        with (path / name).open("rb") as stream:
            file_hash = hashlib.file_digest(stream, "sha256").hexdigest()
            folder_hash.update(f"{name} {file_hash}\n".encode())
    return folder_hash.hexdigest()
