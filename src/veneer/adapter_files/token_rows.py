"""Trained tokens between a model and PEFT's files: what is written of them, and which weight of a
model a file means.

PEFT puts the rows into a module, and into what the model ties to its input embedding. Where a
weight is read in another way, or also has a low-rank change, the folder says that it is not for
PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import peft_mapping
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach.adapted_module import base_class, weight_of
from veneer.attach.change import Change
from veneer.attach.lookup import adapters_of, changes, parameter_path
from veneer.attach.refusals import holders, holders_of, kind_for
from veneer.attach.targets import Names, ParamRef
from veneer.bases import storage_of
from veneer.errors import AdapterError, nearest, raise_all, sentence
from veneer.formats import peft, peft_tokens
from veneer.layers import kind_of


def _changed(names: Names, name: str) -> Iterator[tuple[str, str, Change]]:
    """(path of the module, name of the weight, change) of each weight of which tokens are
    trained."""
    for path, _, weight, change in changes(names.model, name):
        if change.tokens is not None:
            yield path, weight, change


def tensors_of(names: Names, name: str) -> dict[str, Tensor]:
    """What the PEFT file holds of the adapter's trained tokens."""
    found = _changed(names, name)
    return {
        peft.key(path, peft_tokens.SUFFIX): peft_mapping.written(change.token_rows)
        for path, _, change in found
    }


def config_fields(names: Names, name: str) -> dict[str, Any]:
    """What the PEFT config says of them, and why PEFT would compute something else, if it would."""
    fields: dict[str, Any] = {}
    by_identity = holders(names)
    for path, weight, change in _changed(names, name):
        tokens: Any = change.tokens
        fields.setdefault(peft_tokens.FIELD, {})[path] = tokens.tolist()
        reason = differs(names, (path, weight), by_identity)
        if change.rank:
            reason = "PEFT takes no low-rank change of a module of which it trains tokens"
        if reason is not None:
            fields["peft_type"] = f"{peft.NOT_FOR_PEFT}: {path!r}: {reason}"
    return fields


def differs(
    names: Names,
    ref: ParamRef,
    by_identity: Mapping[int, list[ParamRef]],
    given: Collection[str] = (),
) -> str | None:
    """Why PEFT, given tokens of this module (and of the others ``given``), computes something else
    than a weight with these rows gives, or None."""
    refs = holders_of(names, ref, by_identity)
    for path, name in refs:
        module = names.modules[path]
        reason = peft_mapping.differs(names, (path, name), False)
        if reason is None and module._parameters.get("bias") is not None:
            reason = "PEFT leaves out the bias of a layer of which it trains tokens"
        if reason is not None:
            return reason
    alone = trains_one_name(names, ref, by_identity, given)
    return "PEFT trains the tokens of one of the modules that share this weight" if alone else None


def trains_one_name(
    names: Names,
    ref: ParamRef,
    by_identity: Mapping[int, list[ParamRef]],
    given: Collection[str] = (),
) -> bool:
    """Whether PEFT, given tokens of this module (and of the others ``given``), leaves another name
    of its weight as it was."""
    refs = holders_of(names, ref, by_identity)
    reached = {*given, ref[0], *(_tied_to_input(names) if _is_input(names, ref[0]) else ())}
    return any(path not in reached for path, _ in refs)


def _is_input(names: Names, path: str) -> bool:
    return getattr(names.model, "get_input_embeddings", lambda: None)() is names.modules[path]


def _tied_to_input(names: Names) -> Iterator[str]:
    """The modules to which PEFT gives the tokens of the input embedding too: those that
    transformers ties, by the declarations of the model and of the modules in it."""
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


def owner_at(names: Names, at: str, by_identity: Mapping[int, list[ParamRef]]) -> ParamRef | None:
    """The weight, by the first of its names, that a module of a PEFT file means."""
    path = names.canonical.get(at)
    kind = None if path is None else kind_of(names.modules[path])
    if path is None or kind is None or weight_of(names.modules[path], kind.weight) is None:
        return None
    return holders_of(names, (path, kind.weight), by_identity)[0]


def matched(
    names: Names, saved: AdapterFiles, problems: list[str], by_peft_rules: bool
) -> dict[ParamRef, peft_tokens.TokenRows]:
    """The trained tokens of a folder by the weight of this model that they are rows of; problems
    are added."""
    by_identity = holders(names)
    found: dict[ParamRef, peft_tokens.TokenRows] = {}
    for at, entry in saved.tokens.items():
        owner = owner_at(names, at, by_identity)
        if owner is None:
            what = f"trained tokens of {at!r}, which this model lacks{nearest(at, names.modules)}"
            problems.append(
                sentence(what, "the same modules", "load it on the model that it was trained on")
            )
            continue
        size = _problem_of_size(names, saved, owner, entry)
        known = found.get(owner)
        if known is not None and (
            known.ids != entry.ids or not torch.equal(known.rows, entry.rows)
        ):
            what = (
                f"two sets of trained tokens for {parameter_path(*owner)!r}, whose names share one"
                " weight"
            )
            problems.append(sentence(what, "one", "untie the weights first"))
        elif size is not None:
            problems += [size] if known is None else []
        elif (
            by_peft_rules
            and (reason := differs(names, ref_of(names, at), by_identity, {*saved.tokens}))
            is not None
        ):
            what = f"trained tokens of {at!r} that PEFT applies in another way: {reason}"
            alone = trains_one_name(names, ref_of(names, at), by_identity, {*saved.tokens})
            do = "load it with veneer.load(…, untie=True)" if alone else "use PEFT for it"
            problems.append(sentence(what, "rows of a weight", do))
        found[owner] = entry
    problems += _without_rows(names, saved, found, by_identity)
    return found


