"""The list of runs on the page at /, the current weights of a run for samples, and metrics of runs.

GET  /api/v1/live    a key's runs: losses, tokens per second, the last batch, checkpoints
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from veneer.errors import SelectionError
from veneer.serve.access import Key
from veneer.serve.service import ApiKey, Route
from veneer.serve.training.operations import CURRENT_WEIGHTS, adapter_folder
from veneer.serve.training.routes import TrainingDep
from veneer.serve.training.store import CHECKPOINT_KINDS, Checkpoint
from veneer.serve.training.training_service import Training

router = APIRouter(prefix="/api/v1", route_class=Route)

#: the largest numbers of runs in an answer, checkpoints of a run, entries of a run's metadata, and
#: characters of a name, key or value
MAX_RUNS, MAX_CHECKPOINTS, MAX_METADATA, MAX_CHARACTERS = 100, 16, 8, 80


@router.get("/live")
def live(
    training: TrainingDep, key: ApiKey, limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 20
) -> JSONResponse:
    """The most recently used runs of the key, at most ``limit`` of them. A run's loss curve has a
    bounded number of points, so the answer does not grow while the run trains."""
    run_rows = training.store.runs(key.owner)
    resident_adapter_names = set(training.worker.trainer.runs)
    content = {
        "base": training.base,
        "most_in_memory": training.max_resident,
        "total_count": len(run_rows),
        "batch": _describe_batch(training, key),
        "runs": [_describe_run(training, row, resident_adapter_names) for row in run_rows[:limit]],
    }
    # FastAPI would encode a dict in the event loop, and delay other requests meanwhile.
    # ``JSONResponse`` encodes here, in a worker thread.
    return JSONResponse(content)


def _describe_batch(training: Training, key: Key) -> dict[str, Any] | None:
    """The last training batch, for JSON: the key's runs in the batch with their names, how many
    runs of other keys were in it, and how long ago it ended. None if the server has computed no
    batch yet."""
    batch = training.worker.batch
    if batch is None:
        return None
    owned_run_rows = [
        row
        for row in map(training.store.run, batch.runs)
        if row is not None and row["owner"] == key.owner
    ]
    run_descriptions = [
        {"id": row["id"], "name": _run_name(training, row)} for row in owned_run_rows[:MAX_RUNS]
    ]
    return {
        "runs": run_descriptions,
        "others": len(batch.runs) - len(owned_run_rows),
        "seconds_ago": round(time.monotonic() - batch.ended, 1),
    }


def _describe_run(
    training: Training, run_row: Any, resident_adapter_names: set[str]
) -> dict[str, Any]:
    active_run = training.worker.active_runs.get(run_row["id"])
    curve = None if active_run is None else active_run.curve
    if curve is None:
        next_seq = training.store.next_seq(run_row["id"])
        curve = training.cached_curve(run_row["id"], run_row["state"], next_seq)
    points, config = curve.all_points(), json.loads(run_row["config"])
    checkpoint_rows = training.store.checkpoints(None, run_row["id"])
    targets = config["targets"]
    rate = 0.0 if active_run is None else active_run.rate.rate_at(time.monotonic())
    return {
        "id": run_row["id"],
        "name": _run_name(training, run_row),
        "metadata": _short_metadata(run_row["metadata"]),
        "rank": config["rank"],
        "targets": [targets] if isinstance(targets, str) else targets,
        "created": run_row["created"],
        "used": run_row["used"],
        "steps": curve.steps,
        "tokens": curve.tokens,
        "losses": [(step, float(f"{loss:.5g}")) for step, loss in points],
        "tokens_per_second": round(rate, 1),
        "in_memory": f"run{run_row['number']}" in resident_adapter_names,
        "waiting": 0 if active_run is None else len(active_run.waiting_requests),
        "unloaded": bool(run_row["unloaded"]),
        "failed": training.store.failure_of(run_row["id"]),
        "checkpoints_count": len(checkpoint_rows),
        "checkpoints": [_describe_checkpoint(row) for row in checkpoint_rows[:MAX_CHECKPOINTS]],
    }


def _describe_checkpoint(checkpoint_row: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(checkpoint_row["run"], checkpoint_row["kind"], checkpoint_row["name"])
    return {
        "path": checkpoint.path,
        "kind": CHECKPOINT_KINDS[checkpoint.kind],
        "name": checkpoint.name,
        "bytes": checkpoint_row["bytes"],
        "created": checkpoint_row["created"],
        "expires": checkpoint_row["expires"],
    }


def _run_name(training: Training, run_row: Any) -> str:
    """A name of a run for people: the entry "name" of the run's metadata, which its client may
    give. Without it, the title of the run's session, or the beginning of the session's id if it has
    no title, followed by the run's number in the session."""
    name = (json.loads(run_row["metadata"] or "{}") or {}).get("name")
    if name:
        return str(name)[:MAX_CHARACTERS]
    session_row = training.store.session(run_row["session"])
    title = (
        session_row["title"]
        if session_row is not None and session_row["title"]
        else run_row["session"][:8]
    )
    return f"{title[:MAX_CHARACTERS]} · {run_row['id'].rpartition(':')[2]}"


