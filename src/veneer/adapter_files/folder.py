"""The adapter folder: PEFT, vLLM, SGLang and transformers load it unchanged, and it proves what it
is.

    adapter_config.json           PEFT's fields
    adapter_model.safetensors     the tensors; its header holds Veneer's record of the adapter
    veneer.json                   the same record, for people
    README.md                     the model card, for people too
    veneer.safetensors            the adapter parameters of variants that PEFT does not have; the file above then holds
                                  the plain LoRA that they amount to

``write`` makes all of it in one step. ``read`` checks it without a model and believes nothing that
it has not checked (``fileio/untrusted.py``: sizes, JSON, links; ``record.py``: hashes; here: types
and magnitudes); ``load`` also compares the fingerprints with the model at hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.adapter_files import model_card
from veneer.adapter_files.record import (
    PARAMETERS,
    RECORD,
    altered,
    malformed,
    must_belong,
    record_in,
    sealed,
)
from veneer.adapter_files.tuner_folder import TunerFolder, Unsized, tuner_folder
from veneer.config import LoraConfig
from veneer.errors import AdapterError, ConfigError, OutputExistsError, listing, raise_all, sentence
from veneer.fileio.atomic import new_folder
from veneer.fileio.temporary import recover
from veneer.fileio.tensors import read_tensors
from veneer.fileio.throttle import throttled
from veneer.fileio.untrusted import json_object, misplaced, pickled, read_header, read_json
from veneer.formats import peft, peft_targets, peft_tokens
from veneer.formats.peft_tuners import Weights, check_config, check_tensors, tuner_of
from veneer.layers import LAYERS
from veneer.lowrank import LowRank
from veneer.models.load import tokenizer_at
from veneer.variants import VARIANTS

#: the files that are read, and all that an adapter may consist of, none of which runs code when it
#: is read
CORE = (peft.CONFIG, peft.TENSORS, RECORD, PARAMETERS)
FILES = (*CORE, model_card.NAME)
#: a tokenizer that stands beside an adapter which trains tokens that were added
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
#: what a folder that holds a whole model has, of transformers or of a library like it
WHOLE = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*")
#: no number of an adapter, and no norm of a change, is larger: what is would overflow in the first
#: product or the next
LARGEST = 1e9
#: what changes are made of, and what modules that are trained in full may hold besides
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder that was read and verified, without a model.

    ``record`` is None for a folder that another library wrote. ``low`` and ``full`` are the tensors
    of the PEFT file by the path there, ``adapter_parameters`` those of ``veneer.safetensors`` by
    the path of the weight, ``tokens`` rows of embeddings that are trained in full, by the path of
    the module. ``tuner``: of a folder of another tuner of PEFT than LoRA, which is here as the
    folder that Veneer would have written of it. ``left_out``: the modules with tensors in the file
    that the config of another library leaves out (``formats/peft_targets.py``).
    """

    path: Path
    config: LoraConfig
    peft_config: Mapping[str, Any]
    record: Mapping[str, Any] | None
    low: Mapping[str, peft.PeftLayer]
    full: Mapping[str, Mapping[str, Tensor]]
    adapter_parameters: Mapping[str, Mapping[str, Tensor]]
    tuner: TunerFolder | None = None
    tokens: Mapping[str, peft_tokens.TokenRows] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def no_tokens(self, what: str) -> None:
        """AdapterError for trained tokens, which ``what`` has no place for."""
        if self.tokens:
            rows = listing(f"{len(one.ids)} of {at!r}" for at, one in self.tokens.items())
            problem = f"{self.path} with trained tokens ({rows}), for which {what} has no place"
            raise AdapterError(
                problem,
                "changes of whole weights",
                "merge it (`veneer merge`), and take the merged model",
            )

    def token_ids(self, weight: str) -> tuple[int, ...]:
        """The tokens that are trained of a weight, by a path of its own: of a tied one, by that of
        the file."""
        entry = self.tokens.get(weight.rpartition(".")[0])
        return () if entry is None else entry.ids

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The record, or an empty mapping."""
        return self.record or {}

    @cached_property
    def layers(self) -> dict[str, LowRank]:
        """Each change as a value, by the path of its module (of its parameter, where it changes one
        by itself).

        Raises:
            AdapterError: some changes are more than a product, such as DoRA's, which also rescales
                the weight.
        """
        more = [entry.at for entry in self.low.values() if entry.extras]
        if more:
            problem = f"variant {self.config.variant!r}, whose change is no low-rank product alone"
            do = "merge it to have the changed weights, or take `products` to leave the rest out"
            raise AdapterError(
                f"{problem} (at {listing(more, 3)})", "changes of the form scale · B @ A", do
            )
        return self.products

    @cached_property
    def products(self) -> dict[str, LowRank]:
        """The low-rank part of each change, as ``layers``; of DoRA's, without its gain."""
        return {entry.at: entry.low for entry in self.low.values()}

    @property
    def parameters(self) -> int:
        """How many parameters the adapter holds: a variant's own if it has any, else those of the
        PEFT file."""
        own = {part for at in self.adapter_parameters for part in (at, at.rpartition(".")[0])}
        if self.tuner is not None:
            return self.tuner.numbers + sum(
                tensor.numel() for own in self.full.values() for tensor in own.values()
            )
        tensors = [tensor for own in self.adapter_parameters.values() for tensor in own.values()]
        tensors += [tensor for named in self.full.values() for tensor in named.values()]
        tensors += [one.rows for one in self.tokens.values()]
        for entry in self.low.values():
            tensors += () if entry.at in own else (entry.A, entry.B, *entry.extras.values())
        return sum(tensor.numel() for tensor in tensors)


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
    parameters: Mapping[str, Tensor],
) -> None:
    """Write the files as one folder, in one step. Notes in the card of a folder that it replaces
    are kept.

    Args:
        base: "name", "architecture", "weights": the fingerprint of each changed weight by path,
            and, where they are known, "rest": those of the other tensors by name, and "fresh":
            names. None where nobody knows the base: the folder then holds PEFT's two files alone,
            without a record.
        changes: what each change is (rank, alpha, rows), by the path of its weight.
        parameters: what goes into ``veneer.safetensors``; nothing if empty.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False; it is a file, or holds
            another whole model.
        AdapterError: what ``read`` would refuse: a tensor that is not finite, a change that is
            absurdly large, names that no file may hold, a provenance that is not JSON or too long.
    """
    raise_all(
        AdapterError,
        f"{path} was not written",
        list(odd_numbers({**tensors, **parameters}, "train it again")),
    )
    record = None
    if base is not None:
        record = {"base": dict(base), "changes": dict(changes or {}), "config": config.to_dict()}
        record = sealed(record, tensors, peft_config, provenance, parameters)
    elif parameters:
        raise AdapterError("numbers of a variant without a base", "both", "name the base")
    texts = {peft.CONFIG: json.dumps(peft_config, indent=2) + "\n"}
    if record is not None:
        texts[RECORD] = json.dumps(record, indent=2) + "\n"
    with _could_be_read(path):
        peft.check_config(peft_config, record is not None, with_base=record is not None)
        raise_all(
            AdapterError, "Its record", list(malformed(record, path)) if record is not None else []
        )
        assemble(path, peft_config, record, tensors, parameters)
        for file, text in texts.items():
            json_object(text, file, "give less provenance")
    must_hold_no_model(path, peft_config.get("base_model_name_or_path"))
    shapes, old = (
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        path / model_card.NAME,
    )
    notes = old.read_text(encoding="utf-8", errors="replace") if old.is_file() else None
    texts[model_card.NAME] = model_card.renewed(model_card.card(peft_config, record, shapes), notes)
    with new_folder(path, overwrite=overwrite, replaces=FILES) as folder:
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8", errors="replace")
        if parameters:
            save_file(dict(parameters), folder / PARAMETERS, metadata={"format": "pt"})
        header = (
            {"format": "pt"} if record is None else {"format": "pt", "veneer": json.dumps(record)}
        )
        save_file(dict(tensors), folder / peft.TENSORS, metadata=header)
        with _could_be_read(path):
            for file in (peft.TENSORS, *((PARAMETERS,) if parameters else ())):
                read_header(folder / file)


