"""Trained token rows between a model and PEFT's files: their tensors and config fields, and the
weight of a model that a file means.

PEFT puts the rows into a module, and into the modules that the model ties to its input embedding.
If other code reads the weight, or the weight also has a low-rank change, the folder is marked as
not for PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import peft_deviations, peft_mapping
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach import Change, Names, adapters_of, changes
from veneer.bases import storage_of, weight_of
from veneer.distributed import base_class
from veneer.errors import AdapterError, nearest, raise_all, sentence
from veneer.formats import peft, peft_tokens
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path


def _token_changes(names: Names, name: str) -> Iterator[tuple[str, str, Change]]:
    """(path of the module, name of the weight, change) of each weight with trained token rows."""
    for path, _, weight, change in changes(names.model, name):
        if change.tokens is not None:
            yield path, weight, change


def tensors_of(names: Names, name: str) -> dict[str, Tensor]:
    """The tensors of the adapter's trained token rows, by their key in the PEFT file."""
    token_changes = _token_changes(names, name)
    return {
        peft.tensor_key(path, peft_tokens.LORA_ROWS_SUFFIX): peft_mapping.file_tensor(change.token_rows)
        for path, _, change in token_changes
    }


def config_fields(names: Names, name: str) -> dict[str, Any]:
    """The fields of the PEFT config for the trained tokens, with the reason in ``peft_type`` if
    PEFT would compute something else."""
    fields: dict[str, Any] = {}
    by_identity = names.holders()
    for path, weight, change in _token_changes(names, name):
        tokens: Any = change.tokens
        fields.setdefault(peft_tokens.INDICES_FIELD, {})[path] = tokens.tolist()
        reason = deviation_reason(names, (path, weight), by_identity)
        if change.rank:
            reason = "PEFT takes no low-rank change of a module of which it trains tokens"
        if reason is not None:
            fields["peft_type"] = f"{peft.NOT_FOR_PEFT}: {path!r}: {reason}"
    return fields


def deviation_reason(
    names: Names,
    ref: ParamRef,
    by_identity: Mapping[int, list[ParamRef]],
    further_paths: Collection[str] = (),
) -> str | None:
    """Why PEFT, with trained tokens of this module and of the modules ``further_paths``, computes
    something else than a weight with these rows; None if it does not."""
    refs = names.holders_of(ref, by_identity)
    for path, name in refs:
        module = names.modules[path]
        reason = peft_deviations.deviation_reason(names, (path, name), False)
        if reason is None and module._parameters.get("bias") is not None:
            reason = "PEFT leaves out the bias of a layer of which it trains tokens"
        if reason is not None:
            return reason
    alone = trains_one_name(names, ref, by_identity, further_paths)
    return "PEFT trains the tokens of one of the modules that share this weight" if alone else None


def trains_one_name(
    names: Names,
    ref: ParamRef,
    by_identity: Mapping[int, list[ParamRef]],
    further_paths: Collection[str] = (),
) -> bool:
    """Whether PEFT, with trained tokens of this module and of the modules ``further_paths``, leaves
    another name of the same weight unchanged."""
    refs = names.holders_of(ref, by_identity)
    reached = {*further_paths, ref[0], *(_tied_to_input(names) if _is_input(names, ref[0]) else ())}
    return any(path not in reached for path, _ in refs)


def _is_input(names: Names, path: str) -> bool:
    return getattr(names.model, "get_input_embeddings", lambda: None)() is names.modules[path]


def _tied_to_input(names: Names) -> Iterator[str]:
    """The modules that also get the input embedding's token rows in PEFT: those that transformers
    ties, as the model and its modules declare."""
    if getattr(getattr(names.model, "config", None), "tie_word_embeddings", False) is not True:
        return
    output: Any = getattr(names.model, "get_output_embeddings", lambda: None)()
    yield from (path for path, module in names.modules.items() if module is output)
    for above, module in names.modules.items():
        declared = getattr(module, "_tied_weights_keys", None)
        for key in {*declared, *declared.values()} if isinstance(declared, Mapping) else ():
            path = parameter_path(above, key).rpartition(".")[0]
            if path in names.canonical:
                yield names.canonical[path]


