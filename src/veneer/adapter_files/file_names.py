"""Which files belong to an adapter folder, how they are copied and hashed, and the tokenizer beside
an adapter that trains added tokens.
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

#: the files that ``read`` opens, and all files that an adapter may have; reading them runs no code
CORE = (peft.CONFIG, peft.TENSORS, RECORD, PARAMETERS)
FILES = (*CORE, model_card.NAME)
#: the files of a tokenizer beside an adapter that trains added tokens
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
#: the weights of a complete model in the layout of transformers or diffusers
MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*")


def must_hold_no_model(folder: Path, base: str | None) -> None:
    """Raise OutputExistsError if ``folder`` holds a complete model that is not the base:
    ``from_pretrained`` would take its weights for the base of the adapter."""
    weights = [path.name for pattern in MODEL_FILES for path in folder.glob(pattern)]
    if not weights or not (folder / "config.json").exists():
        return
    if base is None or Path(base).resolve() != folder.resolve():
        problem = f"{folder}, which holds a whole model ({listing(weights, 3)})"
        expected = "a folder without one: from_pretrained would take it for the adapter's base"
        raise OutputExistsError(
            problem, expected, "choose another folder, or remove the model from it"
        )


def adapter_file_names(path: Path) -> list[str]:
    """The names of the files in a folder that belong to the adapter, including the tokenizer if it
    trains tokens. ``AdapterError``: one of them is a link out of the folder."""
    names = (*FILES, *(TOKENIZER if trains_tokens(path) else ()))
    raise_all(AdapterError, f"{path} cannot be copied", location_problems(path, names))
    return [name for name in names if (path / name).is_file()]


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of an adapter into ``folder``, with the tokenizer if it trains tokens."""
    for name in adapter_file_names(source):
        shutil.copyfile(source / name, folder / name)


def trains_tokens(path: Path) -> bool:
    """Whether the config in an adapter folder trains token rows."""
    config = path / peft.CONFIG
    fields = read_json(config) if config.is_file() else {}
    return bool(fields.get(peft_tokens.INDICES_FIELD)) or fields.get("peft_type") == peft_tokens.TOKENS_TYPE


def tokenizer_folder(path: Path) -> Path | None:
    """``path`` itself if the adapter there trains tokens and has a tokenizer beside it, else
    None."""
    has_tokenizer = any(
        (path / name).is_file() and not (path / name).is_symlink() for name in TOKENIZER[:2]
    )
    return (
        path
        if has_tokenizer and trains_tokens(path) and not any(location_problems(path, TOKENIZER))
        else None
    )


def common_tokenizer(folders: Mapping[str, Path]) -> Path | None:
    """The folder whose tokenizer has the tokens of all these adapters; None if no folder has a
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
    by_id, problems = {id_: token for token, id_ in vocabularies[largest].items()}, []
    for name, vocabulary in vocabularies.items():
        differences = sorted(
            (id_, token)
            for token, id_ in vocabulary.items()
            if vocabularies[largest].get(token) != id_
        )
        if differences:
            odd_tokens, token_at_id = (
                listing((f"{token!r} at {id_}" for id_, token in differences), 3),
                by_id.get(differences[0][0]),
            )
            problem = (
                f"{name!r} has {odd_tokens}, where {largest!r} has"
                f" {'nothing' if token_at_id is None else repr(token_at_id)}"
            )
            do = "use one of them alone, or train them again with one tokenizer of all these tokens"
            problems.append(sentence(problem, "adapters that one tokenizer serves", do))
    raise_all(AdapterError, "The tokens of these adapters differ", problems)
    return tokenizers[largest]


def content_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of all files of an adapter. A hash that covers a tokenizer
    starts with a mark of format 2; without a tokenizer it equals that of format 1, which left
    tokenizers out."""
    names = adapter_file_names(path)
    tokenizer = [name for name in names if name not in FILES]
    return _hash_files(path, names, b"format 2\n" if tokenizer else b"")


def has_content(path: Path, key: str) -> bool:
    """Whether ``key`` is the hash of the adapter in a folder, by ``content_hash`` or in format 1,
    which named the folders in libraries of earlier releases."""
    try:
        return key in (
            content_hash(path),
            _hash_files(path, [name for name in FILES if (path / name).is_file()]),
        )
    except AdapterError:  # unreadable files count as altered
        return False


def _hash_files(path: Path, names: Sequence[str], start: bytes = b"") -> str:
    total = hashlib.sha256(start)
    for name in names:
        with (path / name).open("rb") as stream:
            total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
