"""Read and write adapter folders. PEFT, vLLM, SGLang and transformers load such a folder unchanged,
and hashes in it tell whether its tensors or configs changed after they were written.

    adapter_config.json           PEFT's fields
    adapter_model.safetensors     the tensors; its header holds Veneer's record of the adapter
    veneer.json                   the same record, for people to read
    README.md                     the model card, for people to read
    veneer.safetensors            the adapter parameters of a variant that PEFT lacks;
                                  adapter_model.safetensors then holds the equivalent plain LoRA

``write`` writes all files in one atomic step. ``read`` needs no model. It checks each file before
it uses the content (``fileio/untrusted.py``: sizes, JSON, links; ``record.py``: hashes;
``number_checks.py``: dtypes and magnitudes).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from veneer.adapter_files import file_names, model_card
from veneer.adapter_files.number_checks import change_problems, number_problems, variance_problems
from veneer.adapter_files.record import (
    PARAMETERS,
    RECORD,
    compare_hashes,
    record_in_header,
    record_problems,
    require_unchanged,
    seal_record,
)
from veneer.adapter_files.tuner_folder import TunerFolder, UnknownShapes, convert_tuner_files
from veneer.config import LoraConfig
from veneer.errors import AdapterError, ConfigError, listing, raise_all, sentence
from veneer.fileio.atomic import new_folder
from veneer.fileio.temporary import recovery_problems
from veneer.fileio.tensors import read_tensors
from veneer.fileio.untrusted import (
    json_object,
    location_problems,
    pickle_problems,
    read_header,
    read_json,
)
from veneer.formats import peft, peft_fields, peft_paths, peft_targets, peft_tokens
from veneer.formats.peft_config import BIASES
from veneer.formats.peft_tuners import WeightLookup, check_config, check_tensors, tuner_of
from veneer.layers import LAYERS
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter folder, checked without a model.

    Fields:
        config: the config in Veneer's fields.
        peft_config: the fields of ``adapter_config.json``.
        record: Veneer's record; None if another library wrote the folder.
        low, full: the low-rank changes, and the tensors that are trained in full, by the path of
            their module in ``adapter_model.safetensors``.
        adapter_parameters: the tensors of ``veneer.safetensors``, by the path of the weight and
            then by name.
        tuner: the original content, if the folder is of a PEFT tuner such as LoHa; None for LoRA.
            If it is set, the other fields describe the folder that Veneer would write.
        tokens: the trained token rows of embeddings and heads, by the path of the module.
        ignored_modules: in a folder of another library, the modules that the config does not match,
            so that PEFT ignores their tensors (``formats/peft_targets.py``).
        has_model_order: whether a model gave the parameters of ``unordered_modules`` their order.
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
    ignored_modules: tuple[str, ...] = ()
    has_model_order: bool = False

    @cached_property
    def unordered_modules(self) -> tuple[str, ...]:
        """The modules with several changed parameters, of which only the model tells the order, so
        that ``low`` may name the wrong ones (``peft_paths.unordered_modules``)."""
        is_ordered = self.record is not None or self.has_model_order
        return () if is_ordered else peft_paths.unordered_modules(self.peft_config, self.low)

    def require_parameter_order(self) -> None:
        """Raise AdapterError if ``unordered_modules`` is not empty."""
        if self.unordered_modules:
            raise AdapterError(
                f"parameters of {listing(map(repr, self.unordered_modules), 3)} in {self.path}",
                "their order in the model, in which PEFT nests them",
                "pass the model (--base on the command line), or load it there and save that",
            )

    def refuse_trained_tokens(self, operation: str) -> None:
        """Raise AdapterError if the adapter trains tokens, which ``operation`` does not support."""
        if self.tokens:
            row_counts_text = listing(
                f"{len(token_rows.ids)} of {module_path!r}"
                for module_path, token_rows in self.tokens.items()
            )
            raise AdapterError(
                f"{self.path} with trained tokens ({row_counts_text}), for which {operation} has no"
                " place",
                "changes of whole weights",
                "merge it (`veneer merge`), and take the merged model",
            )

    def refuse_invocation_tokens(self, operation: str) -> None:
        """Raise AdapterError if the adapter acts only on the tokens from its invocation tokens on
        (aLoRA), which ``operation`` cannot express."""
        if tokens := self.config.invocation_tokens:
            raise AdapterError(
                f"{self.path}, which acts from its invocation tokens {list(tokens)} on, for"
                f" {operation}",
                "an adapter that acts on every token",
                "use it as the adapter that it is; `veneer serve` takes it",
            )

    def token_ids(self, weight_path: str) -> tuple[int, ...]:
        """The ids of the tokens whose rows of a weight are trained, or (). A tied weight has ids
        only under the path that the file names."""
        token_rows = self.tokens.get(weight_path.rpartition(".")[0])
        return () if token_rows is None else token_rows.ids

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The record, or an empty mapping if there is no record."""
        return self.record or {}

    @cached_property
    def layers(self) -> dict[str, LowRank]:
        """Each change as a low-rank product, by the path of the changed module, or of the changed
        parameter if the config targets a parameter. ``AdapterError``: a change is more than a
        low-rank product (DoRA, for example, also rescales the weight), or as for ``products``."""
        non_product_paths = [layer.target_path for layer in self.low.values() if layer.extras]
        if non_product_paths:
            raise AdapterError(
                f"variant {self.config.variant!r}, whose change is no low-rank product alone (at"
                f" {listing(non_product_paths, 3)})",
                "changes of the form scale · B @ A",
                "merge it to have the changed weights, or take `products` to leave the rest out",
            )
        return self.products

    @cached_property
    def products(self) -> dict[str, LowRank]:
        """The low-rank product of each change, by the same paths as in ``layers``, but without
        DoRA's magnitudes. ``AdapterError``: only the model tells the paths."""
        self.require_parameter_order()
        return {layer.target_path: layer.low for layer in self.low.values()}

    @property
    def parameters(self) -> int:
        """The number of trained values. For weights with tensors in ``veneer.safetensors``, these
        tensors count, not the equivalent plain LoRA."""
        full_tensors = [tensor for tensors in self.full.values() for tensor in tensors.values()]
        if self.tuner is not None:
            return self.tuner.value_count + sum(tensor.numel() for tensor in full_tensors)
        variant_paths = {
            path
            for weight_path in self.adapter_parameters
            for path in (weight_path, weight_path.rpartition(".")[0])
        }
        tensors = [
            *full_tensors,
            *(tensor for group in self.adapter_parameters.values() for tensor in group.values()),
            *(token_rows.rows for token_rows in self.tokens.values()),
            *(
                tensor
                for layer in self.low.values()
                if layer.target_path not in variant_paths
                for tensor in (layer.A, layer.B, *layer.extras.values())
            ),
        ]
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
    tokenizer: Path | None = None,
) -> None:
    """Write the files of an adapter as one folder, in one atomic step. If the folder replaces an
    adapter, the notes in the old model card are kept.

    Args:
        tensors: the tensors of ``adapter_model.safetensors``, by key.
        base: the entry "base" of the record: "name", "architecture", "weights" (the fingerprint of
            each changed weight, by path) and, if known, "rest" (those of the other tensors, by
            name) and "fresh" (names of parameters that no checkpoint holds). None if the base is
            unknown: the folder then has no record.
        changes: the entry "changes": rank, alpha and rows by the path of the changed weight.
        parameters: the tensors of ``veneer.safetensors``, for a folder with a record. Without any,
            the file is not written.
        tokenizer: the folder of a tokenizer with added tokens, whose files are copied.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False; it is a file; or it holds a
            complete model other than the base.
        AdapterError: ``read`` would refuse the folder, because a tensor is not finite, a change is
            absurdly large, a file format forbids the name of a tensor, or the provenance is not
            JSON or too long.
    """
    raise_all(
        AdapterError,
        f"{path} was not written",
        list(number_problems({**tensors, **parameters}, "train it again")),
    )
    record = None
    if base is not None:
        record = seal_record(
            {"base": dict(base), "changes": dict(changes or {}), "config": config.to_dict()},
            tensors,
            peft_config,
            provenance,
            parameters,
        )
    texts_by_file = {peft.CONFIG: json.dumps(peft_config, indent=2) + "\n"}
    if record is not None:
        texts_by_file[RECORD] = json.dumps(record, indent=2) + "\n"
    with _report_unwritten(path):
        peft_fields.check_config(peft_config, record is not None, with_base=record is not None)
        problems = [] if record is None else [*record_problems(record, path)]
        raise_all(AdapterError, "Its record", problems)
        assemble(path, peft_config, record, tensors, parameters)
        for file_name, text in texts_by_file.items():
            json_object(text, file_name, "give less provenance")
    file_names.must_hold_no_model(path, peft_config.get("base_model_name_or_path"))
    texts_by_file[model_card.CARD_FILE] = model_card.folder_card(path, peft_config, record, tensors)
    replaced_names = (
        file_names.FILES if tokenizer is None else (*file_names.FILES, *file_names.TOKENIZER_FILES)
    )
    with new_folder(path, overwrite=overwrite, replaces=replaced_names) as staging_folder:
        for file_name, text in texts_by_file.items():
            (staging_folder / file_name).write_text(text, encoding="utf-8", errors="replace")
        if parameters:
            save_file(dict(parameters), staging_folder / PARAMETERS, metadata={"format": "pt"})
        header_metadata = (
            {"format": "pt"} if record is None else {"format": "pt", "veneer": json.dumps(record)}
        )
        save_file(dict(tensors), staging_folder / peft.TENSORS, metadata=header_metadata)
        if tokenizer is not None:
            file_names.copy_tokenizer(tokenizer, staging_folder)
        with _report_unwritten(path):
            for file_name in (peft.TENSORS, *((PARAMETERS,) if parameters else ())):
                read_header(staging_folder / file_name)


