"""Find the runs, sessions and checkpoints in the store that an API key may use.

The ``Refusal`` for an id that belongs to another key is the same as for an unknown id, so that a
client cannot find out which ids exist.
"""

from __future__ import annotations

from typing import Any

from veneer.errors import DataError
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.training.store import Checkpoint, parse_checkpoint_path
from veneer.serve.training.training_service import Training


def not_found(resource: str, id: str) -> Refusal:
    """The refusal for an id that is unknown or belongs to another API key. ``resource``: what the
    id identifies, for the text, such as "the training run"."""
    return Refusal(
        404,
        f"{resource} {id[:200]!r}",
        "one of yours that is there",
        "list yours",
        code="not_found",
    )


def owns(key: Key, row: Any) -> bool:
    """Whether a database row with a column "owner" exists (is not None) and belongs to the key."""
    return row is not None and row["owner"] == key.owner


def require_owner(key: Key, row: Any, resource: str, id: str) -> Any:
    """Return a database row of the store if it belongs to the key. ``Refusal``: it belongs to
    another key, or is None. ``resource`` and ``id`` name what was not found in the refusal's
    text."""
    if not owns(key, row):
        raise not_found(resource, id)
    return row


def find_run(training: Training, key: Key, run_id: str) -> Any:
    """The database row of a run in the store. ``Refusal``: the key has no such run."""
    return require_owner(key, training.store.run(run_id), "the training run", run_id)


def find_session(training: Training, key: Key, session_id: str) -> Any:
    """The database row of a session in the store. ``Refusal``: the key has no such session."""
    return require_owner(key, training.store.session(session_id), "the session", session_id)


def find_sampler(training: Training, key: Key, sampler_id: str) -> Any:
    """The database row of a sampling session in the store. ``Refusal``: the key has no such
    sampling session."""
    return require_owner(
        key, training.store.sampler(sampler_id), "the sampling session", sampler_id
    )


def find_checkpoint(training: Training, key: Key, checkpoint_path: str) -> tuple[Checkpoint, Any]:
    """The checkpoint of a path tinker://RUN/KIND/NAME, and its database row in the store.
    ``Refusal``: the path has another form, or the key may not read the checkpoint, because it does
    not exist, or belongs to another key and is not published."""
    try:
        checkpoint = parse_checkpoint_path(checkpoint_path)
    except DataError as error:
        raise Refusal(400, str(error)) from error
    checkpoint_row = training.store.checkpoint(checkpoint)
    if checkpoint_row is None or not (checkpoint_row["public"] or owns(key, checkpoint_row)):
        raise not_found("the checkpoint", checkpoint_path)
    return checkpoint, checkpoint_row
