"""Requests of a run are queued by their numbers, and a refused one is the answer to its number.

    body → valid, within the quota → the run's queue
         → refused                 → the run's queue, as a request that fails with the words of the refusal

A client numbers the requests of a run, and they are computed in that order: a number that is left
out stops all later ones. So a refusal of a request whose run and number can be read takes that
number. A refusal of anything else, and of what the client may repeat (a full queue, a disk without
room), is an answer of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from veneer.errors import sentence
from veneer.serve import refusal
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.service import Route, beside_loop
from veneer.serve.training.quotas import over_quota
from veneer.serve.training.training import Training, training_of
from veneer.serve.training.wire import PassHeader
from veneer.serve.training.worker import PASS, REFUSED, REFUSED_PASS

#: requests that write checkpoints
SAVES = ("save", "external", "sampler")
#: refusals that say what is wrong with a request: it would be refused again
FINAL = (400, 403, 404, 409, 413, 415, 422)


def no_such(kind: str, id: str) -> Refusal:
    """One answer to what is not there and to what is another key's."""
    message = sentence(f"{kind} {id[:200]!r}", "one of yours that is there", "list yours")
    return Refusal(404, message, code="not_found")


def owned(key: Key, row: Any) -> bool:
    return row is not None and row["owner"] == key.owner


def run_of(training: Training, key: Key, id: str) -> Any:
    row = training.store.run(id)
    if not owned(key, row):
        raise no_such("the training run", id)
    return row


def within(training: Training, key: Key, resource: str, amount: int = 1) -> None:
    """``Refusal``: so much more of "runs", "bytes" or "tokens" is past the key's quota."""
    problem = over_quota(training.store, key.owner, resource, getattr(key, resource), amount)
    if problem is not None:
        raise Refusal(403, problem, code="quota")


async def accept_request(
    training: Training, run: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    """The promise of a request, which is on the disk."""
    return await training.written(_promise, training, run, seq, kind, body)


def _promise(
    training: Training, run: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    number = training.worker.accept(run, seq, kind, content)
    return {"request_id": f"{run}:{number}", "model_id": run}


async def queue_request(
    training: Training,
    key: Key,
    run: str,
    seq: int | None,
    kind: str,
    body: Mapping[str, Any] | bytes,
    header: PassHeader | None = None,
) -> dict[str, str]:
    """The promise of a request of a run that a key has; ``header``: of a pass. ``Refusal``: there
    is no such run, or it takes no more."""
    row = run_of(training, key, run)
    training.seen(row["session"])
    if row["unloaded"] and training.worker.promise(run, -1 if seq is None else seq) is None:
        problem = f"the run {run}, which was unloaded or did not begin"
        raise Refusal(410, problem, "one that goes on", "create one, perhaps from a checkpoint")
    if kind in SAVES and key.bytes is not None and not isinstance(body, bytes):
        body = {**body, "most_bytes": key.bytes}  # its size is known when it is written
    if header is None or not key.owner:
        return await accept_request(training, run, seq, kind, body)
    return await training.written(_accept_pass, training, key, header, body)


def _accept_pass(training: Training, key: Key, header: PassHeader, body: bytes) -> dict[str, str]:
    """The promise of a pass whose tokens count from now on; of one that would be past the quota, a
    failure."""
    if (
        header.seq and training.worker.promise(header.run, header.seq) is not None
    ):  # it is sent again
        return _promise(training, header.run, header.seq, PASS, body)
    problem = over_quota(training.store, key.owner, "tokens", key.tokens, header.tokens)
    if problem is not None:
        kind = REFUSED_PASS if header.backward else REFUSED
        return _promise(training, header.run, header.seq or None, kind, {"error": problem})
    promised = _promise(training, header.run, header.seq or None, PASS, body)
    training.store.count_tokens(key.owner, header.tokens)
    return promised


class NumberedRoute(Route):
    """A route of requests in JSON that a run numbers."""

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        try:
            return await handle(request)
        except (RequestValidationError, HTTPException, Refusal) as error:
            service, body = request.app.state.service, await request.body()
            refused, address = _refusal_of(error), await beside_loop(service, body, _read_address)
            training = training_of(request.app.state.service)
            key: Key | None = request.state.key
            if refused.status not in FINAL or address is None or key is None or not key.train:
                raise
            run, number = address
            row = training.store.run(run)
            if row is None or not owned(key, row) or row["unloaded"]:
                raise
            return JSONResponse(
                await queue_request(training, key, run, number, REFUSED, {"error": str(refused)})
            )


def _refusal_of(error: RequestValidationError | HTTPException | Refusal) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    return refusal.of_body(error.errors(), error.body)


def _read_address(body: bytes) -> tuple[str, int] | None:
    """The run and the number of a request, also of one whose other fields are no JSON; None if it
    has none."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    run, number = (
        (fields.get("model_id"), fields.get("seq_id")) if isinstance(fields, dict) else (None, None)
    )
    if not isinstance(run, str) or not isinstance(number, int) or isinstance(number, bool):
        return None
    return (run, number) if 0 < number < 2**31 else None  # 0 is how it began
