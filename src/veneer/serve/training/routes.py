"""The routes under /api/v1 by which a client of the `tinker` SDK trains and samples. Routes only.

GET  healthz  get_server_capabilities
POST client/config  client/dynamic_config  telemetry
     create_session  session_heartbeat  sessions/{id}/finish
     create_model  get_info  unload_model  forward_backward  optim_step
     save_weights  save_weights_for_sampler  save_weights_external  load_weights
     create_sampling_session  join_sampling_session  asample  cancel_future  retrieve_future

A client numbers the requests of a run (``seq_id``), and they are computed in that order. An invalid
request is answered by the failure of its promise, so that no number is missing (accept.py).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from veneer.adapter_files.folder import read
from veneer.errors import DataError, sentence
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.service import Asker, Route, Serving, beside_loop
from veneer.serve.training import bodies
from veneer.serve.training.accept import (
    NumberedRoute,
    accept_request,
    check_quota,
    no_such,
    owns,
    queue_request,
    run_of,
)
from veneer.serve.training.operations import lora_config
from veneer.serve.training.store import Checkpoint, parse_checkpoint_path
from veneer.serve.training.training_service import Training, training_of
from veneer.serve.training.wire import read_header
from veneer.serve.training.worker import PASS, Answer

#: the most seconds that ``retrieve_future`` waits for an answer
POLL = 25.0
#: the settings of clients: the size of their calls, and whether they compress them
SETTINGS = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 4_000_000,
    "sample_max_concurrent_requests": 1024,
    "sample_join_sampling_session": True,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "use_pyqwest_transport": False,
}

#: the body of a pass, for the description of the API
PASS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = APIRouter(prefix="/api/v1", route_class=Route)
#: routes for numbered requests of runs
numbered = APIRouter(prefix="/api/v1", route_class=NumberedRoute)


async def _training(service: Serving, key: Asker) -> Training:
    """The training service. ``Refusal``: the key may not train. (A key that trains can also use the
    base: an untrained run computes what the base does.)"""
    if not key.train:
        message = sentence(
            f"key {key.name!r}, which may not train", "one with train = true", "ask for another"
        )
        raise Refusal(403, message, code="training_only")
    return training_of(service)


On = Annotated[Training, Depends(_training)]


def session_of(training: Training, key: Key, id: str) -> Any:
    row = training.store.session(id)
    if not owns(key, row):
        raise no_such("the session", id)
    return row


def checkpoint_of(training: Training, key: Key, path: str) -> tuple[Checkpoint, Any]:
    """A checkpoint that a key may read, because it owns it or it is published."""
    try:
        checkpoint = parse_checkpoint_path(path)
    except DataError as error:
        raise Refusal(400, str(error)) from error
    row = (
        None
        if training.store.run(checkpoint.run) is None
        else training.store.checkpoint(checkpoint)
    )
    if row is None or not (row["public"] or owns(key, row)):
        raise no_such("the checkpoint", path)
    return checkpoint, row


def _active(training: Training, key: Key, id: str) -> Any:
    row = session_of(training, key, id)
    if row["finished"]:
        raise Refusal(
            410,
            f"a session that has finished ({row['finished']})",
            "one that goes on",
            "begin a new one",
        )
    training.record_heartbeat(id)
    return row


def _of_base(training: Training, name: str | None) -> None:
    if name is not None and name != training.base:
        problem = f"the base model {name[:200]!r}"
        raise Refusal(
            400,
            problem,
            f"{training.base!r}, which this server has",
            "name that one",
            param="base_model",
        )


def _adam(family: bodies.OptimizerFamily | None) -> None:
    if family is not None and family.type != "adamw":
        raise Refusal(
            400, f"the optimizer {family.type!r}", "adamw, which this server has", "leave it out"
        )


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.post("/client/config")
async def client_config(body: bodies.ClientConfig, training: On, key: Asker) -> dict[str, Any]:
    """How a client of this server behaves."""
    return SETTINGS


@router.post("/client/dynamic_config")
async def dynamic_config(body: bodies.ClientConfig, training: On, key: Asker) -> dict[str, Any]:
    """The same, asked for again while the client runs."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.post("/telemetry")