def must_hold_no_model(folder: Path, base: str | None) -> None:
    """``from_pretrained`` takes weights in a folder for the base of the adapter in it, so they must
    be the base's."""
    weights = [path.name for pattern in WHOLE for path in folder.glob(pattern)]
    if not weights or not (folder / "config.json").exists():
        return
    if base is None or Path(base).resolve() != folder.resolve():
        problem = f"{folder}, which holds a whole model ({listing(weights, 3)})"
        expected = "a folder without one: from_pretrained would take it for the adapter's base"
        raise OutputExistsError(
            problem, expected, "choose another folder, or remove the model from it"
        )


def own_files(path: Path) -> list[str]:
    """The names of what belongs to the adapter in a folder: its files, and the tokenizer beside
    trained tokens. ``AdapterError``: one of them is a link out of the folder."""
    names = (*FILES, *(TOKENIZER if read_tokens(path) else ()))
    raise_all(AdapterError, f"{path} cannot be copied", misplaced(path, names))
    return [name for name in names if (path / name).is_file()]


def copy_files(source: Path, folder: Path) -> None:
    """Copy an adapter's own files into ``folder``, with the tokenizer beside trained tokens, and
    nothing else."""
    for name in own_files(source):
        shutil.copyfile(source / name, folder / name)


def read_tokens(path: Path) -> bool:
    """Whether the folder of an adapter says that it trains tokens."""
    config = path / peft.CONFIG
    said = read_json(config) if config.is_file() else {}
    return bool(said.get(peft_tokens.FIELD)) or said.get("peft_type") == peft_tokens.TYPE


