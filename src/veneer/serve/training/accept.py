"""Queue the numbered requests of runs, including refused ones.

    body → valid, within the quota → the run's queue
         → refused                 → the run's queue, as a request that fails with that text

A client numbers the requests of a run, and they are computed in that order: a missing number would
stop all later requests. A refused request is therefore queued under its number if its run and
number can be read. Refusals of other requests, and refusals after which the client may try again (a
full queue, a full disk), are HTTP errors.
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
from veneer.serve.training.training_service import Training, training_of
from veneer.serve.training.wire import PassHeader
from veneer.serve.training.worker import PASS, REFUSED, REFUSED_PASS

#: requests that write checkpoints
SAVES = ("save", "external", "sampler")
#: status codes of refusals that depend on the request alone: it would be refused again
FINAL = (400, 403, 404, 409, 413, 415, 422)


def no_such(kind: str, id: str) -> Refusal:
    """The same refusal for an unknown id and for one that belongs to another key."""
    message = sentence(f"{kind} {id[:200]!r}", "one of yours that is there", "list yours")
    return Refusal(404, message, code="not_found")


def owns(key: Key, row: Any) -> bool:
    return row is not None and row["owner"] == key.owner


def run_of(training: Training, key: Key, id: str) -> Any:
    row = training.store.run(id)
    if not owns(key, row):
        raise no_such("the training run", id)
    return row


def check_quota(training: Training, key: Key, resource: str, amount: int = 1) -> None:
    """``Refusal``: ``amount`` more of "runs", "bytes" or "tokens" would exceed the key's quota."""
    problem = over_quota(training.store, key.owner, resource, getattr(key, resource), amount)
    if problem is not None:
        raise Refusal(403, problem, code="quota")


async def accept_request(
    training: Training, run: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    """Write a request to the store, and return the ids by which the client asks for its answer."""
    return await training.write(_promise, training, run, seq, kind, body)


def _promise(
    training: Training, run: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    number = training.worker.queue.accept(run, seq, kind, content)
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
    """Accept a request of a key's run. ``header``: given for passes. ``Refusal``: the key has no
    such run, or the run was unloaded."""
    row = run_of(training, key, run)
    training.record_heartbeat(row["session"])
    if row["unloaded"] and training.worker.queue.promise(run, -1 if seq is None else seq) is None:
        problem = f"the run {run}, which was unloaded or did not begin"
        raise Refusal(410, problem, "one that goes on", "create one, perhaps from a checkpoint")
    if kind in SAVES and key.bytes is not None and not isinstance(body, bytes):
        body = {**body, "most_bytes": key.bytes}  # checked when the checkpoint is written
    if header is None or not key.owner:
        return await accept_request(training, run, seq, kind, body)
    return await training.write(_accept_pass, training, key, header, body)


def _accept_pass(training: Training, key: Key, header: PassHeader, body: bytes) -> dict[str, str]:
    """Accept a pass and count its tokens. A pass that would exceed the quota is queued as a request
    that fails."""
    is_repeated = header.seq and training.worker.queue.promise(header.run, header.seq) is not None
    if is_repeated:
        return _promise(training, header.run, header.seq, PASS, body)
    problem = over_quota(training.store, key.owner, "tokens", key.tokens, header.tokens)
    if problem is not None:
        kind = REFUSED_PASS if header.backward else REFUSED
        return _promise(training, header.run, header.seq or None, kind, {"error": problem})
    promise = _promise(training, header.run, header.seq or None, PASS, body)
    training.store.count_tokens(key.owner, header.tokens)
    return promise


class NumberedRoute(Route):
    """A route for numbered requests of runs, with JSON bodies."""

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        try:
            return await handle(request)
        except (RequestValidationError, HTTPException, Refusal) as error:
            service, body = request.app.state.service, await request.body()
            denial, address = _refusal_of(error), await beside_loop(service, body, _read_address)
            training = training_of(request.app.state.service)
            key: Key | None = request.state.key
            if denial.status not in FINAL or address is None or key is None or not key.train:
                raise
            run, number = address
            row = training.store.run(run)
            if row is None or not owns(key, row) or row["unloaded"]:
                raise
            return JSONResponse(
                await queue_request(training, key, run, number, REFUSED, {"error": str(denial)})
            )


def _refusal_of(error: RequestValidationError | HTTPException | Refusal) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    return refusal.body_refusal(error.errors(), error.body)


def _read_address(body: bytes) -> tuple[str, int] | None:
    """The run and the number of a request whose other fields may be invalid; None if it has
    none."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    run, number = (
        (fields.get("model_id"), fields.get("seq_id")) if isinstance(fields, dict) else (None, None)
    )
    if not isinstance(run, str) or not isinstance(number, int) or isinstance(number, bool):
        return None
    return (run, number) if 0 < number < 2**31 else None  # number 0 creates the run
