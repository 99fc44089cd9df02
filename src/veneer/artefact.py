"""The artefact: a folder that PEFT, vLLM, SGLang and transformers load unchanged, and that proves what it is.

    adapter_config.json           PEFT's fields
    adapter_model.safetensors     the tensors; its header holds Veneer's record of the adapter
    veneer.json                   the same record, for people
    README.md                     the model card, for people too
    veneer.safetensors            the trained numbers of variants that PEFT does not have; the file above then holds
                                  the plain LoRA that they amount to

The record names the base and a fingerprint of each base weight that the adapter changes, hashes of the tensors and of
the config, the LoraConfig, library versions and the provenance that the caller gives. It hashes itself too. ``read``
believes nothing that it has not checked; ``load`` also compares the fingerprints with the model at hand.

A fingerprint is the SHA-256 of a weight rounded to bfloat16. So a base may be loaded in float32 or in bfloat16,
whichever of the two it was published in, and still be recognised; a base that was fine-tuned, or has one bit of a
bfloat16 weight flipped, is another base.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from veneer import card
from veneer.config import LoraConfig
from veneer.errors import AdapterError, ConfigError, listing, raise_all, sentence
from veneer.files import new_folder
from veneer.formats import peft
from veneer.hashing import digest, hash_json
from veneer.layers import LAYERS
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS

RECORD = "veneer.json"
NUMBERS = "veneer.safetensors"
#: the files that an adapter may consist of, none of which runs code when it is read
FILES = (peft.CONFIG, peft.TENSORS, RECORD, NUMBERS, card.NAME)
FORMAT = 1


@dataclass(frozen=True)
class Artefact:
    """An adapter folder that was read and verified, without a model.

    ``record`` is None for a folder that another library wrote. ``low`` and ``full`` are the tensors of the PEFT file
    by the path there, ``numbers`` those of ``veneer.safetensors`` by the path of the weight.
    """

    path: Path
    config: LoraConfig
    peft_config: Mapping[str, Any]
    record: Mapping[str, Any] | None
    low: Mapping[str, peft.PeftLayer]
    full: Mapping[str, Mapping[str, Tensor]]
    numbers: Mapping[str, Mapping[str, Tensor]]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The record, or an empty mapping."""
        return self.record or {}

    @cached_property
    def layers(self) -> dict[str, LowRank]:
        """Each change as a value, by the path of its module (of its parameter, where it changes one by itself).

        Raises:
            AdapterError: some changes are more than a product, such as DoRA's, which also rescales the weight.
        """
        more = [entry.at for entry in self.low.values() if entry.extras]
        if more:
            found = (
                f"variant {self.config.variant!r}, whose change is no low-rank product alone (at {listing(more, 3)})"
            )
            do = "merge it to have the changed weights, or take `products` to leave the rest out"
            raise AdapterError(sentence(found, "changes of the form scale · B @ A", do))
        return self.products

    @cached_property
    def products(self) -> dict[str, LowRank]:
        """The low-rank part of each change, as ``layers``; of DoRA's, without its gain."""
        return {entry.at: entry.low for entry in self.low.values()}

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds: a variant's own where it has a file for them, else those of the PEFT
        file."""
        own = {part for at in self.numbers for part in (at, at.rpartition(".")[0])}
        held = [tensor for numbers in self.numbers.values() for tensor in numbers.values()]
        held += [tensor for tensors in self.full.values() for tensor in tensors.values()]
        for entry in self.low.values():
            held += () if entry.at in own else (entry.A, entry.B, *entry.extras.values())
        return sum(tensor.numel() for tensor in held)


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None,
    changes: Mapping[str, Any] | None,
    config: LoraConfig,
    provenance: Mapping[str, Any],
    overwrite: bool,
    numbers: Mapping[str, Tensor],
) -> None:
    """Write the files as one folder, in one step. Notes in the card of a folder that it replaces are kept.

    Args:
        base: "name", "architecture", and "weights": the fingerprint of each changed weight by path. None where nobody
            knows the base: the folder then holds PEFT's two files alone, without a record.
        changes: what each change is (rank, alpha, rows), by the path of its weight.
        numbers: what goes into ``veneer.safetensors``; nothing if empty.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False.
        AdapterError: a tensor is not finite.
    """
    _all_finite({**tensors, **numbers}, "train it again")
    record = None
    if base is not None:
        record = {"format": FORMAT, "base": dict(base), "changes": dict(changes or {}), "config": config.to_dict()}
        record = _sealed(record, tensors, peft_config, provenance, numbers)
    elif numbers:
        raise AdapterError(sentence("numbers of a variant without a base", "both", "name the base"))
    text = card.renewed(card.card(peft_config, record), _old_card(path))
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / card.NAME).write_text(text, encoding="utf-8", errors="replace")
        (folder / peft.CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n")
        if record is not None:
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if numbers:
            save_file(dict(numbers), folder / NUMBERS, metadata={"format": "pt"})
        header = {"format": "pt"} if record is None else {"format": "pt", "veneer": json.dumps(record)}
        save_file(dict(tensors), folder / peft.TENSORS, metadata=header)


def _sealed(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    numbers: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A record with the hashes of everything, its own included."""
    record |= {
        "hashes": {"tensors": _hash_tensors(tensors), peft.CONFIG: hash_json(peft_config)},
        "versions": dict(_installed("veneer", "torch", "transformers")),
        "provenance": dict(provenance),
    }
    if numbers:
        record["hashes"][NUMBERS] = _hash_tensors(numbers)
    try:
        record = json.loads(json.dumps(record))  # as it will be read: JSON turns the keys of a mapping into strings
    except TypeError as error:
        raise AdapterError(
            sentence(f"a provenance that is not JSON ({error})", "plain values", "convert it")
        ) from error
    record["hashes"]["record"] = _hash_record(record)
    return record