def _short_metadata(metadata_json: str | None) -> dict[str, str]:
    entries = list((json.loads(metadata_json or "{}") or {}).items())[:MAX_METADATA]
    return {
        entry_name[:MAX_CHARACTERS]: str(value)[:MAX_CHARACTERS]
        for entry_name, value in entries
        if entry_name != "name"
    }


# ----------------------------------------------------------------------------------------------
# samples


def publish(training: Training, run_id: str) -> str:
    """Copy a run's current weights into the bank, which holds the adapters with which the engine
    generates samples; return the copy's name in the bank, tinker://RUN/now. If the bank has these
    weights already, nothing is copied. Only the training thread may call this function. A run that
    was not in memory is loaded, and evicted again afterwards.

    Raises:
        SelectionError: no request of the run was computed, or the run only holds a copied
            checkpoint.
        TrainingError: the run has failed.
    """
    worker, bank, bank_name = training.worker, training.bank, f"tinker://{run_id}/{CURRENT_WEIGHTS}"
    active_run = worker.queue.active_run(run_id)
    if not active_run.next_seq:
        raise SelectionError(
            f"{bank_name}, a run without requests", "one that trains", "name one of its checkpoints"
        )
    if bank_name in bank and worker.published.get(run_id) == active_run.next_seq:
        worker.queue.drop(active_run)
        return bank_name
    was_resident = active_run in worker.memory
    worker.memory.ensure_loaded(active_run)
    export_folder = adapter_folder(training.store, bank_name)
    provenance = {"run": run_id, "request": active_run.next_seq}
    worker.trainer.export(active_run.adapter_name, export_folder, training.base, provenance)
    bank.put(bank_name, export_folder, active_run.adapter_name)
    worker.published[run_id] = active_run.next_seq
    if not was_resident:
        worker.memory.evict(active_run)
    return bank_name


# ----------------------------------------------------------------------------------------------
# metrics


class TrainingMetrics:
    """A custom collector of prometheus_client: ``collect`` is called when /metrics is
    requested."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def collect(self) -> list[Metric]:
        worker, store = self.training.worker, self.training.store
        return [
            GaugeMetricFamily(
                "veneer_training_runs", "Runs that take requests.", store.count_runs(None)
            ),
            GaugeMetricFamily(
                "veneer_training_resident_runs", "Runs in memory.", len(worker.trainer.runs)
            ),
            CounterMetricFamily("veneer_training_steps", "Steps of optimisers.", worker.steps),
            CounterMetricFamily(
                "veneer_training_tokens", "Tokens that were trained on.", worker.tokens
            ),
        ]
