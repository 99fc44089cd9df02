"""Take a merged adapter out of the weights of a live model again, to the very bits."""

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

    An interrupted call (Ctrl-C, memory) is finished by the next one. Adapters that were attached
    while this one was merged stay, and calls with them are refused until it is merged again.

    Args:
        name: the adapter; None takes the last one merged.

    Raises:
        MergeError: nothing is merged; another adapter was merged on top of this one; the old
            weights were not kept; or a merged weight was edited since, so that restoring would
            lose the edit. No weight was changed.
    """
    model = unwrap(model)
    attached = need_adapters(model)
    if attached.merged is None:
        raise MergeError(
            "a model in which nothing is merged", "a merged adapter", "call veneer.merge first"
        )
    last = attached.chain[-1]
    if name is not None and name != last:
        relation = "which lies on top of it" if name in attached.chain else "and not that"
        problem = f"unmerge of {name!r} while {last!r} is merged, {relation}"
        raise MergeError(problem, "the last one merged", f"unmerge {last!r} first")
    require_unsharded(model, "an unmerge")
    weights = list(stored_weights(model, last))
    backed_up = list(filter(has_backup, weights))
    # after a merge that was cut off, weights without a backup are as they were
    if len(backed_up) < len(weights) and not attached.merging:
        problem = f"{last!r}, merged with keep=False"
        raise MergeError(problem, "the weights from before the merge", "load the base again")
    restore(_require_unedited(backed_up))
    attached.set_chain(attached.chain[:-1])  # the backups have no meaning from here on
    drop_backups(weights)
    attached.merging = False


def _require_unedited(weights: Iterable[StoredWeight]) -> list[StoredWeight]:
    """The weights to restore; a MergeError if one of them was edited since the merge."""
    merged, edited = [], []
    for weight in weights:
        digests = digest_tensors(weight.stored_tensors())
        merged_digests = weight.keeper.__dict__.get("digests", {}).get(weight.name)
        if merged_digests is None or digests == merged_digests:
            merged.append(weight)
        elif digests != (old_digests := digest_tensors(backup_of(weight))):
            # an interrupted unmerge may have restored some of the stored tensors
            half_restored = all(
                digests[key] in (old_digests.get(key), merged_digests.get(key)) for key in digests
            )
            (merged if half_restored else edited).append(weight)
    if edited:
        problem = (
            "weights edited since the merge (also by .to(dtype)):"
            f" {listing(weight.full_path for weight in edited)}"
        )
        do = "undo the edit, or detach(model, keep_merged=True) to keep it"
        raise MergeError(problem, "the merged weights", do)
    return merged


def require_unsharded(model: nn.Module, action: str) -> None:
    """Raise a MergeError if the weights are spread over processes."""
    do = (
        "save the adapter, and merge it in one process, before the model is sharded or with `veneer"
        " merge`"
    )
    if problem := spread_problem((module for _, module in walk(model)), action, do):
        raise MergeError(problem)