def own_tokenizer(path: Path) -> Path | None:
    """The folder itself where it trains tokens and holds a tokenizer, or None."""
    there = any(
        (path / name).is_file() and not (path / name).is_symlink() for name in TOKENIZER[:2]
    )
    return path if there and read_tokens(path) and not any(misplaced(path, TOKENIZER)) else None


def common_tokenizer(folders: Mapping[str, Path]) -> Path | None:
    """The folder, among those of adapters by name, whose tokenizer knows all tokens of the
    adapters' own; None: none of them has one. ``AdapterError``: they mean different tokens by one
    id, or one token by several."""
    own = {
        name: place
        for name, folder in folders.items()
        if (place := own_tokenizer(folder)) is not None
    }
    if len(set(own.values())) < 2:
        return next(iter(own.values()), None)
    known = {name: tokenizer_at(str(place), str(place)).get_vocab() for name, place in own.items()}
    largest = max(known, key=lambda name: len(known[name]))
    by_id, problems = {id_: token for token, id_ in known[largest].items()}, []
    for name, vocabulary in known.items():
        odd = sorted(
            (id_, token) for token, id_ in vocabulary.items() if known[largest].get(token) != id_
        )
        if odd:
            said, there = (
                listing((f"{token!r} at {id_}" for id_, token in odd), 3),
                by_id.get(odd[0][0]),
            )
            problem = (
                f"{name!r} has {said}, where {largest!r} has"
                f" {'nothing' if there is None else repr(there)}"
            )
            do = "use one of them alone, or train them again with one tokenizer of all these tokens"
            problems.append(sentence(problem, "adapters that one tokenizer serves", do))
    raise_all(AdapterError, "The tokens of these adapters differ", problems)
    return own[largest]


def content_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of all files of an adapter. A hash that covers a tokenizer is
    of format 2 and says so; all others are as they were in format 1, which left tokenizers out."""
    names = own_files(path)
    tokenizer = [name for name in names if name not in FILES]
    return _hash_files(path, names, b"format 2\n" if tokenizer else b"")


def has_content(path: Path, key: str) -> bool:
    """Whether a hash is that of the adapter in a folder: by ``content_hash``, or as format 1 had
    it, in which folders were named that are there already."""
    try:
        return key in (
            content_hash(path),
            _hash_files(path, [name for name in FILES if (path / name).is_file()]),
        )
    except AdapterError:  # what cannot be read has been altered
        return False


def _hash_files(path: Path, names: Sequence[str], start: bytes = b"") -> str:
    whole = hashlib.sha256(start)
    for name in names:
        with (path / name).open("rb") as stream:
            whole.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@contextmanager
def _could_be_read(path: Path) -> Iterator[None]:
    """What ``read`` would refuse is not written: an adapter that nobody can load is a lost
    training."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(
            f"{path} was not written, as it could not be read again. {error}"
        ) from error


def read(path: str | Path, weights: Weights | None = None) -> AdapterFiles:
    """Read and verify an adapter folder, without a model.

    Args:
        weights: the shapes of the base's weights, where there is a base, without which a few
            folders of PEFT do not say what they change. The changes of its VeRA are known by their
            paths alone then, and an error for whoever asks for one.

    Raises:
        AdapterError: something is missing, cut short, altered, not finite or not understood; a
            pickle; a link out of the folder.

    Warns:
        TensorsLeftOut: tensors of modules that the config of another library leaves out, which PEFT
            passes over.
    """
    path = Path(path)
    raise_all(AdapterError, f"{path} cannot be read", missing(path))
    peft_config = read_json(path / peft.CONFIG)
    tensors, header = read_tensors(path / peft.TENSORS)
    record = record_in(path, header)
    parameters: dict[str, Tensor] = {}
    if record is not None:
        raise_all(
            AdapterError, f"The record of {path} cannot be used", list(malformed(record, path))
        )
        parameters = read_parameters(path, record)
        must_belong(altered(path, record, peft_config, tensors, parameters), path)
    lora, every_tensor = peft_tokens.as_lora(peft_config, tensors)
    check_config(lora, record is not None, weights is not None)
    odd = list(odd_numbers({**every_tensor, **parameters}, "get another copy"))
    raise_all(AdapterError, f"{path} cannot be used", odd)
    if record is not None:
        return assemble(path, lora, record, every_tensor, parameters, weights)
    lora, tensors, left_out = applied(peft_config, tensors)
    if left_out:
        warnings.warn(
            f"{path} holds {peft_targets.describe(left_out)}.",
            peft_targets.TensorsLeftOut,
            stacklevel=2,
        )
    return replace(assemble(path, lora, record, tensors, parameters, weights), left_out=left_out)