async def telemetry(key: Asker) -> dict[str, str]:
    """Accept telemetry of clients, and do not store it."""
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(training: On, key: Asker) -> dict[str, Any]:
    """The bases that can be trained here."""
    length = training.worker.length
    model = {
        "model_name": training.base,
        "max_context_length": length,
        "trainable": True,
        "sampleable": True,
    }
    return {"supported_models": [model]}


@router.post("/create_session")
async def create_session(body: bodies.CreateSession, training: On, key: Asker) -> dict[str, Any]:
    """Begin a session, to which runs belong."""
    session = await training.write(
        training.store.new_session, key.owner, body.user_metadata, body.display_name
    )
    training.record_heartbeat(session)
    answer = {"type": "create_session", "session_id": session}
    warnings = []
    if training.has_tied_head:
        warnings.append(
            "The base ties its output head to its embedding: train_unembed trains nothing here."
        )
    if body.project_id is not None:
        warnings.append("There are no projects here: project_id is not kept.")
    return {**answer, "warning_message": " ".join(warnings)} if warnings else answer


@router.post("/session_heartbeat")
async def heartbeat(body: bodies.OfSession, training: On, key: Asker) -> dict[str, str]:
    """Say that the client of a session is there."""
    _active(training, key, body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session}/finish")
async def finish(session: str, body: bodies.Finish, training: On, key: Asker) -> Response:
    """End a session."""
    session_of(training, key, session)
    await training.write(training.store.finish, session, body.reason.type)
    training.samples.leave(session)
    training.leave(session)
    return Response(status_code=204)


# ----------------------------------------------------------------------------------------------
# training


def _new_run(
    training: Training, key: Key, session: str, number: int, config: Any, seed: int, metadata: Any
) -> str:
    """Create a run unless it exists; return its id."""
    run = f"{session}:train:{number}"
    if training.store.is_copy(run):
        raise Refusal(
            409,
            f"{run}, which is a copy of a checkpoint",
            "a new run",
            "choose another model_seq_id",
        )
    if training.store.run(run) is None:
        check_quota(training, key, "runs")
        training.store.new_run(run, session, key.owner, config, seed, metadata)
    return run


@router.post("/create_model")
async def create_model(body: bodies.CreateModel, training: On, key: Asker) -> Any:
    """Begin a run: an adapter that is trained."""
    _active(training, key, body.session_id)
    _of_base(training, body.base_model)
    _adam(body.optimizer_config)
    lora = body.lora_config or bodies.Lora(rank=32)
    layer_kinds = {"attention": lora.train_attn, "mlp": lora.train_mlp, "head": lora.train_unembed}
    config = lora_config(training.model, lora.rank, **layer_kinds).to_dict()
    seed = secrets.randbits(62) if lora.seed is None else lora.seed % 2**63
    run = await training.write(
        _new_run,
        training,
        key,
        body.session_id,
        body.model_seq_id,
        config,
        seed,
        body.user_metadata,
    )
    return await accept_request(training, run, 0, "create", {})


async def _adapter(service: Serving, key: Key, name: str) -> dict[str, Any]:
    """The folder and config of a served adapter. ``Refusal``: the key may not use it, or there is
    none; ``AdapterError``: it is damaged."""
    await asyncio.to_thread(service.catalogue.refresh)
    folder = service.catalogue.folder_of(name) if key.sees(name) else None
    if folder is None:
        raise no_such("the adapter", name)
    config = (await asyncio.to_thread(read, folder)).config.to_dict()
    return {"folder": str(folder), "config": config}


