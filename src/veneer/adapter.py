"""The artefact: a folder that PEFT, vLLM, SGLang and transformers load unchanged, and that proves what it is.

    adapter_config.json           PEFT's fields
    adapter_model.safetensors     the tensors; its header holds Veneer's record of the adapter
    veneer.json                   the same record, for people

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
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapted import LayerAdapter, sites
from veneer.attach import Plans, adapters, check_full, install, name_problems, need_group, only_name, plan_low, unwrap
from veneer.config import LoraConfig
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, listing, nearest, raise_all, sentence
from veneer.files import new_folder
from veneer.formats import peft
from veneer.layers import LAYERS, kind_of
from veneer.lowrank import LowRank
from veneer.merge import digest, hash_bytes, originals
from veneer.targets import Names
from veneer.variants import VARIANTS

RECORD = "veneer.json"
FORMAT = 1


class UnverifiedAdapter(UserWarning):
    """An adapter that another library wrote: it carries no fingerprint, so nobody can tell whether it was made for
    this base."""


@dataclass(frozen=True)
class Artefact:
    """An adapter folder that was read and verified, without a model.

    ``record`` is None for a folder that another library wrote. ``low`` and ``full`` are the tensors by module path.
    """

    path: Path
    config: LoraConfig
    peft_config: Mapping[str, Any]
    record: Mapping[str, Any] | None
    low: Mapping[str, peft.PeftLayer]
    full: Mapping[str, Mapping[str, Tensor]]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The record, or an empty mapping."""
        return self.record or {}

    @cached_property
    def layers(self) -> dict[str, LowRank]:
        """Each low-rank change as a value, by module path."""
        scale = VARIANTS[self.config.variant].scale
        return {
            path: LowRank(
                entry.A.reshape(-1, entry.rank, entry.A.numel() // entry.A.shape[0])
                if _by_row(entry)
                else entry.A[None],
                entry.B.reshape(entry.A.shape[0] // entry.rank, -1, entry.rank),
                scale(entry.alpha, entry.rank),
            )
            for path, entry in self.low.items()
        }

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        low = sum(entry.A.numel() + entry.B.numel() for entry in self.low.values())
        return low + sum(tensor.numel() for tensors in self.full.values() for tensor in tensors.values())


def _by_row(entry: peft.PeftLayer) -> bool:
    return entry.A.shape[0] != entry.rank or entry.A.dim() > 2


def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter ``name`` (None: the only one) as a folder, in one step: a crash leaves what was there before,
    or the whole.

    Args:
        base_name: what to call the base; None takes the name that transformers loaded it by.
        provenance: anything worth knowing about the training, as JSON values.
        overwrite: replace a folder that exists.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False.
        AdapterError: a trained number is not finite.
    """
    model = unwrap(model)
    name = only_name(model, name)
    config, path = need_group(model, name).configs[name], Path(path)
    tensors, fingerprints = _tensors(model, name)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(
            sentence(f"numbers that are not finite in {listing(broken)}", "finite ones", "train it again")
        )
    base_name = (
        base_name if base_name is not None else getattr(getattr(model, "config", None), "_name_or_path", "") or None
    )
    peft_config = _peft_config(model, name, config, base_name)
    record = {
        "format": FORMAT,
        "base": {"name": base_name, "architecture": type(model).__name__, "weights": fingerprints},
        "config": config.to_dict(),
        "hashes": {"tensors": _hash_tensors(tensors), peft.CONFIG: _hash_json(peft_config)},
        "versions": _versions(),
        "provenance": dict(provenance or {}),
    }
    record["hashes"]["record"] = _hash_record(record)
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / peft.CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n")
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        save_file(tensors, folder / peft.TENSORS, metadata={"format": "pt", "veneer": json.dumps(record)})
    return path


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
    peft.check_config(peft_config)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(
            sentence(f"numbers that are not finite in {listing(broken)}", "finite ones", "get another copy")
        )
    low, full = peft.split(tensors, peft_config, {kind.file_keys for kind in LAYERS})
    try:
        config = LoraConfig.from_dict(record["config"]) if record else _foreign_config(peft_config)
    except ConfigError as error:
        raise AdapterError(f"The config of {path} cannot be used. {error}") from error
    return Artefact(path, config, peft_config, record, low, full)


def install_from(model: nn.Module, path: str | Path, name: str, *, trainable: bool, verify_base: bool) -> None:
    """What ``veneer.load`` does: verify the folder against the model, then install it."""
    artefact = read(path)
    names = Names(model)
    problems = [*name_problems(model, name)]
    wanted, file_of = {}, {}
    for file_path, entry in artefact.low.items():
        actual = names.canonical.get(file_path)
        if actual is None:
            near = nearest(file_path, names.modules)
            problems.append(
                sentence(
                    f"a change of {file_path!r}, which this model lacks{near}",
                    "the same modules",
                    "load it on the model that it was trained on",
                )
            )
        else:
            wanted[actual], file_of[actual] = (entry.rank, entry.alpha), entry
    low = plan_low(names, wanted, problems)
    numbers = {entry.path: _numbers(names, entry, file_of, problems) for entry in low}
    full = {names.canonical.get(path, path): tensors for path, tensors in artefact.full.items()}
    _check_full_tensors(names, full, problems)
    if artefact.record is None:
        expected = peft.expected_paths(artefact.peft_config, [n for n, m in names.modules.items() if kind_of(m)])
        lacking = sorted((expected or set()) - set(wanted))
        if lacking:
            problems.append(
                sentence(f"no tensors for {listing(lacking)}", "those of every target", "get the whole file")
            )
    raise_all(AdapterError, f"The adapter {path} does not fit this {type(model).__name__}", problems)
    if artefact.record is not None and verify_base:
        _verify_base(model, artefact)
    elif artefact.record is None:
        warnings.warn(
            f"{path} was written by another library and carries no fingerprint of its base: names and shapes fit this "
            "model, but only you can tell whether it was trained on these weights. Save it with veneer.save to have it "
            "checked from now on.",
            UnverifiedAdapter,
            stacklevel=3,
        )
    names_of_full = {
        key: tuple(n for n in tensors if n in names.modules[key]._parameters) for key, tensors in full.items()
    }
    install(model, name, Plans(artefact.config, tuple(low), names_of_full), trainable=trainable)
    _fill(model, name, numbers, full)


def fingerprint(weight: Tensor) -> str:
    """The first 128 bits of the SHA-256 of a weight's shape and of its values rounded to bfloat16, in hex."""
    return hash_bytes(str(tuple(weight.shape)), weight.detach().to(torch.bfloat16))[:32]


def _tensors(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(file tensors, fingerprints of the changed weights). A tied weight's change stands under every module that
    reads it, each time as that module reads it, so that a library which adapts modules one by one gives the same
    outputs."""
    tensors: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    owners = {id(adapter): path for path, _, adapter in adapters(model, name)}
    for path, module, site in sites(model):
        adapter = site._modules.get(name)
        if not isinstance(adapter, LayerAdapter):
            continue
        if adapter.layer is not None:
            kind = site.layer
            weight: Any = module._parameters[kind.weight]
            low, _ = adapter.resolve(weight)
            A, B = kind.pack(low.T if site.transposed else low, module)
            for suffix, tensor in zip(kind.file_keys, (A, B), strict=True):
                tensors[peft.key(path, suffix)] = tensor.detach().cpu().contiguous().clone()
            if owners[id(adapter)] == path:
                kept = originals(adapter).get(kind.weight, weight)
                fingerprints[path] = fingerprint(adapter.storage.dense(kept))
        for key, value in adapter.full.state_dict().items() if owners[id(adapter)] == path else ():
            inner = f"base_layer.{key}" if adapter.layer is not None else key
            tensors[peft.key(path, inner)] = value.detach().cpu().contiguous().clone()
    return tensors, fingerprints


def _peft_config(model: nn.Module, name: str, config: LoraConfig, base_name: str | None) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    if variant.peft is None:
        raise AdapterError(sentence(f"variant {variant.name!r}", "one that PEFT's format has", "merge it instead"))
    parts: dict[str, Any] = {path: site._modules.get(name) for path, _, site in sites(model)}
    low = {path: part for path, part in parts.items() if part is not None and part.layer is not None}
    ranks, alphas = {path: part.rank for path, part in low.items()}, {path: part.alpha for path, part in low.items()}
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    also = [path for path, _, adapter in adapters(model, name) if adapter.layer is None and config.train_also]
    among = [path for path, module in Names(model).modules.items() if kind_of(module)]
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": peft.targets_for(list(low), among),
        "rank_pattern": peft.patterns_for(ranks, config.rank),
        "alpha_pattern": peft.patterns_for(alphas, alpha),
        "modules_to_save": sorted(also) or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": any(part.layer.name == "conv1d_transformers" for part in low.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        **variant.peft,
    }


def _task(model: nn.Module) -> str | None:
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)


def _foreign_config(config: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig that a PEFT config means."""
    said = {name for name in ("use_rslora",) if config.get(name)}
    variant = next((v for v in VARIANTS if v.peft is not None and {k for k, on in v.peft.items() if on} == said), None)
    if variant is None:
        raise AdapterError(
            sentence(f"{listing(said)} in {peft.CONFIG}", "a variant that Veneer has", "use PEFT for it")
        )
    targets = config["target_modules"]
    if isinstance(targets, str):
        targets = targets if targets == "all-linear" else f"re:{targets}"
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets,
        train_also=config.get("modules_to_save") or (),
        variant=variant.name,
        bias={"none": "none", "lora_only": "targets", "all": "all"}.get(config.get("bias") or "none", "none"),
    )


def _numbers(names: Names, entry, file_of: Mapping[str, peft.PeftLayer], problems: list[str]):
    """(A [g, r, in], B [g, out, r]) of one planned layer, from what the file holds for each module that reads its
    weight."""
    found = []
    for reader in entry.readers:
        path = next(path for path, module in names.modules.items() if module is reader)
        layer = file_of.get(path)
        kind = kind_of(reader)
        if layer is None:
            what = f"a change of {entry.path!r}, whose weight {path!r} shares, without one for {path!r}"
            problems.append(sentence(what, "one change for a tied weight, under every name", "untie the weights first"))
            return None
        pair = kind.unpack(layer.A, layer.B, kind.dims(reader)) if layer.suffixes == kind.file_keys else None
        if pair is None:
            what = f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {path!r}"
            expected = f"those of a {kind.name} layer with (groups, out, in) = {tuple(kind.dims(reader))}"
            problems.append(sentence(what, expected, "load it on the model that it was trained on"))
            return None
        A, B = pair
        found.append((B.mT, A.mT) if kind.out_axis != entry.layer.out_axis else (A, B))
    if any(not torch.equal(A, found[0][0]) or not torch.equal(B, found[0][1]) for A, B in found[1:]):
        what = f"different changes for {entry.path!r} and the modules that share its weight"
        problems.append(sentence(what, "one change of a tied weight", "untie the weights first"))
    return found[0]


def _check_full_tensors(names: Names, full: Mapping[str, Mapping[str, Tensor]], problems: list[str]) -> None:
    known: dict[str, tuple[str, ...]] = {}
    for path, tensors in full.items():
        module = names.modules.get(path)
        own = {**module._parameters, **module._buffers} if module is not None else {}
        for key, tensor in tensors.items():
            if own.get(key) is None:
                problems.append(
                    sentence(f"a tensor for {path}.{key}, which this model lacks", "the same modules", "use its model")
                )
            elif own[key].shape != tensor.shape:
                found = f"{path}.{key} of shape {tuple(tensor.shape)}"
                problems.append(sentence(found, f"{tuple(own[key].shape)}", "use the model that it was trained on"))
        known[path] = tuple(key for key in tensors if module is not None and key in module._parameters)
    check_full(names, {path: keys for path, keys in known.items() if path in names.modules}, problems)


def _fill(model: nn.Module, name: str, numbers: Mapping[str, Any], full: Mapping[str, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for path, _, adapter in adapters(model, name):
            for own, value in zip(("A", "B"), numbers.get(path, ()), strict=False):
                adapter._parameters[own].copy_(value)
            for key, value in full.get(path, {}).items():
                {**adapter.full._parameters, **adapter.full._buffers}[key].copy_(value)


def _verify_base(model: nn.Module, artefact: Artefact) -> None:
    """Compare the fingerprint of every adapted weight."""
    record = artefact.metadata["base"]
    names = Names(model)
    different = []
    for path, expected in record["weights"].items():
        module = names.modules[names.canonical[path]]
        kind = kind_of(module)
        weight: Any = module._parameters[kind.weight]
        if fingerprint(weight) != expected:
            different.append(path)
    if different:
        found = (
            f"other weights in {len(different)} of {len(record['weights'])} adapted layers ({listing(different, 3)})"
        )
        expected = f"the base that it was trained on, {record['name'] or record['architecture']}"
        do = "load that base, or pass verify_base=False if these are the same weights in another precision"
        raise BaseMismatchError(
            f"The adapter {artefact.path} was made for another base. {sentence(found, expected, do)}"
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
            peft.CONFIG: (_hash_json(config), hashes[peft.CONFIG]),
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
    return record


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


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for key in sorted(tensors):
        whole.update(f"{key} {tuple(tensors[key].shape)} {digest(tensors[key])}\n".encode())
    return whole.hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record["hashes"].items() if key != "record"}
    return _hash_json({**record, "hashes": rest})


def _versions() -> dict[str, str]:
    return dict(_installed("veneer", "torch", "transformers"))


def _installed(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