def applied(
    peft_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], tuple[str, ...]]:
    """(the config as LoRA's, the tensors that it means, the modules that it leaves out) of another
    library's folder, of which ``check_config`` found the config right. ``AdapterError``: tensors of
    another tuner than the config's."""
    check_tensors(peft_config, tensors)
    pairs = (suffix for kind in LAYERS for suffix in kind.file_keys)
    extras = (key for variant in VARIANTS for key in variant.peft_keys.values())
    suffixes = dict.fromkeys((*pairs, *extras, peft.LORA_BIAS))
    tensors, left_out = peft_targets.applied_tensors(peft_config, tensors, suffixes)
    return *peft_tokens.as_lora(peft_config, tensors), left_out


def assemble(
    path: Path,
    peft_config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    weights: Weights | None = None,
) -> AdapterFiles:
    """An adapter from files that were checked one by one: do they make up one?"""
    tuner = tuner_of(peft_config) if record is None else None
    held = None if tuner is None else tuner_folder(tuner, peft_config, tensors, weights)
    if held is not None:
        peft_config, tensors, parameters = held.config, held.tensors, held.parameters
    extras = {key for variant in VARIANTS for key in variant.peft_keys.values()}
    extras |= {peft.LORA_BIAS} if peft_config.get("lora_bias") is True else set()
    tokens, tensors = peft_tokens.split(tensors, peft_config)
    low, full = peft.split(
        tensors, peft_config, {kind.file_keys for kind in LAYERS}, extras, record is not None
    )
    raise_all(AdapterError, f"{path} cannot be used", [*odd_changes(low), *_odd_statistics(full)])
    by_weight: dict[str, dict[str, Tensor]] = {}
    for key, tensor in parameters.items():
        weight, _, name = key.rpartition(".")
        by_weight.setdefault(weight, {})[name] = tensor
    try:
        config = LoraConfig.from_dict(record["config"]) if record else _foreign_config(peft_config)
        VARIANTS[config.variant]
        config = config if held is None else held.config_of(config)
    except ConfigError as error:
        raise AdapterError(f"The config of {path} cannot be used. {error}") from error
    if held is not None and held.needs_base_shapes:
        return AdapterFiles(
            path, config, peft_config, record, Unsized(held, path), full, by_weight, held
        )
    return AdapterFiles(path, config, peft_config, record, low, full, by_weight, held, tokens)


def _how_to_fetch(path: str) -> str:
    """What to do about a path that is no folder: it may be a remote place, or an adapter's id on
    the hub."""
    if url := re.fullmatch(r"https?:/huggingface\.co/([^/]+/[^/]+).*", path):
        path = url[1]
    if remote := re.fullmatch(r"(\w+):/(\w.*)", path):  # a Path has one of two slashes
        place = f"{remote[1]}://{remote[2]}"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        place = f"hf://{path}"
    else:
        return "check the path"
    how = f"fetch it with veneer.store.remote.pull({place!r}), which returns a folder"
    return (
        how if remote or url else f"check the path; if that is an id on the Hugging Face hub, {how}"
    )


def missing(path: Path) -> list[str]:
    """What keeps a folder from being read at all: files that are not there, are no files, or are
    pickles. A writer that was killed while it replaced them is finished first."""
    if not (path / peft.CONFIG).is_file():
        recover(path.resolve())
    if not path.is_dir():
        return [sentence(f"no folder {path}", "an adapter folder", _how_to_fetch(str(path)))]
    problems = [*pickled(path), *misplaced(path, FILES)]
    lacking = [file for file in (peft.CONFIG, peft.TENSORS) if not (path / file).is_file()]
    if lacking and not problems:
        problem = f"no {' and no '.join(lacking)} in {path}"
        problems.append(
            sentence(
                problem, f"{peft.CONFIG} and {peft.TENSORS}", "name the folder that holds them"
            )
        )
    return problems


