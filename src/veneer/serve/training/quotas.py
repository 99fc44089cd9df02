"""Quotas of a key: runs that take requests, bytes of checkpoints, tokens per day.

Tokens are counted when a pass is accepted, and the bytes of a checkpoint are checked before its
files are moved into place, so no request exceeds a quota."""

from __future__ import annotations

from veneer.errors import sentence
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.training.store import Checkpoint, Store

_ADVICE = {"runs": "unload one", "bytes": "delete checkpoints", "tokens": "go on tomorrow (UTC)"}


def quota_problem(
    store: Store,
    owner: str,
    resource: str,
    limit: int | None,
    amount: int = 1,
    *,
    replaced: Checkpoint | None = None,
) -> str | None:
    """The error text if ``amount`` more of a resource ("runs", "bytes" or "tokens") would exceed
    the ``limit`` of the key ``owner``, else None. ``replaced``: a checkpoint whose bytes are not
    counted, because it will be overwritten."""
    if limit is None:
        return None
    match resource:
        case "runs":
            used = store.count_runs(owner)
        case "bytes":
            used = store.checkpoint_bytes(owner, excluded=replaced)
        case _:
            used = store.tokens_today(owner)
    if used + amount <= limit:
        return None
    problem = f"{used:,} {resource} of key {owner!r} and {amount:,} more"
    return sentence(problem, f"at most {limit:,}", f"{_ADVICE[resource]}, or ask for more")


def check_quota(store: Store, key: Key, resource: str, amount: int = 1) -> None:
    """Check a quota. ``Refusal``: ``amount`` more of a resource ("runs", "bytes" or "tokens") would
    exceed the key's quota."""
    problem = quota_problem(store, key.owner, resource, getattr(key, resource), amount)
    if problem is not None:
        raise Refusal(403, problem, code="quota")
