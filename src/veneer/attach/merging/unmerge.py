"""Restore the weights of a live model, bit for bit, to their values before a merge."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from veneer.attach.layer.adapted_module import walk
from veneer.attach.layer.lookup import need_adapters, unwrap
from veneer.attach.layer.state import one_thread_at_a_time
from veneer.attach.merging.stored_weights import (
    StoredWeight,
    backup_of,
    digest_tensors,
    drop_backups,
    has_backup,
    restore,
    stored_weights,
)
from veneer.distributed import spread_problem
from veneer.errors import MergeError, listing


@one_thread_at_a_time
def unmerge(model: nn.Module, name: str | None = None) -> None:
    """Restore the bits that the weights had before the last ``merge``.

    If ``unmerge`` is interrupted (Ctrl-C, out of memory), the next ``unmerge`` finishes the work.
    Adapters that were attached while the unmerged adapter was merged stay attached, but calls of
    the model with them raise an error until that adapter is merged again.

    Args:
        name: the merged adapter; None stands for the last one that was merged.

    Raises:
        MergeError: nothing is merged; another adapter was merged on top of this one; the old
            weights were not kept; a merged weight was edited since, so that restoring would lose
            the edit; or the weights are spread over processes. No weight was changed.
    """
    model = unwrap(model)
    model_adapters = need_adapters(model)
    if model_adapters.merged is None:
        raise MergeError(
            "a model in which nothing is merged", "a merged adapter", "call veneer.merge first"
        )
    last_name = model_adapters.merge_order[-1]
    if name is not None and name != last_name:
        relation = (
            "which lies on top of it" if name in model_adapters.merge_order else "and not that"
        )
        raise MergeError(
            f"unmerge of {name!r} while {last_name!r} is merged, {relation}",
            "the last one merged",
            f"unmerge {last_name!r} first",
        )
    require_unsharded(model, "an unmerge")
    weights = list(stored_weights(model, last_name))
    backed_up_weights = list(filter(has_backup, weights))
    # Each weight must have a backup, except after an interrupted merge: it did not reach the
    # weights without a backup, so they still have their old bits.
    if len(backed_up_weights) < len(weights) and not model_adapters.is_merging:
        raise MergeError(
            f"{last_name!r}, merged with keep=False",
            "the weights from before the merge",
            "load the base again",
        )
    restore(_require_unedited(backed_up_weights))
    # All weights are restored, so the backups are no longer needed. If this call is interrupted
    # from here on, it does no harm that some backups are lost.
    model_adapters.set_merge_order(model_adapters.merge_order[:-1])
    drop_backups(weights)
    model_adapters.is_merging = False


def _require_unedited(weights: Iterable[StoredWeight]) -> list[StoredWeight]:
    """``weights`` without those that have their old bits already, because an interrupted unmerge
    has restored them. Raises a MergeError if one of ``weights`` was edited since the merge, which
    the hashes of its stored tensors show."""
    unedited_weights, edited_weights = [], []
    for weight in weights:
        present_digests = digest_tensors(weight.stored_tensors())
        merged_digests = weight.keeper.__dict__.get("digests", {}).get(weight.name)
        if merged_digests is None or present_digests == merged_digests:
            unedited_weights.append(weight)
        elif present_digests != (old_digests := digest_tensors(backup_of(weight))):
            # The weight has neither the merged nor the old bits. If each of its stored tensors has
            # one or the other, an interrupted unmerge restored some of them: that is no edit.
            is_half_restored = all(
                present_digests[key] in (old_digests.get(key), merged_digests.get(key))
                for key in present_digests
            )
            (unedited_weights if is_half_restored else edited_weights).append(weight)
    if edited_weights:
        raise MergeError(
            "weights edited since the merge (also by .to(dtype)):"
            f" {listing(weight.full_path for weight in edited_weights)}",
            "the merged weights",
            "undo the edit, or detach(model, keep_merged=True) to keep it",
        )
    return unedited_weights


def require_unsharded(model: nn.Module, action: str) -> None:
    """Raise a MergeError if the weights are spread over processes. ``action`` is the beginning of
    the error text, such as "a merge"."""
    advice = (
        "save the adapter, and merge it in one process, before the model is sharded or with `veneer"
        " merge`"
    )
    if problem := spread_problem((module for _, module in walk(model)), action, advice):
        raise MergeError(problem)
