"""Queue the numbered requests of runs, including refused requests.

A run is one LoRA adapter that a client trains.

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

from veneer.errors import VeneerError
from veneer.serve import refusal
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.service import Route, beside_loop
from veneer.serve.training.lookups import find_run, owns
from veneer.serve.training.quotas import quota_problem
from veneer.serve.training.training_service import Training, training_of
from veneer.serve.training.wire import PassHeader
from veneer.serve.training.worker import PASS, REFUSED, REFUSED_PASS

#: kinds of requests that write checkpoints, whose sizes count towards a key's quota of bytes
SAVE_KINDS = ("save", "external", "sampler")
#: status codes of refusals that the same request would get again. Such a refusal is queued as the
#: answer; after any other refusal, the client may try again.
FINAL_STATUSES = (400, 403, 404, 409, 413, 415, 422)


def write_and_queue(
    training: Training, run_id: str, seq: int | None, kind: str, body: Mapping[str, Any] | bytes
) -> dict[str, str]:
    """Write a request to the store and queue it for the training thread; return the ids with which
    the client asks for its answer. Call this in the thread that writes to the store
    (``Training.write``), because it waits for the disk.

    Args:
        seq: the request's number in the run; None: the number after all others.
        kind: the kind of request, such as "step" or "save".
        body: the fields of the request, or protobuf.

    Raises:
        Busy: too many requests of the run wait.
    """
    body_bytes = body if isinstance(body, bytes) else json.dumps(body).encode()
    assigned_seq = training.worker.queue.accept(run_id, seq, kind, body_bytes)
    return {"request_id": f"{run_id}:{assigned_seq}", "model_id": run_id}


async def queue_request(
    training: Training,
    key: Key,
    run_id: str,
    seq: int | None,
    kind: str,
    body: Mapping[str, Any] | bytes,
    header: PassHeader | None = None,
) -> dict[str, str]:
    """Accept a request of a key's run, and return the ids with which the client asks for its
    answer. Counts as a heartbeat of the run's session.

    Args:
        seq: the request's number in the run; None: the number after all others.
        kind: the kind of request, such as "step" or "save".
        body: the fields of the request, or protobuf.
        header: the header of a pass (a forward, and a backward if requested); None for other
            requests.

    Raises:
        Refusal: the key has no such run, or the run was unloaded.
        Busy: too many requests of the run wait.
    """
    run_row = find_run(training, key, run_id)
    training.record_heartbeat(run_row["session"])
    if (
        run_row["unloaded"]
        and training.worker.queue.promise(run_id, -1 if seq is None else seq) is None
    ):
        raise Refusal(
            410,
            f"the run {run_id}, which was unloaded or did not begin",
            "one that goes on",
            "create one, perhaps from a checkpoint",
        )
    if kind in SAVE_KINDS and key.bytes is not None and not isinstance(body, bytes):
        # the training thread checks this quota, since the size is known once the files are written
        body = {**body, "most_bytes": key.bytes}
    if header is None or not key.owner:
        return await training.write(write_and_queue, training, run_id, seq, kind, body)
    return await training.write(_accept_pass, training, key, header, body)


def _accept_pass(training: Training, key: Key, header: PassHeader, body: bytes) -> dict[str, str]:
    """Queue a pass (a forward, and a backward if requested), count its tokens for the key, and
    return the ids with which the client asks for its answer. A pass that would exceed the key's
    quota is queued as a request that fails, so that its number is not missing in the run. A pass
    that was accepted before is not counted again."""
    is_repeated = (
        header.seq and training.worker.queue.promise(header.run_id, header.seq) is not None
    )
    if is_repeated:
        return write_and_queue(training, header.run_id, header.seq, PASS, body)
    problem_text = quota_problem(
        training.store, key.owner, "tokens", key.tokens, header.token_count
    )
    if problem_text is not None:
        refused_kind = REFUSED_PASS if header.backward else REFUSED
        return write_and_queue(
            training, header.run_id, header.seq or None, refused_kind, {"error": problem_text}
        )
    request_ids = write_and_queue(training, header.run_id, header.seq or None, PASS, body)
    training.store.count_tokens(key.owner, header.token_count)
    return request_ids


class NumberedRoute(Route):
    """A route for numbered requests of runs, with JSON bodies. A refused request is queued as a
    request that fails, so that its number is not missing and later requests are computed."""

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        try:
            return await handle(request)
        except (RequestValidationError, HTTPException, VeneerError) as error:
            service, body = request.app.state.service, await request.body()
            error_refusal = _refusal_of(error)
            run_id_and_seq = await beside_loop(service, body, _read_run_id_and_seq)
            training = training_of(request.app.state.service)
            key: Key | None = request.state.key
            is_final = error_refusal.status in FINAL_STATUSES
            if not is_final or run_id_and_seq is None or key is None or not key.train:
                raise
            run_id, seq = run_id_and_seq
            run_row = training.store.run(run_id)
            if run_row is None or not owns(key, run_row) or run_row["unloaded"]:
                raise
            return JSONResponse(
                await queue_request(
                    training, key, run_id, seq, REFUSED, {"error": str(error_refusal)}
                )
            )


def _refusal_of(error: RequestValidationError | HTTPException | VeneerError) -> Refusal:
    if isinstance(error, VeneerError):
        return refusal.error_refusal(error)
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    return refusal.body_refusal(error.errors(), error.body)


def _read_run_id_and_seq(body: bytes) -> tuple[str, int] | None:
    """The run id and the number of a request whose other fields may be invalid; None if one of the
    two is missing or invalid."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    run_id, seq = (
        (fields.get("model_id"), fields.get("seq_id")) if isinstance(fields, dict) else (None, None)
    )
    # Each run id is ASCII. Other text is rejected here, because ``json`` accepts lone surrogates,
    # and SQLite raises an error for them.
    if (
        isinstance(run_id, str)
        and run_id.isascii()
        and isinstance(seq, int)
        and not isinstance(seq, bool)
        and 0 < seq < 2**31  # the server assigns 0 itself
    ):
        return run_id, seq
    return None
