"""The routes under /api/v1 by which a client of the `tinker` SDK lists sessions, training runs and
checkpoints, and changes or downloads checkpoints.

GET           training_runs  training_runs/{run}  training_runs/{run}/checkpoints  checkpoints
              sessions  sessions/{id}  samplers/{id}  files/{token}/{name}
POST          sessions/search  weights_info  copy_weights

Routes of a checkpoint; … stands for training_runs/{run}/checkpoints/{kind}/{name}:

DELETE        …
PUT           …/ttl
POST, DELETE  …/publish
GET           …/external_weights_urls

Other routes of the hosted service (projects, bills, audits, traces) are refused with an
explanation.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from veneer.serve.refusal import Refusal
from veneer.serve.service import ApiKey, CurrentService, Route
from veneer.serve.training import bodies
from veneer.serve.training.lookups import (
    find_checkpoint,
    find_run,
    find_sampler,
    find_session,
    require_owner,
)
from veneer.serve.training.quotas import check_quota
from veneer.serve.training.routes import TrainingDep
from veneer.serve.training.run_trainer import ADAPTER_FOLDER
from veneer.serve.training.store import CHECKPOINT_KINDS, Checkpoint
from veneer.serve.training.training_service import FILE_URL_SECONDS, Training, training_of

router = APIRouter(prefix="/api/v1", route_class=Route)

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]


def _iso_time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _parse_metadata(metadata_json: str | None) -> dict[str, str] | None:
    return (
        None
        if metadata_json is None
        else {
            entry_name: str(value)
            for entry_name, value in (json.loads(metadata_json) or {}).items()
        }
    )


def _describe_checkpoint(checkpoint_row: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(checkpoint_row["run"], checkpoint_row["kind"], checkpoint_row["name"])
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": CHECKPOINT_KINDS[checkpoint.kind],
        "time": _iso_time(checkpoint_row["created"]),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint_row["bytes"],
        "public": bool(checkpoint_row["public"]),
        "user_metadata": _parse_metadata(checkpoint_row["metadata"]),
        "expires_at": _iso_time(checkpoint_row["expires"]),
    }


def _describe_run(training: Training, run_row: Any) -> dict[str, Any]:
    checkpoints = list(map(_describe_checkpoint, training.store.checkpoints(None, run_row["id"])))
    newest_by_type: dict[str, Any] = dict.fromkeys(CHECKPOINT_KINDS.values())
    for checkpoint in reversed(checkpoints):  # the newest come last, and so remain
        newest_by_type[checkpoint["checkpoint_type"]] = checkpoint
    return {
        "training_run_id": run_row["id"],
        "base_model": training.base,
        "model_owner": run_row["owner"],
        "is_lora": True,
        "lora_rank": json.loads(run_row["config"])["rank"],
        "last_request_time": _iso_time(run_row["used"]),
        "last_checkpoint": newest_by_type["training"],
        "last_sampler_checkpoint": newest_by_type["sampler"],
        "user_metadata": _parse_metadata(run_row["metadata"]),
    }


def _slice_page(
    rows: Sequence[Any], limit: int, offset: int
) -> tuple[Sequence[Any], dict[str, int]]:
    """At most ``limit`` rows from number ``offset`` on, and the field "cursor" of the answer, with
    the number of all rows."""
    return rows[offset : offset + limit], {
        "offset": offset,
        "limit": limit,
        "total_count": len(rows),
    }


@router.get("/training_runs")
def training_runs(
    training: TrainingDep, key: ApiKey, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """The runs of the API key, the most recently used first."""
    run_rows, cursor = _slice_page(training.store.runs(key.owner), limit, offset)
    return {"training_runs": [_describe_run(training, row) for row in run_rows], "cursor": cursor}


@router.get("/training_runs/{run}")
def training_run(run: str, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """Describe one run of the API key."""
    return _describe_run(training, find_run(training, key, run))


@router.get("/training_runs/{run}/checkpoints")
def run_checkpoints(run: str, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """The checkpoints of a run of the API key, the newest first."""
    find_run(training, key, run)
    checkpoint_rows = training.store.checkpoints(None, run)
    return {"checkpoints": [_describe_checkpoint(row) for row in checkpoint_rows]}


@router.get("/checkpoints")
def checkpoints(
    training: TrainingDep, key: ApiKey, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """The checkpoints of the API key, the newest first."""
    checkpoint_rows, cursor = _slice_page(training.store.checkpoints(key.owner), limit, offset)
    return {"checkpoints": [_describe_checkpoint(row) for row in checkpoint_rows], "cursor": cursor}


def _find_owned_checkpoint(
    run: str, kind: str, name: str, training: TrainingDep, key: ApiKey
) -> Checkpoint:
    """The checkpoint that a route's URL path names by ``run``, ``kind`` and ``name``. ``Refusal``:
    the API key has no such checkpoint, even if another key has published one."""
    checkpoint, checkpoint_row = find_checkpoint(training, key, f"tinker://{run}/{kind}/{name}")
    require_owner(key, checkpoint_row, "the checkpoint", checkpoint.path)
    return checkpoint


OwnedCheckpoint = Annotated[Checkpoint, Depends(_find_owned_checkpoint)]


@router.delete("/training_runs/{run}/checkpoints/{kind}/{name}", status_code=204)
async def delete_checkpoint(checkpoint: OwnedCheckpoint, training: TrainingDep) -> None:
    """Delete a checkpoint of the API key."""
    await training.change_checkpoints(partial(training.operations.delete, checkpoint))


@router.post("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
async def publish(checkpoint: OwnedCheckpoint, training: TrainingDep) -> None:
    """Allow every key of this server to read a checkpoint."""
    await training.write(partial(training.store.change_checkpoint, checkpoint, public=1))


@router.delete("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
async def unpublish(checkpoint: OwnedCheckpoint, training: TrainingDep) -> None:
    """Allow only the owner's API key to read a checkpoint."""
    await training.write(partial(training.store.change_checkpoint, checkpoint, public=0))


