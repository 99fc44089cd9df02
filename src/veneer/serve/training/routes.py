"""The routes under /api/v1 by which a client of the `tinker` SDK trains and samples.

GET  healthz  get_server_capabilities
POST client/config  client/dynamic_config  telemetry
     create_session  session_heartbeat  sessions/{id}/finish
     create_model  get_info  unload_model  forward_backward  optim_step
     save_weights  save_weights_for_sampler  save_weights_external  load_weights
     create_sampling_session  join_sampling_session  asample  cancel_future  retrieve_future

A client numbers the requests of a run (``seq_id``), and they are computed in this order. An invalid
request is queued as a request that fails, so that no number is missing (accept.py).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from veneer.adapter_files.folder import read
from veneer.errors import DataError
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.service import ApiKey, CurrentService, Route, beside_loop
from veneer.serve.training import bodies
from veneer.serve.training.accept import NumberedRoute, queue_request, write_and_queue
from veneer.serve.training.lookups import (
    find_checkpoint,
    find_run,
    find_sampler,
    find_session,
    not_found,
    owns,
)
from veneer.serve.training.operations import has_tied_head, lora_config
from veneer.serve.training.quotas import check_quota
from veneer.serve.training.training_service import Training, training_of
from veneer.serve.training.wire import read_header
from veneer.serve.training.worker import PASS, Answer

#: the largest number of seconds that ``retrieve_future`` waits for an answer
POLL_SECONDS = 25.0
#: the settings that clients of the SDK fetch, such as the largest size of their requests
CLIENT_SETTINGS = {
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

PASS_TYPE = "application/x-protobuf"  # media type of the request and the answer of a pass
#: the request body of a pass (forward, and backward if requested), for the OpenAPI description
PASS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {PASS_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = APIRouter(prefix="/api/v1", route_class=Route)
#: routes whose refused requests are queued too, so that no number of a run is missing
numbered_router = APIRouter(prefix="/api/v1", route_class=NumberedRoute)


async def _training(service: CurrentService, key: ApiKey) -> Training:
    """The training service. ``Refusal``: the key may not train. The key's permission ``base`` is
    not checked, because an untrained run computes what the base model does."""
    if not key.train:
        raise Refusal(
            403,
            f"key {key.name!r}, which may not train",
            "one with train = true",
            "ask for another",
            code="training_only",
        )
    return training_of(service)


TrainingDep = Annotated[Training, Depends(_training)]


def _check_session_is_active(training: Training, key: Key, session_id: str) -> None:
    """Record a heartbeat of a session. ``Refusal``: the key has no such session, or the session has
    finished."""
    session_row = find_session(training, key, session_id)
    if session_row["finished"]:
        raise Refusal(
            410,
            f"a session that has finished ({session_row['finished']})",
            "one that goes on",
            "begin a new one",
        )
    training.record_heartbeat(session_id)


def _check_base(training: Training, base_name: str | None) -> None:
    if base_name is not None and base_name != training.base:
        raise Refusal(
            400,
            f"the base model {base_name[:200]!r}",
            f"{training.base!r}, which this server has",
            "name that one",
            param="base_model",
        )


def _check_optimizer(family: bodies.OptimizerFamily | None) -> None:
    if family is not None and family.type != "adamw":
        raise Refusal(
            400, f"the optimizer {family.type!r}", "adamw, which this server has", "leave it out"
        )


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Check that the process is alive."""
    return {"status": "ok"}


