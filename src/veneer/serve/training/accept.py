"""Queue the numbered requests of runs, including refused requests.

    body → valid, within the quota → the run's waiting requests
         → refused                 → the run's waiting requests, as a request that fails with the
                                     text of the refusal

A client numbers the requests of a run, and the server computes them in this order, so a missing
number would stop all later requests. A refused request is therefore queued under its number, if its
run and its number can be read. Refusals of other requests, and refusals after which the client may
try again (a full queue, a full disk), are HTTP errors.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from veneer.serve import refusal
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.service import Route, beside_loop
from veneer.serve.training.lookups import find_run, owns
from veneer.serve.training.quotas import quota_problem
from veneer.serve.training.training_service import Training, training_of
from veneer.serve.training.wire import PassHeader
from veneer.serve.training.worker import PASS, REFUSED, REFUSED_PASS

#: kinds of requests that write checkpoints, which count towards a key's quota of bytes
SAVE_KINDS = ("save", "external", "sampler")
#: status codes of refusals that would be repeated if the client sent the same request again
FINAL_STATUSES = (400, 403, 404, 409, 413, 415, 422)


def queue_in_store(
    training: Training, run: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    """Write a request to the store, and return the ids with which the client asks for its answer.
    ``seq``: the request's number in the run; None: the number after all others. Called in the
    thread that writes to the store's index (``Training.write``)."""
    body_bytes = body if isinstance(body, bytes) else json.dumps(body).encode()
    number = training.worker.queue.accept(run, seq, kind, body_bytes)
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
    """Accept a request of a key's run, and return the ids with which the client asks for its
    answer. ``seq``: the request's number in the run, or None; ``header``: the header of a pass, or
    None for other requests. ``Refusal``: the key has no such run, or the run was unloaded."""
    row = find_run(training, key, run)
    training.record_heartbeat(row["session"])
    if row["unloaded"] and training.worker.queue.promise(run, -1 if seq is None else seq) is None:
        raise Refusal(
            410,
            f"the run {run}, which was unloaded or did not begin",
            "one that goes on",
            "create one, perhaps from a checkpoint",
        )
    if kind in SAVE_KINDS and key.bytes is not None and not isinstance(body, bytes):
        body = {**body, "most_bytes": key.bytes}  # checked when the checkpoint is written
    if header is None or not key.owner:
        return await training.write(queue_in_store, training, run, seq, kind, body)
    return await training.write(_accept_pass, training, key, header, body)


def _accept_pass(training: Training, key: Key, header: PassHeader, body: bytes) -> dict[str, str]:
    """Accept a pass and count its tokens. A pass that would exceed the quota is queued as a request
    that fails."""
    is_repeated = header.seq and training.worker.queue.promise(header.run, header.seq) is not None
    if is_repeated:
        return queue_in_store(training, header.run, header.seq, PASS, body)
    problem = quota_problem(training.store, key.owner, "tokens", key.tokens, header.tokens)
    if problem is not None:
        kind = REFUSED_PASS if header.backward else REFUSED
        return queue_in_store(training, header.run, header.seq or None, kind, {"error": problem})
    request_ids = queue_in_store(training, header.run, header.seq or None, PASS, body)
    training.store.count_tokens(key.owner, header.tokens)
    return request_ids


class NumberedRoute(Route):
    """A route for numbered requests of runs, with JSON bodies. A refused request is queued, so that
    its number is not missing."""

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        try:
            return await handle(request)
        except (RequestValidationError, HTTPException, Refusal) as error:
            service, body = request.app.state.service, await request.body()
            error_refusal = _refusal_of(error)
            run_and_number = await beside_loop(service, body, _read_run_and_number)
            training = training_of(request.app.state.service)
            key: Key | None = request.state.key
            is_final = error_refusal.status in FINAL_STATUSES
            if not is_final or run_and_number is None or key is None or not key.train:
                raise
            run, number = run_and_number
            row = training.store.run(run)
            if row is None or not owns(key, row) or row["unloaded"]:
                raise
            return JSONResponse(
                await queue_request(
                    training, key, run, number, REFUSED, {"error": str(error_refusal)}
                )
            )


def _refusal_of(error: RequestValidationError | HTTPException | Refusal) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    return refusal.body_refusal(error.errors(), error.body)


def _read_run_and_number(body: bytes) -> tuple[str, int] | None:
    """The run id and the number of a request whose other fields may be invalid; None if one of the
    two is missing or invalid."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    run, number = (
        (fields.get("model_id"), fields.get("seq_id")) if isinstance(fields, dict) else (None, None)
    )
    # an id is ASCII; a lone surrogate, which ``json`` accepts, cannot be looked up in SQLite
    if not isinstance(run, str) or not run.isascii():
        return None
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return (run, number) if 0 < number < 2**31 else None  # number 0 creates the run