def owner_at(
    names: Names, module_path: str, by_identity: Mapping[int, list[ParamRef]]
) -> ParamRef | None:
    """The first name of the weight of a module in a PEFT file; None if the model has no such
    weight."""
    path = names.canonical.get(module_path)
    kind = None if path is None else kind_of(names.modules[path])
    if path is None or kind is None or weight_of(names.modules[path], kind.weight) is None:
        return None
    return names.holders_of((path, kind.weight), by_identity)[0]


def match_tokens(
    names: Names, saved: AdapterFiles, problems: list[str], by_peft_rules: bool
) -> dict[ParamRef, peft_tokens.TokenRows]:
    """The trained token rows of a folder, by the weight of this model; adds to ``problems``."""
    by_identity = names.holders()
    matches: dict[ParamRef, peft_tokens.TokenRows] = {}
    for module_path, entry in saved.tokens.items():
        owner = owner_at(names, module_path, by_identity)
        if owner is None:
            problem = (
                f"trained tokens of {module_path!r}, which this model"
                f" lacks{nearest(module_path, names.modules)}"
            )
            problems.append(
                sentence(problem, "the same modules", "load it on the model that it was trained on")
            )
            continue
        size = _size_problem(names, saved, owner, entry)
        earlier = matches.get(owner)
        if earlier is not None and (
            earlier.ids != entry.ids or not torch.equal(earlier.rows, entry.rows)
        ):
            problem = (
                f"two sets of trained tokens for {parameter_path(*owner)!r}, whose names share one"
                " weight"
            )
            problems.append(sentence(problem, "one", "untie the weights first"))
        elif size is not None:
            problems += [size] if earlier is None else []
        elif (
            by_peft_rules
            and (
                reason := deviation_reason(
                    names, ref_of(names, module_path), by_identity, {*saved.tokens}
                )
            )
            is not None
        ):
            problem = (
                f"trained tokens of {module_path!r} that PEFT applies in another way: {reason}"
            )
            alone = trains_one_name(names, ref_of(names, module_path), by_identity, {*saved.tokens})
            do = "load it with veneer.load(…, untie=True)" if alone else "use PEFT for it"
            problems.append(sentence(problem, "rows of a weight", do))
        matches[owner] = entry
    problems += _missing_rows(names, saved, matches, by_identity)
    return matches


def ref_of(names: Names, module_path: str) -> ParamRef:
    """The weight of a module in a PEFT file, under the first path of that module."""
    kind: Any = kind_of(names.modules[names.canonical[module_path]])
    return names.canonical[module_path], kind.weight


def _size_problem(
    names: Names, saved: AdapterFiles, owner: ParamRef, entry: peft_tokens.TokenRows
) -> str | None:
    """Why the rows do not fit the weight: another width, or a vocabulary of another size; None if
    they fit."""
    weight = weight_of(names.modules[owner[0]], owner[1])
    storage: Any = storage_of(weight)
    weight_path, shape = (
        parameter_path(*owner),
        storage.shape(weight) if storage is not None else (),
    )
    if len(shape) != 2 or kind_for(names.modules[owner[0]], owner[1]).name not in (
        "embedding",
        "linear",
    ):
        problem = (
            f"trained tokens of {weight_path!r}, a {base_class(names.modules[owner[0]]).__name__}"
        )
        return sentence(
            problem, "an embedding or a linear head", "load it on the model that it was trained on"
        )
    if entry.rows.shape[1] != shape[1]:
        problem = f"trained rows of {entry.rows.shape[1]} numbers for {weight_path!r}"
        return sentence(
            problem, f"{shape[1]}, as its own have", "load it on the model that it was trained on"
        )
    expected_rows = (
        saved.metadata.get("changes", {})
        .get(weight_path, {})
        .get("of", max(shape[0], entry.ids[-1] + 1))
    )
    if expected_rows == shape[0]:
        return None
    problem = (
        f"an adapter of {expected_rows} rows of {weight_path!r}, which has {shape[0]} in this model"
    )
    if expected_rows < shape[0]:
        return sentence(
            problem,
            "as many",
            "load it on its own base, or shrink this one: model.resize_token_embeddings",
        )
    do = (
        f"call model.resize_token_embeddings({expected_rows}) first, or pass grow=True to"
        " veneer.load (`veneer merge` grows)"
    )
    return sentence(problem, "a base whose vocabulary grew as that of the adapter did", do)


