"""Quotas of a key: adapters in training, bytes of checkpoints, tokens a day. What a request
takes is counted with it, so none goes past a limit: tokens when a pass is accepted, bytes before a
checkpoint is published."""

from __future__ import annotations

from veneer.errors import sentence
from veneer.serve.training.store import Place, Store

_ADVICE = {"runs": "unload one", "bytes": "delete checkpoints", "tokens": "go on tomorrow (UTC)"}


def over_quota(
    store: Store,
    owner: str,
    resource: str,
    limit: int | None,
    amount: int = 1,
    *,
    replaced: Place | None = None,
) -> str | None:
    """Why the key of an owner may not have so much more of "runs", "bytes" or "tokens"; None where
    it may. ``replaced``: a checkpoint whose bytes do not count, as others take their place."""
    if limit is None:
        return None
    match resource:
        case "runs":
            used = store.runs_of(owner)
        case "bytes":
            used = store.bytes_of(owner, but=replaced)
        case _:
            used = store.tokens_of(owner)
    if used + amount <= limit:
        return None
    problem = f"{used:,} {resource} of key {owner!r} and {amount:,} more"
    return sentence(problem, f"at most {limit:,}", f"{_ADVICE[resource]}, or ask for more")