@contextmanager
def _report_unwritten(path: Path) -> Iterator[None]:
    """If a check in the block raises an AdapterError, raise one that says that nothing was written.
    The block runs before the folder appears, so that no training ends in an unreadable folder."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(
            f"{path} was not written, as it could not be read again. {error}"
        ) from error


def read(
    path: str | Path, weights: WeightLookup | None = None, *, with_base: bool = False
) -> AdapterFiles:
    """Read and verify an adapter folder, without a model.

    Args:
        weights: a function that returns the shape and dtype of a base's weight by its path, which
            some tuners of PEFT need. Without it, any access to ``low`` of a VeRA folder raises an
            AdapterError, as the shapes of its changes are unknown.
        with_base: whether to accept adapters that only their base converts to changes of weights
            (PiSSA, ``lora_bias``), because the caller loads them on it. ``weights`` implies it.

    Raises:
        AdapterError: a file is missing, truncated, altered, a pickle or a link that leaves the
            folder; or a value is not finite or not supported.

    Warns:
        TensorsLeftOut: another library wrote the folder, and its file has tensors of modules that
            the config does not match, so that PEFT ignores these tensors.
    """
    path = Path(path)
    raise_all(AdapterError, f"{path} cannot be read", folder_problems(path))
    peft_config = read_json(path / peft.CONFIG)
    tensors, header = read_tensors(path / peft.TENSORS)
    record = record_in_header(path, header)
    parameters: dict[str, Tensor] = {}
    if record is not None:
        raise_all(
            AdapterError,
            f"The record of {path} cannot be used",
            list(record_problems(record, path)),
        )
        parameters = read_parameters(path, record)
        require_unchanged(compare_hashes(path, record, peft_config, tensors, parameters), path)
    lora_config, all_tensors = peft_tokens.convert_to_lora(peft_config, tensors)
    check_config(lora_config, record is not None, with_base or weights is not None)
    problems = list(number_problems({**all_tensors, **parameters}, "get another copy"))
    raise_all(AdapterError, f"{path} cannot be used", problems)
    if record is not None:
        return assemble(path, lora_config, record, all_tensors, parameters, weights)
    lora_config, tensors, ignored_modules = convert_foreign_files(peft_config, tensors)
    if ignored_modules:
        warnings.warn(
            f"{path} holds {peft_targets.describe_ignored(ignored_modules)}.",
            peft_targets.TensorsLeftOut,
            stacklevel=2,
        )
    adapter_files = assemble(path, lora_config, record, tensors, parameters, weights)
    return replace(adapter_files, ignored_modules=ignored_modules)


def convert_foreign_files(
    peft_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], tuple[str, ...]]:
    """Convert the files of another library's folder to those of a folder with peft_type LORA:
    (config, the tensors that PEFT applies, the modules of which PEFT ignores tensors).
    ``check_config`` must have accepted the config. ``AdapterError``: the tensors are not of the
    tuner (LoRA, LoHa, …) that the config names."""
    check_tensors(peft_config, tensors)
    factor_suffixes = (suffix for kind in LAYERS for suffix in kind.file_keys)
    extra_suffixes = (key for variant in VARIANTS for key in variant.peft_keys.values())
    suffixes = dict.fromkeys((*factor_suffixes, *extra_suffixes, peft.LORA_BIAS))
    tensors, ignored_modules = peft_targets.applied_tensors(peft_config, tensors, suffixes)
    return *peft_tokens.convert_to_lora(peft_config, tensors), ignored_modules


def assemble(
    path: Path,
    peft_config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    weight_lookup: WeightLookup | None = None,
) -> AdapterFiles:
    """Combine the contents of the files into an adapter, after each was checked by itself.
    ``AdapterError``: they do not fit together. ``weight_lookup``: as ``weights`` of ``read``."""
    tuner = tuner_of(peft_config) if record is None else None
    tuner_content = (
        None if tuner is None else convert_tuner_files(tuner, peft_config, tensors, weight_lookup)
    )
    if tuner_content is not None:
        peft_config = tuner_content.config
        tensors = tuner_content.tensors
        parameters = tuner_content.parameters
    extra_suffixes = {key for variant in VARIANTS for key in variant.peft_keys.values()}
    extra_suffixes |= {peft.LORA_BIAS} if peft_config.get("lora_bias") is True else set()
    tokens, tensors = peft_tokens.split_rows(tensors, peft_config)
    low, full = peft.split_tensors(
        tensors,
        peft_config,
        {kind.file_keys for kind in LAYERS},
        extra_suffixes,
        by_veneer=record is not None,
    )
    raise_all(
        AdapterError, f"{path} cannot be used", [*change_problems(low), *variance_problems(full)]
    )
    parameters_by_weight: dict[str, dict[str, Tensor]] = {}
    for key, tensor in parameters.items():
        weight_path, _, parameter_name = key.rpartition(".")
        parameters_by_weight.setdefault(weight_path, {})[parameter_name] = tensor
    try:
        config = LoraConfig.from_dict(record["config"]) if record else _foreign_config(peft_config)
        VARIANTS[config.variant]  # raises ConfigError for an unknown variant
        config = config if tuner_content is None else tuner_content.variant_config(config)
    except ConfigError as error:
        raise AdapterError(f"The config of {path} cannot be used. {error}") from error
    if tuner_content is not None and tuner_content.needs_base_shapes:
        return AdapterFiles(
            path,
            config,
            peft_config,
            record,
            UnknownShapes(tuner_content, path),
            full,
            parameters_by_weight,
            tuner_content,
        )
    return AdapterFiles(
        path, config, peft_config, record, low, full, parameters_by_weight, tuner_content, tokens
    )


def _fetch_advice(path: str) -> str:
    """The advice for a path that is not a folder. The path may be a remote address, or the id of an
    adapter on the Hugging Face hub."""
    if hub_url_match := re.fullmatch(r"https?:/huggingface\.co/([^/]+/[^/]+).*", path):
        path = hub_url_match[1]
    if remote_match := re.fullmatch(r"(\w+):/(\w.*)", path):  # ``Path`` has turned "//" into "/"
        address = f"{remote_match[1]}://{remote_match[2]}"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        address = f"hf://{path}"
    else:
        return "check the path"
    advice = f"fetch it with veneer.store.remote.pull({address!r}), which returns a folder"
    return (
        advice
        if remote_match or hub_url_match
        else f"check the path; if that is an id on the Hugging Face hub, {advice}"
    )


def folder_problems(path: Path) -> list[str]:
    """The problems that keep a folder from being read: missing files, links, pickles. If a process
    was killed while it replaced the files, this function first completes the replacement."""
    problems = [] if (path / peft.CONFIG).is_file() else recovery_problems(path.resolve())
    if not path.is_dir():
        advice = _fetch_advice(str(path))
        return [*problems, sentence(f"no folder {path}", "an adapter folder", advice)]
    problems += [*pickle_problems(path), *location_problems(path, file_names.FILES)]
    missing_files = [name for name in (peft.CONFIG, peft.TENSORS) if not (path / name).is_file()]
    if missing_files and not problems:
        problem = f"no {' and no '.join(missing_files)} in {path}"
        expected, advice = f"{peft.CONFIG} and {peft.TENSORS}", "name the folder that holds them"
        problems.append(sentence(problem, expected, advice))
    return problems


def read_parameters(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``veneer.safetensors`` by key. ``AdapterError``: the file is missing although
    the record names it, or exists although the record does not."""
    if PARAMETERS not in record["hashes"]:
        if (path / PARAMETERS).exists():
            raise AdapterError(
                f"{path / PARAMETERS}, of which the record says nothing",
                "files that belong together",
                "remove it, or get another copy",
            )
        return {}
    if not (path / PARAMETERS).is_file():
        raise AdapterError(
            f"no {PARAMETERS} in {path}, which holds the numbers of variant"
            f" {record['config'].get('variant')!r}",
            "the folder as it was saved",
            f"copy the whole folder, or remove Veneer's record to use {peft.TENSORS} as the plain"
            " LoRA that it is",
        )
    return read_tensors(path / PARAMETERS)[0]


