"""Quotas of an API key: runs that take requests, bytes of checkpoints, tokens per day (UTC).

The tokens of a training request are counted when it is accepted, the tokens of samples are reserved
before they are generated, and the bytes of a checkpoint are checked before its files are moved into
place. Therefore no request exceeds a quota."""

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
    the ``limit`` of the API key named ``owner``, else None. A ``limit`` of None is never exceeded.
    ``replaced``: a checkpoint whose bytes are not counted, because it will be overwritten."""
    if limit is None:
        return None
    match resource:
        case "runs":
            used_amount = store.count_runs(owner)
        case "bytes":
            used_amount = store.checkpoint_bytes(owner, excluded=replaced)
        case _:
            used_amount = store.tokens_today(owner)
    if used_amount + amount <= limit:
        return None
    problem_text = f"{used_amount:,} {resource} of key {owner!r} and {amount:,} more"
    return sentence(problem_text, f"at most {limit:,}", f"{_ADVICE[resource]}, or ask for more")


def check_quota(store: Store, key: Key, resource: str, amount: int = 1) -> None:
    """Check a quota, and count nothing. ``Refusal`` (403): ``amount`` more of a resource ("runs",
    "bytes" or "tokens") would exceed the key's quota."""
    problem_text = quota_problem(store, key.owner, resource, getattr(key, resource), amount)
    if problem_text is not None:
        raise Refusal(403, problem_text, code="quota")