def _old_card(path: Path) -> str | None:
    file = path / card.NAME
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def copy_files(source: Path, folder: Path) -> None:
    """Copy an adapter's own files into ``folder``, and nothing else that lies beside them."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def content_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of an adapter's own files."""
    whole = hashlib.sha256()
    for name in FILES:
        if (path / name).is_file():
            with (path / name).open("rb") as stream:
                whole.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def read(path: str | Path) -> Artefact:
    """Read and verify an adapter folder, without a model.

    Raises:
        AdapterError: something is missing, cut short, altered, not finite or not understood.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(sentence(f"no folder {path}", "an adapter folder", "check the path"))
    missing = [file for file in (peft.CONFIG, peft.TENSORS) if not (path / file).is_file()]
    if missing:
        found = f"no {' and no '.join(missing)} in {path}"
        raise AdapterError(sentence(found, f"{peft.CONFIG} and {peft.TENSORS}", "name the folder that holds them"))
    peft_config = _read_json(path / peft.CONFIG)
    tensors, header = _read_tensors(path / peft.TENSORS)
    record = _verify(path, peft_config, tensors, header)
    peft.check_config(peft_config, ours=record is not None)
    _all_finite(tensors, "get another copy")
    extras = {key for variant in VARIANTS for key in variant.peft_keys.values()}
    low, full = peft.split(tensors, peft_config, {kind.file_keys for kind in LAYERS}, extras, record is not None)
    numbers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (_read_numbers(path, record) if record else {}).items():
        weight, _, name = key.rpartition(".")
        numbers.setdefault(weight, {})[name] = tensor
    try:
        config = LoraConfig.from_dict(record["config"]) if record else _foreign_config(peft_config)
        VARIANTS[config.variant]
    except ConfigError as error:
        raise AdapterError(f"The config of {path} cannot be used. {error}") from error
    return Artefact(path, config, peft_config, record, low, full, numbers)


def _read_numbers(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``veneer.safetensors``, which must be there and unaltered if the record speaks of it."""
    expected = record["hashes"].get(NUMBERS)
    if expected is None:
        if (path / NUMBERS).exists():
            found = f"{path / NUMBERS}, of which the record says nothing"
            raise AdapterError(sentence(found, "files that belong together", "remove it, or get another copy"))
        return {}
    if not (path / NUMBERS).is_file():
        found = f"no {NUMBERS} in {path}, which holds the numbers of variant {record['config']['variant']!r}"
        do = f"copy the whole folder, or remove Veneer's record to use {peft.TENSORS} as the plain LoRA that it is"
        raise AdapterError(sentence(found, "the folder as it was saved", do))
    numbers, _ = _read_tensors(path / NUMBERS)
    if _hash_tensors(numbers) != expected:
        found = f"{path / NUMBERS}, which changed after it was written"
        raise AdapterError(sentence(found, "the file as it was saved", "get another copy of the folder"))
    _all_finite(numbers, "get another copy")
    return numbers