def _foreign_config(peft_config: Mapping[str, Any]) -> LoraConfig:
    """Veneer's config for the adapter of a folder without a record, from PEFT's config.

    It only describes an adapter whose tensors exist. So it keeps PEFT's names of modules and leaves
    out ``init_lora_weights``; ``peft_config.lora_fields`` makes a config for a new training."""
    flags = {name for name in ("use_rslora", "use_dora") if peft_config.get(name)}
    # some variants have no flag in PEFT's config, so a config without flags is taken for plain LoRA
    matching_variants = (
        variant
        for variant in VARIANTS
        if {flag for flag, is_on in (variant.peft or {}).items() if is_on} == flags
    )
    variant = next(matching_variants, None) if flags else VARIANTS["lora"]
    if variant is None:
        raise AdapterError(
            f"{listing(flags)} in {peft.CONFIG}", "a variant that Veneer has", "use PEFT for it"
        )
    targets = peft_config.get("target_modules") or ()
    if not isinstance(targets, str):
        targets = [*targets, *(peft_config.get("target_parameters") or ())]
    elif targets != "all-linear":
        targets = f"re:{targets}"
    return LoraConfig(
        rank=peft_config["r"],
        alpha=peft_config["lora_alpha"],
        dropout=peft_config.get("lora_dropout") or 0.0,
        targets=targets,
        train_also=peft_config.get("modules_to_save") or (),
        variant=variant.name,
        trainable_tokens=peft_config.get(peft_tokens.INDICES_FIELD) or (),
        invocation_tokens=peft_config.get("alora_invocation_tokens") or (),
        bias=BIASES.get(peft_config.get("bias") or "none", "none"),
    )