@numbered.post("/load_weights")
async def load_weights(body: bodies.Load, training: On, service: Serving, key: Asker) -> Any:
    """Load a checkpoint, or an adapter of the server's folder or library by its name."""
    _of_base(training, body.base_model)
    _adam(body.optimizer_config)
    options: dict[str, Any] = {"path": body.path, "optimizer": body.optimizer}
    if not body.path.startswith("tinker://"):
        options |= await _adapter(service, key, body.path)
    if body.session_id is None or body.model_seq_id is None:
        if body.model_id is None:
            raise Refusal(
                400, "no run to load into", "model_id, or session_id and model_seq_id", "name one"
            )
        if "folder" not in options:
            checkpoint_of(training, key, body.path)
        return await queue_request(training, key, body.model_id, body.seq_id, "load", options)
    _active(training, key, body.session_id)
    config = options.get("config") or json.loads(
        checkpoint_of(training, key, body.path)[1]["config"]
    )
    run = await training.write(
        _new_run, training, key, body.session_id, body.model_seq_id, config, 0, body.user_metadata
    )
    return await accept_request(training, run, 0, "load", options)


@router.post("/get_info")
async def get_info(body: bodies.OfModel, training: On, key: Asker) -> dict[str, Any]:
    """The base and the rank of a run."""
    row = run_of(training, key, body.model_id)
    data = {
        "arch": type(training.model).__name__,
        "model_name": training.base,
        "tokenizer_id": training.tokenizer,
    }
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": row["id"],
        "is_lora": True,
        "lora_rank": json.loads(row["config"])["rank"],
        "model_name": training.base,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/unload_model")
async def unload_model(body: bodies.OfModel, training: On, key: Asker) -> Any:
    """Take a run out of memory."""
    return await queue_request(training, key, body.model_id, None, "unload", {})


