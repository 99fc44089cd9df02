"""Trained tokens as plain low-rank changes, for formats that have no place for single rows.

    ΔW = (R − W[ids]) at these rows = a product with the tokens' one-hot rows: of rank n, or n + r
    beside a low-rank
         change of the same weight, whose scale is multiplied into B

A folder holds R, which means the same on any vocabulary that grew; ΔW is counted from the rows that
one base has. So that base is asked for, as it grew, and what is written is right on it alone.

An adapter of a model whose head is its input embedding changes both. A base that is the same with a
head of its own (a GGUF with ``output.weight``) gets the change at both ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from veneer.adapter_files.base_proof import fingerprints_of
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.token_rows import vocabulary_size
from veneer.attach.adapted_module import weight_of
from veneer.attach.lookup import changes, parameter_path
from veneer.attach.refusals import holders, holders_of, kind_for
from veneer.attach.targets import Names, ParamRef
from veneer.bases import storage_of
from veneer.errors import AdapterError, listing
from veneer.fileio.hashing import kind_in
from veneer.formats._base import EMBEDDING, PAIR, BaseFacts, LowRankChange, layer_of
from veneer.models.base_weights import list_weights

_MERGE = "merge the adapter (`veneer merge`) and take the merged model"


def need_rows(saved: AdapterFiles, to: str, facts: BaseFacts) -> None:
    """``AdapterError`` where the base has not the rows, from which trained tokens of an adapter
    change, or is none."""
    if not saved.tokens:
        return
    rows, size = (
        listing(f"{len(one.ids)} of {at!r}" for at, one in saved.tokens.items()),
        vocabulary_size(saved),
    )
    what, expected = (
        f"{saved.path} with trained tokens ({rows})",
        f"the base with all {size} rows of its vocabulary",
    )
    if not facts.shapes:
        problem = f"{what}, and no base from whose rows {to!r} could count their changes"
        raise AdapterError(problem, expected, f"give the base, or {_MERGE}")
    there = min(facts.shapes.get(parameter_path(at, "weight"), (size,))[0] for at in saved.tokens)
    if there < size:
        problem = (
            f"{what}, whose changes {to!r} counts from the base's own rows, and a base of {there}"
            " rows"
        )
        do = (
            f"grow it (model.resize_token_embeddings({size})), save_pretrained it, and give that;"
            f" or {_MERGE}"
        )
        raise AdapterError(problem, expected, do)


def with_tokens(
    model: nn.Module, name: str, saved: AdapterFiles, plain: Iterable[LowRankChange]
) -> tuple[LowRankChange, ...]:
    """The low-rank changes of the adapter ``name``, which was read from ``saved`` and is on its
    base: ``plain``, as its folder holds them, and for each weight of which tokens are trained one
    of all that changes there, under each of its names. ``AdapterError``: DoRA of such a weight; a
    base with other numbers at its ends, which were one weight."""
    made = {change.weight: change for change in _whole_changes(model, name, saved)}
    return (*(change for change in plain if change.weight not in made), *made.values())


@torch.no_grad()
def _whole_changes(model: nn.Module, name: str, saved: AdapterFiles) -> Iterator[LowRankChange]:
    names = Names(model)
    by_identity, apart = holders(names), head_apart(names, saved)
    for path, module, weight, change in changes(model, name):
        if change.tokens is None:
            continue
        low, gain = change.resolve_float64(weight_of(module, weight))
        if gain is not None:
            problem = f"trained tokens of {parameter_path(path, weight)!r}, which DoRA rescales"
            raise AdapterError(problem, "a product alone", _MERGE)
        A, B = low.A[0].float(), (low.B[0] * low.scale).float()  # [r + n, in], [out, r + n]
        refs = holders_of(names, (path, weight), by_identity)
        for at, own in dict.fromkeys(
            [*refs, *(apart if apart is not None and apart[0] in refs else ())]
        ):
            turned = kind_for(names.modules[at], own).out_axis
            # a tied weight, the other way round
            a, b = (A, B) if turned == change.layer.out_axis else (B.mT, A.mT)
            layer = layer_of(
                at, a.contiguous(), b.contiguous(), None, suffixes=EMBEDDING if turned else PAIR
            )
            yield LowRankChange(parameter_path(at, own), layer, "embedding" if turned else "linear")


def head_apart(names: Names, saved: AdapterFiles) -> tuple[ParamRef, ParamRef] | None:
    """(the input embedding, the head) of a base where these are two weights of the same numbers,
    and were one where the adapter trained tokens of it: its record knows every weight of its base,
    and no head. ``AdapterError``: two weights of other numbers."""
    model: Any = names.model
    ends: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    at = {id(module): path for path, module in names.modules.items()}
    record = saved.metadata.get("base") or {}
    if not record.get("rest") or any(id(end) not in at for end in ends):
        return None
    (embedding, one), (head, other) = ((at[id(end)], weight_of(end, "weight")) for end in ends)
    known = {*record["weights"], *record["rest"], *record.get("fresh", ())}
    if (
        embedding not in saved.tokens
        or one is other
        or parameter_path(head, "weight") in known
        or head in saved.full
    ):
        return None
    if not torch.equal(*(cast(Any, storage_of(weight)).dense(weight) for weight in (one, other))):
        problem = (
            f"trained tokens of {embedding!r}, then the head too, and a base whose {head!r} has"
            " other numbers"
        )
        raise AdapterError(
            problem, "a copy of the embedding", f"give the base that it was trained on, or {_MERGE}"
        )
    return (embedding, "weight"), (head, "weight")


def own_prints(names: Names, saved: AdapterFiles) -> dict[str, str]:
    """Whole fingerprints of the weights of which tokens are trained, by path: the record's leave
    these rows out."""
    known = saved.metadata.get("base") or {}
    paths = [
        at
        for one in saved.tokens
        if (at := parameter_path(one, "weight")) in known.get("weights", ())
    ]
    by_name = {
        name: tensor
        for tensor in list_weights(names)
        if tensor.is_readable
        for name in tensor.names
    }
    return dict(
        zip(paths, fingerprints_of([by_name[at] for at in paths], kind=kind_in(known)), strict=True)
    )