def _foreign_config(config: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig that a PEFT config means."""
    said = {name for name in ("use_rslora", "use_dora") if config.get(name)}
    # Several variants are plain LoRA to PEFT; a file that says nothing more is that.
    matching = (v for v in VARIANTS if {flag for flag, on in (v.peft or {}).items() if on} == said)
    variant = next(matching, None) if said else VARIANTS["lora"]
    if variant is None:
        raise AdapterError(
            sentence(f"{listing(said)} in {peft.CONFIG}", "a variant that Veneer has", "use PEFT for it")
        )
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        targets = targets if targets == "all-linear" else f"re:{targets}"
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets if isinstance(targets, str) else [*targets, *(config.get("target_parameters") or ())],
        train_also=config.get("modules_to_save") or (),
        variant=variant.name,
        bias={"none": "none", "lora_only": "targets", "all": "all"}.get(config.get("bias") or "none", "none"),
    )


def _verify(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Mapping[str, str]):
    """The record, if there is one and everything it says is so; None for another library's folder."""
    beside = path / RECORD
    if "veneer" not in header:
        if beside.exists():
            found = f"{RECORD} beside a {peft.TENSORS} without Veneer's record"
            raise AdapterError(
                sentence(found, "files that belong together", f"remove {RECORD} if another library rewrote the tensors")
            )
        return None
    try:
        record = json.loads(header["veneer"])
        hashes = record["hashes"]
        checks = {
            "the record in its header": (_hash_record(record), hashes["record"]),
            "its tensors": (_hash_tensors(tensors), hashes["tensors"]),
            peft.CONFIG: (hash_json(config), hashes[peft.CONFIG]),
        }
        format_ = record["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterError(
            sentence(f"a damaged record in {path / peft.TENSORS}", "Veneer's record", "get it again")
        ) from error
    if beside.exists() and _read_json(beside) != record:
        checks[RECORD] = ("", "the record in the header")
    altered = [what for what, (actual, expected) in checks.items() if actual != expected]
    if altered:
        found = f"{path}, of which {' and '.join(altered)} changed after it was written"
        raise AdapterError(sentence(found, "the files as they were saved", "get another copy of the folder"))
    if format_ != FORMAT:
        raise AdapterError(sentence(f"format {format_} in {path}", f"{FORMAT}", "install a newer Veneer"))
    raise_all(AdapterError, f"The record of {path} cannot be used", list(_malformed(record)))
    return record


def _malformed(record: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a record, as far as it can be told without a model."""
    base, changes = record.get("base"), record.get("changes")
    weights = base.get("weights") if isinstance(base, dict) else None
    if not isinstance(weights, dict) or not isinstance(changes, dict) or not isinstance(record.get("config"), dict):
        yield sentence("no base, changes or config in it", "all three", "save it again with this Veneer")
        return
    if weights.keys() != changes.keys():
        odd = listing(sorted(weights.keys() ^ changes.keys()), 3)
        yield sentence(f"changes and fingerprints of other weights ({odd})", "the same", "get another copy")
    for at, change in changes.items():
        said = change if isinstance(change, dict) else {}
        rank, alpha, rows = said.get("rank"), said.get("alpha"), said.get("rows", [[0, 1]])
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            expected = "a rank of at least 1 and a number"
            yield sentence(f"rank {rank!r} and alpha {alpha!r} for {at!r}", expected, "get another copy")
        pairs = isinstance(rows, list) and rows and all(isinstance(part, list) and len(part) == 2 for part in rows)
        if not pairs or any(type(end) is not int for part in rows for end in part):
            yield sentence(f"rows {rows!r} for {at!r}", "(start, stop) pairs", "get another copy")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(
            sentence(f"{file}, which is not JSON ({error})", "a JSON object", "get the file again")
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(sentence(f"{file}, a JSON {type(content).__name__}", "a JSON object", "get the file again"))
    return content


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()  # a list: safe_open is no mapping
            return {key: opened.get_tensor(key) for key in names}, opened.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError) as error:
        found = f"{file} cannot be read ({error})"
        raise AdapterError(
            sentence(found, "a whole safetensors file", "get the file again; it may be cut short")
        ) from error


def _all_finite(tensors: Mapping[str, Tensor], do: str) -> None:
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(sentence(f"numbers that are not finite in {listing(broken)}", "finite ones", do))


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for key in sorted(tensors):
        whole.update(f"{key} {tuple(tensors[key].shape)} {digest(tensors[key])}\n".encode())
    return whole.hexdigest()


def _hash_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record["hashes"].items() if key != "record"}
    return hash_json({**record, "hashes": rest})


def _installed(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