@router.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl", status_code=204)
async def set_ttl(checkpoint: OwnedCheckpoint, body: bodies.SetTtl, training: TrainingDep) -> None:
    """Let a checkpoint expire ``ttl_seconds`` from now, or never if it is null."""
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    await training.write(partial(training.store.change_checkpoint, checkpoint, expires=expires))


@router.get("/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls")
def external_urls(
    run: str, kind: str, name: str, request: Request, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """The URLs of the files of a checkpoint's adapter folder, which has PEFT's layout. They contain
    a secret instead of an API key, and are valid for an hour."""
    checkpoint, _ = find_checkpoint(training, key, f"tinker://{run}/{kind}/{name}")
    folder = training.store.files_of(checkpoint) / ADAPTER_FOLDER
    token = training.new_file_token(folder)
    file_names = [
        str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    root_url = f"{str(request.base_url).rstrip('/')}/api/v1/files/{token}"
    return {
        "urls": {name: f"{root_url}/{name}" for name in file_names},
        "expires": _iso_time(time.time() + FILE_URL_SECONDS),
    }


@router.get("/files/{token}/{name:path}")
def file(token: str, name: str, service: CurrentService) -> Response:
    """A file of a checkpoint. The secret token in the URL replaces the API key."""
    path = training_of(service).find_file(token, name)
    if path is None:
        raise Refusal(
            404,
            "an address that is not known, or not any more",
            "one of the last hour",
            "ask for a new one",
        )
    return FileResponse(path, media_type="application/octet-stream")


@router.post("/weights_info")
def weights_info(body: bodies.CheckpointBody, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """The base model and rank of a checkpoint's adapter, and which kinds of layers it changes."""
    _, checkpoint_row = find_checkpoint(training, key, body.tinker_path)
    config = json.loads(checkpoint_row["config"])
    targets = [config["targets"]] if isinstance(config["targets"], str) else config["targets"]
    # an adapter that another program created may name all linear layers in one of these ways
    targets_all_linear = bool({"all", "all-linear"}.intersection(targets))
    return {
        "base_model": training.base,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": config["rank"],
        "train_attn": targets_all_linear or "attention" in targets,
        "train_mlp": targets_all_linear or "mlp" in targets,
        "train_unembed": bool({*targets} - {"attention", "mlp", "all-linear"}),
    }


@router.post("/copy_weights")
async def copy_weights(
    body: bodies.CopyWeights, training: TrainingDep, key: ApiKey
) -> dict[str, str]:
    """Copy a checkpoint that the API key may read to a run that holds only copies. The run takes no
    requests, and is created if it does not exist. A repeated request changes nothing."""
    find_checkpoint(training, key, body.source_path)
    session_id = body.session_id
    if session_id is None:
        session_id = await training.write(training.store.new_session, key.owner, None, "a copy")
    find_session(training, key, session_id)
    run_id = f"{session_id}:train:{body.model_seq_id or 0}"

    def copy() -> str:
        """Copy the checkpoint, in the training thread; return the path of the copy."""
        source, source_row = find_checkpoint(training, key, body.source_path)
        target_checkpoint, target_run_row = (
            Checkpoint(run_id, source.kind, source.name),
            training.store.run(run_id),
        )
        if target_run_row is not None and not (
            training.store.is_copy(run_id) and target_run_row["config"] == source_row["config"]
        ):
            raise Refusal(
                409,
                f"the training run {run_id}, which exists",
                "a new one",
                "choose another model_seq_id",
            )
        if target_run_row is not None and training.store.checkpoint(target_checkpoint) is not None:
            if training.operations.are_equal(source, target_checkpoint):
                return target_checkpoint.path  # the client has repeated a request that succeeded
            raise Refusal(
                409,
                f"{target_checkpoint.path}, a copy of other weights",
                "a run without a copy of this name",
                "choose another model_seq_id",
            )
        check_quota(training.store, key, "bytes", source_row["bytes"])
        if target_run_row is None:
            training.store.new_run(
                run_id, session_id, key.owner, json.loads(source_row["config"]), 0, None
            )
            training.store.mark_unloaded(run_id)
        training.operations.copy(source, target_checkpoint)
        training.store.add_checkpoint(
            target_checkpoint, key.owner, source_row["config"], lifetime_seconds=body.ttl_seconds
        )
        return target_checkpoint.path

    return {"tinker_path": await training.change_checkpoints(copy)}


# ----------------------------------------------------------------------------------------------
# sessions


@router.get("/sessions")
def sessions(
    training: TrainingDep, key: ApiKey, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """The ids of the API key's sessions, the newest first."""
    session_rows, _ = _slice_page(training.store.sessions(key.owner), limit, offset)
    return {"sessions": [row["id"] for row in session_rows]}


@router.post("/sessions/search")
def search_sessions(
    body: bodies.SearchSessions, training: TrainingDep, key: ApiKey
) -> dict[str, Any]:
    """The newest sessions of the API key that match the search. A session matches if it has the
    given id or all words of the given name, and the given metadata. At most ``limit`` sessions are
    returned, and there are no further pages."""
    if (
        body.cursor
        or body.project_ids
        or body.statuses
        or body.owner.get("type") not in ("own", "accessible")
    ):
        raise Refusal(
            400,
            "a search by cursor, project, status or owner",
            "one by id, name or metadata among your own",
            "leave it out",
        )
    matching_sessions = []
    for session_row in training.store.sessions(key.owner):
        title, metadata = session_row["title"] or "", _parse_metadata(session_row["metadata"]) or {}
        matches_name = body.display_name is not None and all(
            word in title.lower() for word in body.display_name.lower().split()
        )
        matches_any = body.session_id is None and body.display_name is None
        if (
            matches_any or session_row["id"] == body.session_id or matches_name
        ) and body.user_metadata.items() <= metadata.items():
            matching_sessions.append(_describe_session(training, session_row))
    return {"sessions": matching_sessions[: body.limit]}


def _describe_session(training: Training, session_row: Any) -> dict[str, Any]:
    run_rows = training.store.runs(session_row["owner"], session_row["id"])
    checkpoint_rows = [
        checkpoint_row
        for run_row in run_rows
        for checkpoint_row in training.store.checkpoints(None, run_row["id"])
    ]
    checkpoint_bytes = sum(checkpoint_row["bytes"] for checkpoint_row in checkpoint_rows)
    status = (
        None
        if session_row["finished"] is None
        else {"type": "client_finished", "reason": {"type": session_row["finished"]}}
    )
    return {
        "session_id": session_row["id"],
        "created_at": _iso_time(session_row["created"]),
        "owner": session_row["owner"],
        "project_id": "",
        "status": status,
        "checkpoints_count": len(checkpoint_rows),
        "display_name": session_row["title"],
        "user_metadata": _parse_metadata(session_row["metadata"]),
        "checkpoint_storage_bytes": checkpoint_bytes,
    }


@router.get("/sessions/{session}")
def session(session: str, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """Describe one session, with the ids of its runs and sampling sessions."""
    row = find_session(training, key, session)
    return {
        "training_run_ids": [row["id"] for row in training.store.runs(key.owner, session)],
        "sampler_ids": [row["id"] for row in training.store.samplers(session)],
        "user_metadata": _parse_metadata(row["metadata"]),
        "display_name": row["title"],
    }


@router.get("/samplers/{sampler}")
def sampler(sampler: str, training: TrainingDep, key: ApiKey) -> dict[str, Any]:
    """Describe one sampling session: the base model, and the checkpoint that it samples from."""
    sampler_row = find_sampler(training, key, sampler)
    return {
        "sampler_id": sampler_row["id"],
        "base_model": training.base,
        "model_path": sampler_row["path"],
    }


# ----------------------------------------------------------------------------------------------
# routes of the hosted service that this server does not have


@router.put("/sessions/{session}/project")
@router.get("/sessions/{session}/trace_export")
@router.get("/audit")
@router.get("/billing/usage/events")
@router.get("/billing/usage/checkpoints/current")
@router.post("/auth/token")
def not_here(request: Request, key: ApiKey) -> None:
    """Refuse a route of the hosted service that this server does not have."""
    raise Refusal(
        400,
        f"{request.method} {request.url.path[:200]}, of the hosted service",
        "what trains, samples and keeps checkpoints",
        "see docs/training-service.md",
    )
