"""Trained tokens as plain low-rank changes, for formats that cannot store single rows.

    ΔW[ids] = R − W[ids], elsewhere 0       = E (R − W[ids]), E [rows, n] the tokens' one-hot
                                            columns

The product has rank n; with a low-rank change of the same weight, whose scale is multiplied into B,
it has rank n + r.

A folder stores the rows R, which are the same for every base with a vocabulary of that size. ΔW is
relative to the rows of one base, so the conversion needs that base, with its vocabulary already
grown, and the result is right for that base alone.

If the head of the trained model is tied to its input embedding, the adapter changes both. A base
that stores the same head separately (a GGUF with ``output.weight``) gets the change in both
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from veneer.adapter_files.base_proof import fingerprints_of
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.saved_token_rows import vocabulary_size
from veneer.attach import Names, changes
from veneer.bases import storage_of, weight_of
from veneer.errors import AdapterError, listing
from veneer.fileio.hashing import recorded_hash_kind
from veneer.formats._base import (
    EMBEDDING_SUFFIXES,
    LORA_SUFFIXES,
    BaseFacts,
    LowRankChange,
    build_peft_layer,
)
from veneer.layers import ParamRef, kind_for, parameter_path
from veneer.models.base_weights import list_weights

_MERGE = "merge the adapter (`veneer merge`) and take the merged model"


def require_token_rows(saved: AdapterFiles, target_format: str, facts: BaseFacts) -> None:
    """``AdapterError`` if the adapter has trained tokens and the base is missing or lacks their
    rows."""
    if not saved.tokens:
        return
    rows, size = (
        listing(f"{len(tokens.ids)} of {path!r}" for path, tokens in saved.tokens.items()),
        vocabulary_size(saved),
    )
    adapter_description, expected = (
        f"{saved.path} with trained tokens ({rows})",
        f"the base with all {size} rows of its vocabulary",
    )
    if not facts.shapes:
        problem = (
            f"{adapter_description}, and no base, from whose rows {target_format!r} stores the"
            " differences"
        )
        raise AdapterError(problem, expected, f"give the base, or {_MERGE}")
    base_rows = min(
        facts.shapes.get(parameter_path(path, "weight"), (size,))[0] for path in saved.tokens
    )
    if base_rows < size:
        problem = (
            f"{adapter_description}, whose changes {target_format!r} counts from the base's own"
            f" rows, and a base of {base_rows} rows"
        )
        do = (
            f"grow it (model.resize_token_embeddings({size})), save_pretrained it, and give that;"
            f" or {_MERGE}"
        )
        raise AdapterError(problem, expected, do)


def replace_token_changes(
    model: nn.Module, name: str, saved: AdapterFiles, plain: Iterable[LowRankChange]
) -> tuple[LowRankChange, ...]:
    """The low-rank changes of the adapter ``name``, which was read from ``saved`` and is installed
    on ``model``: ``plain``, the changes in its folder, except that each weight with trained tokens
    gets one change with both, under every name of the weight.

    Raises:
        AdapterError: DoRA rescales a weight with trained tokens, or the base's head differs from
            its embedding although they were tied in training.
    """
    token_changes = {change.weight: change for change in _token_changes(model, name, saved)}
    return (
        *(change for change in plain if change.weight not in token_changes),
        *token_changes.values(),
    )


@torch.no_grad()
def _token_changes(model: nn.Module, name: str, saved: AdapterFiles) -> Iterator[LowRankChange]:
    names = Names(model)
    by_identity, split_refs = names.holders(), split_head(names, saved)
    for path, module, weight, change in changes(model, name):
        if change.tokens is None:
            continue
        low, gain = change.resolve_float64(weight_of(module, weight))
        if gain is not None:
            problem = f"trained tokens of {parameter_path(path, weight)!r}, which DoRA rescales"
            raise AdapterError(problem, "a product alone", _MERGE)
        A, B = low.A[0].float(), (low.B[0] * low.scale).float()  # [r + n, in], [out, r + n]
        refs = names.holders_of((path, weight), by_identity)
        for holder_path, holder_weight in dict.fromkeys(
            [*refs, *(split_refs if split_refs is not None and split_refs[0] in refs else ())]
        ):
            is_embedding = kind_for(names.modules[holder_path], holder_weight).out_axis
            # a tied weight in a layer of the other orientation: swap the factors
            layer_A, layer_B = (A, B) if is_embedding == change.layer.out_axis else (B.mT, A.mT)
            layer = build_peft_layer(
                holder_path,
                layer_A.contiguous(),
                layer_B.contiguous(),
                None,
                suffixes=EMBEDDING_SUFFIXES if is_embedding else LORA_SUFFIXES,
            )
            yield LowRankChange(
                parameter_path(holder_path, holder_weight),
                layer,
                "embedding" if is_embedding else "linear",
            )


def split_head(names: Names, saved: AdapterFiles) -> tuple[ParamRef, ParamRef] | None:
    """(the input embedding, the head) if the base stores them as two equal weights and the adapter
    was trained on a base where they were tied: its record lists every weight of that base, and no
    head. None otherwise.

    Raises:
        AdapterError: the two weights differ.
    """
    model: Any = names.model
    ends: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    path_by_id = {id(module): path for path, module in names.modules.items()}
    record = saved.metadata.get("base") or {}
    if not record.get("rest") or any(id(end) not in path_by_id for end in ends):
        return None
    (embedding, embedding_weight), (head, head_weight) = (
        (path_by_id[id(end)], weight_of(end, "weight")) for end in ends
    )
    recorded_names = {*record["weights"], *record["rest"], *record.get("fresh", ())}
    if (
        embedding not in saved.tokens
        or embedding_weight is head_weight
        or parameter_path(head, "weight") in recorded_names
        or head in saved.full
    ):
        return None
    if not torch.equal(
        *(cast(Any, storage_of(weight)).dense(weight) for weight in (embedding_weight, head_weight))
    ):
        problem = (
            f"trained tokens of {embedding!r}, then the head too, and a base whose {head!r} has"
            " other numbers"
        )
        raise AdapterError(
            problem, "a copy of the embedding", f"give the base that it was trained on, or {_MERGE}"
        )
    return (embedding, "weight"), (head, "weight")


def token_fingerprints(names: Names, saved: AdapterFiles) -> dict[str, str]:
    """Fingerprints of all rows of the weights with trained tokens, by path. (The fingerprints in
    the record leave the trained rows out.)"""
    base_record = saved.metadata.get("base") or {}
    paths = [
        weight_path
        for token_path in saved.tokens
        if (weight_path := parameter_path(token_path, "weight")) in base_record.get("weights", ())
    ]
    by_name = {
        name: tensor
        for tensor in list_weights(names)
        if tensor.is_readable
        for name in tensor.names
    }
    return dict(
        zip(
            paths,
            fingerprints_of(
                [by_name[weight_path] for weight_path in paths],
                hash_kind=recorded_hash_kind(base_record),
            ),
            strict=True,
        )
    )
