"""Trained tokens as plain low-rank changes, for formats that have no place for single rows.

    ΔW = (R − W[ids]) at these rows = a product with the tokens' one-hot rows: of rank n, or n + r beside a low-rank
         change of the same weight, whose scale is multiplied into B

A folder holds R, which means the same on any vocabulary that grew; ΔW is counted from the rows that one base has. So
that base is asked for, as it grew, and what is written is right on it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.token_rows import size_of
from veneer.attach.adapted_module import weight_of
from veneer.attach.lookup import changes, parameter_path
from veneer.attach.refusals import holders, holders_of, kind_for
from veneer.attach.targets import Names
from veneer.errors import AdapterError, listing, sentence
from veneer.formats._base import EMBEDDING, PAIR, BaseFacts, LowRankChange, layer_of

_MERGE = "merge the adapter (`veneer merge`) and take the merged model"


def need_rows(saved: AdapterFiles, to: str, facts: BaseFacts) -> None:
    """``AdapterError`` where the base has not the rows, from which trained tokens of an adapter change, or is none."""
    if not saved.tokens:
        return
    rows, size = listing(f"{len(one.ids)} of {at!r}" for at, one in saved.tokens.items()), size_of(saved)
    what, expected = f"{saved.path} with trained tokens ({rows})", f"the base with all {size} rows of its vocabulary"
    if not facts.shapes:
        found = f"{what}, and no base from whose rows {to!r} could count their changes"
        raise AdapterError(found, expected, f"give the base, or {_MERGE}")
    there = min(facts.shapes.get(parameter_path(at, "weight"), (size,))[0] for at in saved.tokens)
    if there < size:
        found = f"{what}, whose changes {to!r} counts from the base's own rows, and a base of {there} rows"
        do = f"grow it (model.resize_token_embeddings({size})), save_pretrained it, and give that; or {_MERGE}"
        raise AdapterError(found, expected, do)


def with_tokens(model: nn.Module, name: str, plain: Iterable[LowRankChange]) -> tuple[LowRankChange, ...]:
    """The low-rank changes of the adapter ``name``, which is on its base: ``plain``, as its folder holds them, and for
    each weight of which tokens are trained one of all that changes there. ``AdapterError``: DoRA of such a weight."""
    made = {change.weight: change for change in _whole_changes(model, name)}
    return (*(change for change in plain if change.weight not in made), *made.values())


@torch.no_grad()
def _whole_changes(model: nn.Module, name: str) -> Iterator[LowRankChange]:
    names = Names(model)
    by_identity: Mapping = holders(names)
    for path, module, weight, change in changes(model, name):
        if change.tokens is None:
            continue
        low, gain = change.exactly(weight_of(module, weight))
        if gain is not None:
            found = f"trained tokens of {parameter_path(path, weight)!r}, which DoRA rescales"
            raise AdapterError(found, "a product alone", _MERGE)
        A, B = low.A[0].float(), (low.B[0] * low.scale).float()  # [r + n, in], [out, r + n]
        for at, own in holders_of(names, (path, weight), by_identity):
            turned = kind_for(names.modules[at], own).out_axis
            a, b = (A, B) if turned == change.layer.out_axis else (B.mT, A.mT)  # a tied weight, the other way round
            layer = layer_of(at, a.contiguous(), b.contiguous(), None, suffixes=EMBEDDING if turned else PAIR)
            yield LowRankChange(parameter_path(at, own), layer, "embedding" if turned else "linear")