def read_parameters(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``veneer.safetensors``, which must be there if the record speaks of it, and
    else must not."""
    if PARAMETERS not in record["hashes"]:
        if (path / PARAMETERS).exists():
            problem = f"{path / PARAMETERS}, of which the record says nothing"
            raise AdapterError(
                problem, "files that belong together", "remove it, or get another copy"
            )
        return {}
    if not (path / PARAMETERS).is_file():
        problem = (
            f"no {PARAMETERS} in {path}, which holds the numbers of variant"
            f" {record['config'].get('variant')!r}"
        )
        do = (
            f"copy the whole folder, or remove Veneer's record to use {peft.TENSORS} as the plain"
            " LoRA that it is"
        )
        raise AdapterError(problem, "the folder as it was saved", do)
    return read_tensors(path / PARAMETERS)[0]


def _foreign_config(config: Mapping[str, Any]) -> LoraConfig:
    said = {name for name in ("use_rslora", "use_dora") if config.get(name)}
    # Several variants are plain LoRA to PEFT; a file that says nothing more is that.
    matching = (v for v in VARIANTS if {flag for flag, on in (v.peft or {}).items() if on} == said)
    variant = next(matching, None) if said else VARIANTS["lora"]
    if variant is None:
        raise AdapterError(
            f"{listing(said)} in {peft.CONFIG}", "a variant that Veneer has", "use PEFT for it"
        )
    targets = config.get("target_modules") or ()
    if not isinstance(targets, str):
        targets = [*targets, *(config.get("target_parameters") or ())]
    elif targets != "all-linear":
        targets = f"re:{targets}"
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets,
        train_also=config.get("modules_to_save") or (),
        variant=variant.name,
        trainable_tokens=config.get(peft_tokens.FIELD) or (),
        bias={"none": "none", "lora_only": "targets", "all": "all"}.get(
            config.get("bias") or "none", "none"
        ),
    )


def odd_numbers(tensors: Mapping[str, Tensor], do: str) -> Iterator[str]:
    """What is wrong with numbers by themselves: their type, what is not finite, what is absurdly
    large."""
    types = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if tensor.dtype not in (*FLOATS, *WHOLE_NUMBERS)
    }
    if types:
        problem = (
            f"numbers stored as {listing(sorted(set(map(str, types.values()))))} in"
            f" {listing(types)}"
        )
        yield sentence(problem, "float64, float32, bfloat16 or float16", "convert them to bfloat16")
    floats = {
        key: tensor for key, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel()
    }
    # one pass over the numbers: the largest is not finite if any is not
    largest = {
        key: max(map(abs, map(float, tensor.aminmax())))
        for key, tensor in throttled(floats.items())
    }
    broken = [key for key, size in largest.items() if not math.isfinite(size)]
    if broken:
        yield sentence(f"numbers that are not finite in {listing(broken)}", "finite ones", do)
    absurd = [f"{key} ({size:.1e})" for key, size in largest.items() if LARGEST < size < math.inf]
    if absurd:
        yield sentence(
            f"numbers beyond {LARGEST:.0e} in {listing(absurd)}",
            "an adapter that did not diverge",
            do,
        )


def odd_changes(low: Mapping[str, peft.PeftLayer]) -> Iterator[str]:
    """What is wrong with the numbers of changes: whole ones, and products that would overflow."""
    for path, entry in throttled(low.items()):
        parts = {"A": entry.A, "B": entry.B, **entry.extras}
        types = {name: part.dtype for name, part in parts.items() if part.dtype not in FLOATS}
        if types:
            problem = (
                f"{', '.join(f'{name} stored as {dtype}' for name, dtype in types.items())} at"
                f" {path!r}"
            )
            yield sentence(problem, "floating-point numbers", "get the file again")
            continue
        # ‖scale · B A‖ is at most this
        norm = abs(entry.scale) * entry.A.double().norm().item() * entry.B.double().norm().item()
        if not norm <= LARGEST:
            problem = f"a change of norm up to {norm:.1e} at {path!r} (scale {entry.scale:g})"
            yield sentence(
                problem,
                f"one of at most {LARGEST:.0e}",
                "get another copy; its alpha or numbers are damaged",
            )


def _odd_statistics(full: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """Variances below zero, of which a norm takes the root."""
    for path, tensors in full.items():
        variance = tensors.get("running_var")
        if variance is not None and variance.dtype in FLOATS and bool((variance < 0).any()):
            yield sentence(
                f"a variance below zero in {path}.running_var", "variances", "get the file again"
            )
