"""Write trained token rows as low-rank changes, for formats that cannot store single rows.

    ΔW[ids] = R − W[ids], and 0 in all other rows; as a product: ΔW = E (R − W[ids])

W [rows, in] is the weight of an embedding or head (output layer), ids are the n trained tokens,
R [n, in] their trained rows, and E [rows, n] has a one-hot column for each of these tokens.

The product has rank n. If the same weight also has a low-rank change of rank r, the sum of both is
one product of rank n + r, and the scale of the low-rank change is multiplied into B.

An adapter folder stores R, which can replace the rows of every base with a vocabulary of this size.
ΔW is relative to the rows W[ids] of one base. So the conversion needs this base, with the new rows
of its vocabulary already added, and the result is right for this base alone.

If the head of the trained model is tied to its input embedding, the adapter changes both. If the
base of the conversion stores the head as a second, equal weight (as a GGUF file with
``output.weight`` does), both weights get the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from veneer.adapter_files.base_proof import fingerprints_of
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.saved_token_rows import vocabulary_size
from veneer.attach import ModelIndex, changes
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

_MERGE_HINT = "merge the adapter (`veneer merge`) and take the merged model"


def require_token_rows(saved_adapter: AdapterFiles, target_format: str, facts: BaseFacts) -> None:
    """``AdapterError`` if the adapter has trained tokens, and the base is missing or lacks rows for
    them."""
    if not saved_adapter.tokens:
        return
    rows_text = listing(
        f"{len(tokens.ids)} of {path!r}" for path, tokens in saved_adapter.tokens.items()
    )
    vocabulary_rows = vocabulary_size(saved_adapter)
    adapter_description = f"{saved_adapter.path} with trained tokens ({rows_text})"
    expected = f"the base with all {vocabulary_rows} rows of its vocabulary"
    if not facts.shapes:
        raise AdapterError(
            f"{adapter_description}, and no base, from whose rows {target_format!r} stores the"
            " differences",
            expected,
            f"give the base, or {_MERGE_HINT}",
        )
    base_row_count = min(
        facts.shapes.get(parameter_path(path, "weight"), (vocabulary_rows,))[0]
        for path in saved_adapter.tokens
    )
    if base_row_count < vocabulary_rows:
        raise AdapterError(
            f"{adapter_description}, whose changes {target_format!r} counts from the base's own"
            f" rows, and a base of {base_row_count} rows",
            expected,
            f"grow it (model.resize_token_embeddings({vocabulary_rows})), save_pretrained it, and"
            f" give that; or {_MERGE_HINT}",
        )


def replace_token_changes(
    model: nn.Module,
    adapter_name: str,
    saved_adapter: AdapterFiles,
    folder_changes: Iterable[LowRankChange],
) -> tuple[LowRankChange, ...]:
    """All changes of an adapter as low-rank changes, the trained token rows included. A weight with
    trained tokens has one change, the sum of its token rows' change and of its low-rank change,
    listed under every name of the weight. Other weights keep their change of ``folder_changes``.

    Args:
        model: the base, with the adapter installed under ``adapter_name``.
        saved_adapter: the content of the adapter's folder.
        folder_changes: the low-rank changes in this folder.

    Raises:
        AdapterError: DoRA rescales a weight with trained tokens, or the base's head differs from
            its embedding although they were tied in training.
    """
    token_changes = {
        change.weight: change for change in _token_changes(model, adapter_name, saved_adapter)
    }
    return (
        *(change for change in folder_changes if change.weight not in token_changes),
        *token_changes.values(),
    )


@torch.no_grad()
def _token_changes(
    model: nn.Module, adapter_name: str, saved_adapter: AdapterFiles
) -> Iterator[LowRankChange]:
    """The change of each weight with trained tokens as one low-rank change, repeated under every
    name of the weight."""
    model_index = ModelIndex(model)
    refs_by_id, split_head_refs = (
        model_index.refs_by_parameter_id(),
        split_head(model_index, saved_adapter),
    )
    for path, module, weight_name, change in changes(model, adapter_name):
        if change.tokens is None:
            continue
        low_rank, gain = change.resolve_float64(weight_of(module, weight_name))
        if gain is not None:
            raise AdapterError(
                f"trained tokens of {parameter_path(path, weight_name)!r}, which DoRA rescales",
                "a product alone",
                _MERGE_HINT,
            )
        # A is [r + n, in] and B [out, r + n]: n trained tokens, and a low-rank change of rank r
        A, B = low_rank.A[0].float(), (low_rank.B[0] * low_rank.scale).float()
        holder_refs = model_index.holders_of((path, weight_name), refs_by_id)
        for holder_path, holder_weight in dict.fromkeys(
            [
                *holder_refs,
                *(
                    split_head_refs
                    if split_head_refs is not None and split_head_refs[0] in holder_refs
                    else ()
                ),
            ]
        ):
            is_embedding = kind_for(model_index.modules[holder_path], holder_weight).out_axis
            # for a tied weight, a layer that uses it transposed needs the transposed product
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


def split_head(
    model_index: ModelIndex, saved_adapter: AdapterFiles
) -> tuple[ParamRef, ParamRef] | None:
    """(the input embedding's weight, the head's) if this base stores them as two equal weights, and
    they were one tied weight in the base that the adapter was trained on; None otherwise. They were
    tied if the adapter's record, which lists every weight of that base, does not list the head.

    Raises:
        AdapterError: the two weights differ.
    """
    model: Any = model_index.model
    embedding_modules: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    path_by_id = {id(module): path for path, module in model_index.modules.items()}
    base_record = saved_adapter.metadata.get("base") or {}
    if not base_record.get("rest") or any(
        id(module) not in path_by_id for module in embedding_modules
    ):
        return None
    (embedding_path, embedding_weight), (head_path, head_weight) = (
        (path_by_id[id(module)], weight_of(module, "weight")) for module in embedding_modules
    )
    recorded_names = {*base_record["weights"], *base_record["rest"], *base_record.get("fresh", ())}
    if (
        embedding_path not in saved_adapter.tokens
        or embedding_weight is head_weight
        or parameter_path(head_path, "weight") in recorded_names
        or head_path in saved_adapter.full
    ):
        return None
    if not torch.equal(
        *(cast(Any, storage_of(weight)).dense(weight) for weight in (embedding_weight, head_weight))
    ):
        raise AdapterError(
            f"trained tokens of {embedding_path!r}, then the head too, and a base whose"
            f" {head_path!r} has other numbers",
            "a copy of the embedding",
            f"give the base that it was trained on, or {_MERGE_HINT}",
        )
    return (embedding_path, "weight"), (head_path, "weight")


def token_fingerprints(model_index: ModelIndex, saved_adapter: AdapterFiles) -> dict[str, str]:
    """The fingerprints (hashes) of the base's weights that have trained tokens, by path. They cover
    all rows. The fingerprints in the adapter's record leave out the rows of the trained tokens, but
    the converted changes depend on the base's values of these rows."""
    base_record = saved_adapter.metadata.get("base") or {}
    weight_paths = [
        weight_path
        for token_path in saved_adapter.tokens
        if (weight_path := parameter_path(token_path, "weight")) in base_record.get("weights", ())
    ]
    weight_by_name = {
        name: weight
        for weight in list_weights(model_index)
        if weight.is_readable
        for name in weight.names
    }
    return dict(
        zip(
            weight_paths,
            fingerprints_of(
                [weight_by_name[weight_path] for weight_path in weight_paths],
                hash_kind=recorded_hash_kind(base_record),
            ),
            strict=True,
        )
    )