def _missing_rows(
    names: Names,
    saved: AdapterFiles,
    matches: Mapping[ParamRef, Any],
    by_identity: Mapping[int, list[ParamRef]],
) -> Iterator[str]:
    """The problems of modules with trained tokens in the config and no rows in the file."""
    token_ids = saved.peft_config.get(peft_tokens.INDICES_FIELD) or {}
    for end in token_ids if isinstance(token_ids, Mapping) else ():
        owners = {owner_at(names, path, by_identity) for path in names.matching(end)}
        if not owners & matches.keys():
            problem = (
                f"trained tokens of {end!r} in {peft.CONFIG}, and no rows of them in {peft.TENSORS}"
            )
            yield sentence(problem, "both", "get the whole folder again")


def differs_from_record(
    saved: AdapterFiles, weight_path: str, entry: peft_tokens.TokenRows | None
) -> bool:
    """Whether the record lists other trained tokens of a weight than the files."""
    recorded = saved.metadata.get("changes", {}).get(weight_path, {}).get("tokens")
    return recorded != (None if entry is None else ranges_of(entry.ids))


def vocabulary_size(saved: AdapterFiles) -> int:
    """The number of rows of the embeddings with trained tokens: that of the record, or the least
    number that has rows for all these tokens."""
    changes = saved.metadata.get("changes", {}).values()
    return max(
        [
            *(change.get("of", 0) for change in changes),
            *(token_rows.ids[-1] + 1 for token_rows in saved.tokens.values()),
            0,
        ]
    )


def grown_size(model: nn.Module, saved: AdapterFiles) -> int | None:
    """The number of rows to which the vocabulary of a model must grow for an adapter; None if it is
    large enough. ``AdapterError``: the model cannot grow, or the adapter lacks some of the new
    rows, which then would be random."""
    names, size, problems = Names(model), vocabulary_size(saved), []
    layers: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    embeddings = {
        id(layer.weight): layer
        for layer in layers
        if layer is not None and getattr(layer, "weight", None) is not None
    }
    before = min((len(layer.weight) for layer in embeddings.values()), default=size)
    if not saved.tokens or before >= size:
        return None
    if adapters_of(model) is not None:
        problems.append(
            sentence("a model with adapters", "one that may still grow", "load this adapter first")
        )
    by_identity = names.holders()
    trained = {
        owner_at(names, module_path, by_identity): token_rows.ids
        for module_path, token_rows in saved.tokens.items()
    }
    for layer in embeddings.values():
        owner = by_identity[id(layer.weight)][0]
        untrained = sorted({*range(before, size)} - {*trained.get(owner, ())})
        if untrained:
            problem = (
                f"row {', '.join(map(str, untrained[:4]))} of {parameter_path(*owner)!r} that grew"
                " and was never trained"
            )
            do = (
                "save the base as it grew (save_pretrained), and load on that; or train these"
                " rows too"
            )
            problems.append(sentence(problem, "rows that the adapter holds", do))
        path, do = owner[0], "save the base as it grew (save_pretrained), and load on that"
        if getattr(layer, "bias", None) is not None and "bias" not in saved.full.get(path, ()):
            problem = (
                f"{parameter_path(path, 'bias')!r}, of which {size - before} numbers would be new"
                " and in no file"
            )
            problems.append(
                sentence(
                    problem,
                    "an output layer without a bias, or with one that the adapter holds",
                    do,
                )
            )
    raise_all(AdapterError, f"The base cannot grow for {saved.path}", problems)
    return size


@contextmanager
def grow_vocabulary(model: Any, path: Any) -> Iterator[None]:
    """Grow the vocabulary of a model for the adapter in a folder; shrink it again if the block
    raises."""
    before, size = None, grown_size(model, read(path, weights_of(Names(model))))
    if size is not None:
        before = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(size, mean_resizing=False)
    try:
        yield
    except BaseException:
        if before is not None:
            model.resize_token_embeddings(before, mean_resizing=False)
        raise