def ref_of(names: Names, at: str) -> ParamRef:
    """The weight of a module that a PEFT file means, by that module's first path."""
    kind: Any = kind_of(names.modules[names.canonical[at]])
    return names.canonical[at], kind.weight


def _problem_of_size(
    names: Names, saved: AdapterFiles, owner: ParamRef, entry: peft_tokens.TokenRows
) -> str | None:
    """Why the rows do not fit into the weight: of another width, or of a vocabulary that grew."""
    weight = weight_of(names.modules[owner[0]], owner[1])
    storage: Any = storage_of(weight)
    where, shape = parameter_path(*owner), storage.shape(weight) if storage is not None else ()
    if len(shape) != 2 or kind_for(names.modules[owner[0]], owner[1]).name not in (
        "embedding",
        "linear",
    ):
        what = f"trained tokens of {where!r}, a {base_class(names.modules[owner[0]]).__name__}"
        return sentence(
            what, "an embedding or a linear head", "load it on the model that it was trained on"
        )
    if entry.rows.shape[1] != shape[1]:
        what = f"trained rows of {entry.rows.shape[1]} numbers for {where!r}"
        return sentence(
            what, f"{shape[1]}, as its own have", "load it on the model that it was trained on"
        )
    there = (
        saved.metadata.get("changes", {}).get(where, {}).get("of", max(shape[0], entry.ids[-1] + 1))
    )
    if there == shape[0]:
        return None
    what = f"an adapter of {there} rows of {where!r}, which has {shape[0]} in this model"
    if there < shape[0]:
        return sentence(
            what,
            "as many",
            "load it on its own base, or shrink this one: model.resize_token_embeddings",
        )
    do = (
        f"call model.resize_token_embeddings({there}) first, or pass grow=True to veneer.load"
        " (`veneer merge` grows)"
    )
    return sentence(what, "a base whose vocabulary grew as that of the adapter did", do)


def _without_rows(
    names: Names,
    saved: AdapterFiles,
    found: Mapping[ParamRef, Any],
    by_identity: Mapping[int, list[ParamRef]],
) -> Iterator[str]:
    """Problems of modules whose tokens the config names without a row in the file."""
    said = saved.peft_config.get(peft_tokens.FIELD) or {}
    for end in said if isinstance(said, Mapping) else ():
        owners = {owner_at(names, path, by_identity) for path in names.matching(end)}
        if not owners & found.keys():
            what = (
                f"trained tokens of {end!r} in {peft.CONFIG}, and no rows of them in {peft.TENSORS}"
            )
            yield sentence(what, "both", "get the whole folder again")


def recorded_otherwise(saved: AdapterFiles, at: str, entry: peft_tokens.TokenRows | None) -> bool:
    """Whether a record speaks of other tokens of a weight than the files do."""
    said = saved.metadata.get("changes", {}).get(at, {}).get("tokens")
    return said != (None if entry is None else ranges_of(entry.ids))


def size_of(saved: AdapterFiles) -> int:
    """How many rows the embeddings have of which a folder holds trained tokens: as its record says,
    or at least."""
    said = saved.metadata.get("changes", {}).values()
    return max(
        [
            *(change.get("of", 0) for change in said),
            *(one.ids[-1] + 1 for one in saved.tokens.values()),
            0,
        ]
    )


def growth(model: nn.Module, saved: AdapterFiles) -> int | None:
    """The number of rows to which the vocabulary of a model must grow for an adapter, or None.
    ``AdapterError``: that would not be the vocabulary that the adapter had, as rows of it were
    never trained, or the model cannot grow."""
    names, size, problems = Names(model), size_of(saved), []
    ends: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    own = {
        id(end.weight): end
        for end in ends
        if end is not None and getattr(end, "weight", None) is not None
    }
    before = min((len(end.weight) for end in own.values()), default=size)
    if not saved.tokens or before >= size:
        return None
    if adapters_of(model) is not None:
        problems.append(
            sentence("a model with adapters", "one that may still grow", "load this adapter first")
        )
    by_identity = holders(names)
    trained = {owner_at(names, at, by_identity): one.ids for at, one in saved.tokens.items()}
    for end in own.values():
        owner = by_identity[id(end.weight)][0]
        lost = sorted({*range(before, size)} - {*trained.get(owner, ())})
        if lost:
            what = (
                f"row {', '.join(map(str, lost[:4]))} of {parameter_path(*owner)!r} that grew and"
                " was never trained"
            )
            do = (
                "save the base as it grew (save_pretrained), and load on that; or train these"
                " rows too"
            )
            problems.append(sentence(what, "rows that the adapter holds", do))
        path, do = owner[0], "save the base as it grew (save_pretrained), and load on that"
        if getattr(end, "bias", None) is not None and "bias" not in saved.full.get(path, ()):
            what = (
                f"{parameter_path(path, 'bias')!r}, of which {size - before} numbers would be new"
                " and in no file"
            )
            problems.append(
                sentence(
                    what, "an output layer without a bias, or with one that the adapter holds", do
                )
            )
    raise_all(AdapterError, f"The base cannot grow for {saved.path}", problems)
    return size


@contextmanager
def grown(model: Any, path: Any) -> Iterator[None]:
    """A block before which the vocabulary of a model has grown for the adapter in a folder, and has
    not if it fails."""
    before, size = None, growth(model, read(path, weights_of(Names(model))))
    if size is not None:
        before = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(size, mean_resizing=False)
    try:
        yield
    except BaseException:
        if before is not None:
            model.resize_token_embeddings(before, mean_resizing=False)
        raise