@router.post("/client/config")
async def client_config(
    body: bodies.ClientConfig, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """The settings for a client of this server."""
    return CLIENT_SETTINGS


@router.post("/client/dynamic_config")
async def dynamic_config(
    body: bodies.ClientConfig, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """The settings that a running client fetches again from time to time."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.post("/telemetry")
async def telemetry(key: ApiKey) -> dict[str, str]:
    """Accept telemetry of clients, and do not store it."""
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """The base model that can be trained here."""
    return {
        "supported_models": [
            {
                "model_name": training.base,
                "max_context_length": training.worker.context_length,
                "trainable": True,
                "sampleable": True,
            }
        ]
    }


@router.post("/create_session")
async def create_session(
    body: bodies.CreateSession, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """Begin a session, to which the client's runs will belong."""
    session_id = await training.write(
        training.store.new_session, key.owner, body.user_metadata, body.display_name
    )
    training.record_heartbeat(session_id)
    answer = {"type": "create_session", "session_id": session_id}
    warnings = []
    if has_tied_head(training.model):
        warnings.append(
            "The base ties its output head to its embedding: train_unembed trains nothing here."
        )
    if body.project_id is not None:
        warnings.append("There are no projects here: project_id is not kept.")
    return {**answer, "warning_message": " ".join(warnings)} if warnings else answer


@router.post("/session_heartbeat")
async def heartbeat(body: bodies.SessionBody, training: TrainingDep, key: ApiKey) -> dict[str, str]:
    """Report that the client of a session is still running."""
    _check_session_is_active(training, key, body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session}/finish")
async def finish(
    session: str, body: bodies.FinishSession, training: TrainingDep, key: ApiKey
) -> Response:
    """End a session."""
    find_session(training, key, session)
    await training.write(training.store.finish_session, session, body.reason.type)
    training.evict_session(session)
    return Response(status_code=204)


def _new_run(
    training: Training,
    key: Key,
    session_id: str,
    number: int,
    config: Any,
    seed: int,
    metadata: Any,
) -> str:
    """Create run number ``number`` of a session, unless it exists; return its id. ``config``: its
    adapter's config as a dict. ``Refusal``: a copy has the id, or the quota is exceeded."""
    run_id = f"{session_id}:train:{number}"
    if training.store.is_copy(run_id):
        raise Refusal(
            409,
            f"{run_id}, which is a copy of a checkpoint",
            "a new run",
            "choose another model_seq_id",
        )
    if training.store.run(run_id) is None:
        check_quota(training.store, key, "runs")
        training.store.new_run(run_id, session_id, key.owner, config, seed, metadata)
    return run_id


@router.post("/create_model")
async def create_model(body: bodies.CreateModel, training: TrainingDep, key: ApiKey) -> Any:
    """Begin a run: an adapter that is trained."""
    _check_session_is_active(training, key, body.session_id)
    _check_base(training, body.base_model)
    _check_optimizer(body.optimizer_config)
    lora = body.lora_config or bodies.Lora(rank=32)
    layer_kinds = {"attention": lora.train_attn, "mlp": lora.train_mlp, "head": lora.train_unembed}
    config = lora_config(training.model, lora.rank, **layer_kinds).to_dict()
    seed = secrets.randbits(62) if lora.seed is None else lora.seed % 2**63
    run_id = await training.write(
        _new_run,
        training,
        key,
        body.session_id,
        body.model_seq_id,
        config,
        seed,
        body.user_metadata,
    )
    return await training.write(write_and_queue, training, run_id, 0, "create", {})


async def _served_adapter(service: CurrentService, key: Key, adapter_name: str) -> dict[str, Any]:
    """The folder and config of an adapter that the server serves. ``Refusal``: there is no such
    adapter, or the key may not use it. ``AdapterError``: the adapter's files are damaged."""
    await asyncio.to_thread(service.catalogue.refresh)
    folder = service.catalogue.folder_of(adapter_name) if key.sees(adapter_name) else None
    if folder is None:
        raise not_found("the adapter", adapter_name)
    config = (await asyncio.to_thread(read, folder)).config.to_dict()
    return {"folder": str(folder), "config": config}


@numbered_router.post("/load_weights")
async def load_weights(
    body: bodies.LoadWeights, training: TrainingDep, service: CurrentService, key: ApiKey
) -> Any:
    """Load weights into a run: a checkpoint, or an adapter in the server's folder or library."""
    _check_base(training, body.base_model)
    _check_optimizer(body.optimizer_config)
    options: dict[str, Any] = {"path": body.path, "optimizer": body.optimizer}
    if not body.path.startswith("tinker://"):
        options |= await _served_adapter(service, key, body.path)
    if body.session_id is None or body.model_seq_id is None:
        if body.model_id is None:
            raise Refusal(
                400, "no run to load into", "model_id, or session_id and model_seq_id", "name one"
            )
        if "folder" not in options:
            find_checkpoint(training, key, body.path)
        return await queue_request(training, key, body.model_id, body.seq_id, "load", options)
    _check_session_is_active(training, key, body.session_id)
    config = options.get("config") or json.loads(
        find_checkpoint(training, key, body.path)[1]["config"]
    )
    run_id = await training.write(
        _new_run, training, key, body.session_id, body.model_seq_id, config, 0, body.user_metadata
    )
    return await training.write(write_and_queue, training, run_id, 0, "load", options)


@router.post("/get_info")
async def get_info(body: bodies.RunBody, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """Describe the base model and the rank of a run."""
    run_row = find_run(training, key, body.model_id)
    return {
        "type": "get_info",
        "model_data": {
            "arch": type(training.model).__name__,
            "model_name": training.base,
            "tokenizer_id": training.tokenizer_source,
        },
        "model_id": run_row["id"],
        "is_lora": True,
        "lora_rank": json.loads(run_row["config"])["rank"],
        "model_name": training.base,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/unload_model")
async def unload_model(body: bodies.RunBody, training: TrainingDep, key: ApiKey) -> Any:
    """Take a run out of memory. The run then accepts no more requests."""
    return await queue_request(training, key, body.model_id, None, "unload", {})


@router.post("/forward_backward", openapi_extra=PASS_BODY)
async def forward_backward(
    request: Request, service: CurrentService, training: TrainingDep, key: ApiKey
) -> Any:
    """Compute a forward pass, and a backward pass unless the body says forward_only. The body is in
    protobuf."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "a compressed body", "one as client/config says", "send it uncompressed")
    # A web page of another origin could send some media types without a preflight request, and so
    # train with the browser's access. This type needs one (serve/guard.py).
    body_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body_type != PASS_TYPE:
        raise Refusal(415, f"a body of type {body_type[:100]!r}", PASS_TYPE, "send that type")
    body = await request.body()
    try:
        header = await beside_loop(service, body, read_header)
    except DataError as error:
        raise Refusal(400, str(error)) from error
    if header.seq < 0:
        raise Refusal(400, f"seq_id {header.seq}", "0 or more", "number the requests")
    return await queue_request(training, key, header.run_id, header.seq or None, PASS, body, header)


@numbered_router.post("/optim_step")
async def optim_step(body: bodies.OptimStep, training: TrainingDep, key: ApiKey) -> Any:
    """Take a step of the optimizer."""
    if body.optimizer_params is not None or body.adam_params is None:
        raise Refusal(400, "parameters of another optimizer", "adam_params", "use AdamParams")
    adam_params = body.adam_params
    adam = {
        "rate": adam_params.learning_rate,
        "beta1": adam_params.beta1,
        "beta2": adam_params.beta2,
        "eps": adam_params.eps,
        "decay": adam_params.weight_decay,
        "clip": max(adam_params.grad_clip_norm, 0.0),
    }
    return await queue_request(training, key, body.model_id, body.seq_id, "step", adam)


@numbered_router.post("/save_weights")
async def save_weights(body: bodies.SaveWeights, training: TrainingDep, key: ApiKey) -> Any:
    """Save a checkpoint from which training can continue."""
    options = body.model_dump(include={"ttl_seconds", "overwrite", "user_metadata"})
    return await queue_request(
        training, key, body.model_id, body.seq_id, "save", {**options, "name": body.path}
    )


@numbered_router.post("/save_weights_external")
async def save_external(body: bodies.SaveExternal, training: TrainingDep, key: ApiKey) -> Any:
    """Save an adapter folder for other servers."""
    options = body.model_dump(include={"ttl_seconds", "age_encryption_recipients"})
    return await queue_request(
        training, key, body.model_id, body.seq_id, "external", {**options, "name": body.path}
    )


@numbered_router.post("/save_weights_for_sampler")
async def save_for_sampler(body: bodies.SaveForSampler, training: TrainingDep, key: ApiKey) -> Any:
    """Save a checkpoint to draw samples from."""
    run_row = find_run(training, key, body.model_id)
    options = body.model_dump(include={"ttl_seconds", "user_metadata", "kind"})
    options |= {"name": body.path, "session": run_row["session"]}
    if body.path is None and body.sampling_session_seq_id is not None:
        options["sampler"] = f"{run_row['session']}:sample:{body.sampling_session_seq_id}"
    return await queue_request(training, key, body.model_id, body.seq_id, "sampler", options)


@router.post("/create_sampling_session")
async def create_sampler(
    body: bodies.CreateSampler, training: TrainingDep, key: ApiKey
) -> dict[str, str]:
    """Begin a sampling session, which draws samples from the base or from a checkpoint."""
    _check_session_is_active(training, key, body.session_id)
    _check_base(training, body.base_model)
    if body.model_path is not None:
        find_checkpoint(training, key, body.model_path)
    elif body.base_model is None:
        raise Refusal(
            400, "no weights to sample from", "model_path or base_model", "name one of them"
        )
    elif not key.base:
        raise not_found("the base model", body.base_model)
    sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    await training.write(
        training.store.add_sampler, sampler_id, body.session_id, key.owner, body.model_path
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.post("/join_sampling_session")
async def join_sampler(
    body: bodies.JoinSampler, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """Join a sampling session that another process has begun."""
    find_sampler(training, key, body.sampling_session_id)
    client_number = await training.write(
        training.store.add_sampler_client, body.sampling_session_id
    )
    return {"type": "join_sampling_session", "client_counter": client_number}


@router.post("/asample")
async def asample(body: bodies.Sample, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """Begin to draw samples. The answer has the id with which to ask for them."""
    if body.sampling_session_id is not None:
        sampler_row = find_sampler(training, key, body.sampling_session_id)
        session_id, path = sampler_row["session"], sampler_row["path"]
        _check_session_is_active(training, key, session_id)
        call_number = secrets.token_hex(8) if body.seq_id is None else body.seq_id
        call_id = f"{body.sampling_session_id}:{call_number}"
    else:
        session_id, path, call_id = "", body.model_path, f"sample:{secrets.token_hex(16)}"
        _check_base(training, body.base_model)
    if path is None and not key.base:
        raise not_found("the base model", training.base)
    adapter_name = None
    if path is not None:
        find_checkpoint(training, key, path)
        adapter_name = await training.write(training.register_checkpoint, path)
    if training.samples.find(call_id, key.owner) is None:
        charge = await training.reserve_tokens(key, training.samples.max_tokens(body))
        training.samples.begin(call_id, key.owner, session_id, adapter_name, body, charge)
    return {
        "request_id": call_id,
        "sample_sequence_ids": [f"{call_id}:{number}" for number in range(body.num_samples)],
    }


@router.post("/cancel_future")
async def cancel_future(body: bodies.CancelFuture, training: TrainingDep, key: ApiKey) -> Response:
    """Cancel a call for samples that waits or runs."""
    training.samples.cancel(body.request_id, key.owner)
    return Response(status_code=204)


def _find_future(training: Training, key: Key, request_id: str) -> asyncio.Future[Answer] | None:
    """The future answer to a request of a run (its id is RUN:NUMBER) or to a call for samples. None
    if the request is unknown, was deleted, or belongs to another key."""
    run_id, _, seq_text = request_id.rpartition(":")
    run_row = training.store.run(run_id) if seq_text.isdecimal() and len(seq_text) < 12 else None
    if run_row is None:
        return training.samples.find(request_id, key.owner)
    promise = training.worker.queue.promise(run_id, int(seq_text)) if owns(key, run_row) else None
    return None if promise is None else promise.awaitable()


@router.post("/retrieve_future")
async def retrieve_future(
    body: bodies.RetrieveFuture, training: TrainingDep, key: ApiKey
) -> Response:
    """Wait for the answer to a request. Status 408: there is no answer yet, ask again. Status 410:
    the request is unknown or was deleted, send it again."""
    future = _find_future(training, key, body.request_id)
    if future is None:
        raise Refusal(
            410,
            f"the request {body.request_id[:200]!r}",
            "one that waits or was answered of late",
            "send it anew",
            code="gone",
        )
    await asyncio.wait([future], timeout=POLL_SECONDS)
    if not future.done():
        content = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return JSONResponse(content, 408)
    if future.cancelled():
        return JSONResponse({"error": "Found: a sample that was cancelled.", "category": "user"})
    answer = future.result()
    media_type = PASS_TYPE if answer.binary else "application/json"
    return Response(answer.body, media_type=media_type)


@router.post("/create_custom_loss")
async def create_custom_loss(key: ApiKey) -> Response:
    """Refuse a custom loss, which only clients can compute."""
    raise Refusal(
        400,
        "a loss to be computed here",
        "one that the client computes",
        "use forward_backward_custom",
        code="not_supported",
    )