@router.post("/forward_backward", openapi_extra=PASS_BODY)
async def forward_backward(request: Request, service: Serving, training: On, key: Asker) -> Any:
    """A forward pass, and a backward pass unless it is left out; a body in protobuf."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(
            415,
            "a compressed body",
            "an uncompressed one, as client/config says",
            "send it uncompressed",
        )
    body = await request.body()
    try:
        header = await beside_loop(service, body, read_header)
    except DataError as error:
        raise Refusal(400, str(error)) from error
    if header.seq < 0:
        raise Refusal(400, f"seq_id {header.seq}", "0 or more", "number the requests")
    return await queue_request(training, key, header.run, header.seq or None, PASS, body, header)


@numbered.post("/optim_step")
async def optim_step(body: bodies.OptimStep, training: On, key: Asker) -> Any:
    """A step of the optimizer."""
    if body.optimizer_params is not None or body.adam_params is None:
        raise Refusal(400, "parameters of another optimizer", "adam_params", "use AdamParams")
    adam_params = body.adam_params
    adam = {
        "rate": adam_params.learning_rate,
        "beta1": adam_params.beta1,
        "beta2": adam_params.beta2,
        "eps": adam_params.eps,
    }
    adam |= {"decay": adam_params.weight_decay, "clip": max(adam_params.grad_clip_norm, 0.0)}
    return await queue_request(training, key, body.model_id, body.seq_id, "step", adam)


@numbered.post("/save_weights")
async def save_weights(body: bodies.Save, training: On, key: Asker) -> Any:
    """Save a checkpoint from which training goes on."""
    options = body.model_dump(include={"ttl_seconds", "overwrite", "user_metadata"})
    return await queue_request(
        training, key, body.model_id, body.seq_id, "save", {**options, "name": body.path}
    )


@numbered.post("/save_weights_external")
async def save_external(body: bodies.SaveExternal, training: On, key: Asker) -> Any:
    """Save an adapter folder for other servers."""
    options = body.model_dump(include={"ttl_seconds", "age_encryption_recipients"})
    return await queue_request(
        training, key, body.model_id, body.seq_id, "external", {**options, "name": body.path}
    )


@numbered.post("/save_weights_for_sampler")
async def save_for_sampler(body: bodies.SaveForSampler, training: On, key: Asker) -> Any:
    """Save a checkpoint to draw samples from."""
    row = run_of(training, key, body.model_id)
    options = body.model_dump(include={"ttl_seconds", "user_metadata", "kind"})
    options |= {"name": body.path, "session": row["session"]}
    if body.path is None and body.sampling_session_seq_id is not None:
        options["sampler"] = f"{row['session']}:sample:{body.sampling_session_seq_id}"
    return await queue_request(training, key, body.model_id, body.seq_id, "sampler", options)


# ----------------------------------------------------------------------------------------------
# sampling


@router.post("/create_sampling_session")
async def create_sampler(body: bodies.CreateSampler, training: On, key: Asker) -> dict[str, str]:
    """Begin to draw samples from the base, a checkpoint or a run."""
    _active(training, key, body.session_id)
    _of_base(training, body.base_model)
    if body.model_path is not None:
        checkpoint_of(training, key, body.model_path)
    elif body.base_model is None:
        raise Refusal(
            400, "no weights to sample from", "model_path or base_model", "name one of them"
        )
    elif not key.base:
        raise no_such("the base model", body.base_model)
    sampler = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    await training.write(
        training.store.add_sampler, sampler, body.session_id, key.owner, body.model_path
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler}


def sampler_of(training: Training, key: Key, id: str) -> Any:
    row = training.store.sampler(id)
    if not owns(key, row):
        raise no_such("the sampling session", id)
    return row


@router.post("/join_sampling_session")
async def join_sampler(body: bodies.JoinSampler, training: On, key: Asker) -> dict[str, Any]:
    """A sampler that another process has begun."""
    sampler_of(training, key, body.sampling_session_id)
    number = await training.write(training.store.join, body.sampling_session_id)
    return {"type": "join_sampling_session", "client_counter": number}


@router.post("/asample")
async def asample(body: bodies.Sample, training: On, key: Asker) -> dict[str, Any]:
    """Draw samples."""
    if body.sampling_session_id is not None:
        row = sampler_of(training, key, body.sampling_session_id)
        session, path = row["session"], row["path"]
        _active(training, key, session)
        number = secrets.token_hex(8) if body.seq_id is None else body.seq_id
        id = f"{body.sampling_session_id}:{number}"
    else:
        session, path, id = "", body.model_path, f"sample:{secrets.token_hex(16)}"
        _of_base(training, body.base_model)
    if path is None and not key.base:
        raise no_such("the base model", training.base)
    name = None
    if path is not None:
        checkpoint_of(training, key, path)
        name = await training.write(training.register_checkpoint, path)
    if training.samples.find(id, key.owner) is None:
        charge = await training.reserve_tokens(key, training.samples.most_tokens(body))
        training.samples.begin(id, key.owner, session, name, body, charge)
    return {
        "request_id": id,
        "sample_sequence_ids": [f"{id}:{number}" for number in range(body.num_samples)],
    }


@router.post("/cancel_future")
async def cancel_future(body: bodies.Cancel, training: On, key: Asker) -> Response:
    """Cancel a request that waits or runs."""
    training.samples.cancel(body.request_id, key.owner)
    return Response(status_code=204)


def _promise(training: Training, key: Key, id: str) -> asyncio.Future[Answer] | None:
    run, _, number = id.rpartition(":")
    row = training.store.run(run) if number.isdecimal() and len(number) < 12 else None
    if row is None:
        return training.samples.find(id, key.owner)
    promise = training.worker.queue.promise(run, int(number)) if owns(key, row) else None
    return None if promise is None else promise.awaitable()


@router.post("/retrieve_future")
async def retrieve_future(body: bodies.Retrieve, training: On, key: Asker) -> Response:
    """Wait for the answer to a request. Status 408: ask again. Status 410: the request is unknown
    or was deleted, send it again."""
    promise = _promise(training, key, body.request_id)
    if promise is None:
        problem = f"the request {body.request_id[:200]!r}"
        raise Refusal(
            410, problem, "one that waits or was answered of late", "send it anew", code="gone"
        )
    await asyncio.wait([promise], timeout=POLL)
    if not promise.done():
        content = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return JSONResponse(content, 408)
    if promise.cancelled():
        return JSONResponse({"error": "Found: a sample that was cancelled.", "category": "user"})
    answer = promise.result()
    kind = "application/x-protobuf" if answer.binary else "application/json"
    return Response(answer.body, media_type=kind)


@router.post("/create_custom_loss")
async def create_custom_loss(key: Asker) -> Response:
    """A loss that the server would compute, which is refused."""
    raise Refusal(
        400,
        "a loss to be computed here",
        "one that the client computes",
        "use forward_backward_custom",
        code="not_supported",
    )
