"""Find the runs, sessions and checkpoints in the store that an API key may use.

A ``Refusal`` is the same for an unknown id and for an id that belongs to another key, so a client
cannot find out which ids exist.
"""

from __future__ import annotations

from typing import Any

from veneer.errors import DataError
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.training.store import Checkpoint, parse_checkpoint_path
from veneer.serve.training.training_service import Training


def not_found(resource: str, id: str) -> Refusal:
    """The refusal for an id that is unknown or belongs to another key."""
    return Refusal(
        404,
        f"{resource} {id[:200]!r}",
        "one of yours that is there",
        "list yours",
        code="not_found",
    )


def owns(key: Key, row: Any) -> bool:
    """Whether a row of the store exists and belongs to the key."""
    return row is not None and row["owner"] == key.owner


def require_owner(key: Key, row: Any, resource: str, id: str) -> Any:
    """The row, if it exists and belongs to the key. ``Refusal``: it does not."""
    if not owns(key, row):
        raise not_found(resource, id)
    return row


def find_run(training: Training, key: Key, id: str) -> Any:
    """The row of a run in the store. ``Refusal``: the key has no such run."""
    return require_owner(key, training.store.run(id), "the training run", id)


def find_session(training: Training, key: Key, id: str) -> Any:
    """The row of a session in the store. ``Refusal``: the key has no such session."""
    return require_owner(key, training.store.session(id), "the session", id)


def find_sampler(training: Training, key: Key, id: str) -> Any:
    """The row of a sampling session in the store. ``Refusal``: the key has no such sampling
    session."""
    return require_owner(key, training.store.sampler(id), "the sampling session", id)


def find_checkpoint(training: Training, key: Key, path: str) -> tuple[Checkpoint, Any]:
    """A checkpoint and its row in the store. ``Refusal``: the key may not read the checkpoint,
    because it does not exist, or belongs to another key and is not published."""
    try:
        checkpoint = parse_checkpoint_path(path)
    except DataError as error:
        raise Refusal(400, str(error)) from error
    row = training.store.checkpoint(checkpoint)
    if row is None or not (row["public"] or owns(key, row)):
        raise not_found("the checkpoint", path)
    return checkpoint, row
