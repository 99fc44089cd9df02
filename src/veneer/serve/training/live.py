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
from veneer.serve.training.operations import CURRENT
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
    """The most recently used runs. The size of the answer does not grow with the runs' steps."""
    rows = training.store.runs(key.owner)
    resident_adapters = set(training.worker.trainer.runs)
    content = {
        "base": training.base,
        "most_in_memory": training.max_resident,
        "total_count": len(rows),
        "batch": _describe_batch(training, key),
        "runs": [_describe_run(training, row, resident_adapters) for row in rows[:limit]],
    }
    return JSONResponse(content)  # encodes in this worker thread, not in the event loop


def _describe_batch(training: Training, key: Key) -> dict[str, Any] | None:
    """The last batch, or None: the key's runs in it with their names, and how many runs of other
    keys were in it."""
    batch = training.worker.batch
    if batch is None:
        return None
    owner_rows = [
        row
        for row in map(training.store.run, batch.runs)
        if row is not None and row["owner"] == key.owner
    ]
    runs = [{"id": row["id"], "name": _run_name(training, row)} for row in owner_rows[:MAX_RUNS]]
    return {
        "runs": runs,
        "others": len(batch.runs) - len(owner_rows),
        "seconds_ago": round(time.monotonic() - batch.ended, 1),
    }


def _describe_run(training: Training, row: Any, resident_adapters: set[str]) -> dict[str, Any]:
    active_run = training.worker.active_runs.get(row["id"])
    curve = None if active_run is None else active_run.curve
    if curve is None:
        next_seq = training.store.next_seq(row["id"])
        curve = training.cached_curve(row["id"], row["state"], next_seq)
    points, config = curve.all_points(), json.loads(row["config"])
    checkpoint_rows = training.store.checkpoints(None, row["id"])
    targets = config["targets"]
    rate = 0.0 if active_run is None else active_run.rate.rate_at(time.monotonic())
    return {
        "id": row["id"],
        "name": _run_name(training, row),
        "metadata": _short_metadata(row["metadata"]),
        "rank": config["rank"],
        "targets": [targets] if isinstance(targets, str) else targets,
        "created": row["created"],
        "used": row["used"],
        "steps": curve.steps,
        "tokens": curve.tokens,
        "losses": [(step, float(f"{loss:.5g}")) for step, loss in points],
        "tokens_per_second": round(rate, 1),
        "in_memory": f"run{row['number']}" in resident_adapters,
        "waiting": 0 if active_run is None else len(active_run.waiting_requests),
        "unloaded": bool(row["unloaded"]),
        "failed": training.store.failure_of(row["id"]),
        "checkpoints_count": len(checkpoint_rows),
        "checkpoints": [_describe_checkpoint(row) for row in checkpoint_rows[:MAX_CHECKPOINTS]],
    }


def _describe_checkpoint(row: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(row["run"], row["kind"], row["name"])
    return {
        "path": checkpoint.path,
        "kind": CHECKPOINT_KINDS[checkpoint.kind],
        "name": checkpoint.name,
        "bytes": row["bytes"],
        "created": row["created"],
        "expires": row["expires"],
    }


def _run_name(training: Training, row: Any) -> str:
    """The client's name for the run. If there is none: the title of the session or the beginning of
    the session's id, and the run's number in the session."""
    name = (json.loads(row["metadata"] or "{}") or {}).get("name")
    if name:
        return str(name)[:MAX_CHARACTERS]
    session = training.store.session(row["session"])
    title = session["title"] if session is not None and session["title"] else row["session"][:8]
    return f"{title[:MAX_CHARACTERS]} · {row['id'].rpartition(':')[2]}"


def _short_metadata(metadata_json: str | None) -> dict[str, str]:
    entries = list((json.loads(metadata_json or "{}") or {}).items())[:MAX_METADATA]
    return {
        name[:MAX_CHARACTERS]: str(value)[:MAX_CHARACTERS]
        for name, value in entries
        if name != "name"
    }


# ----------------------------------------------------------------------------------------------
# samples


def publish(training: Training, run: str) -> str:
    """Put a run's current weights into the bank, to sample from them; return their name in the
    bank. Only the training thread may call it. A run that was not in memory is loaded, and evicted
    again afterwards. ``SelectionError``: the run is only a copy of a checkpoint, or has not begun.
    ``TrainingError``: the run has failed."""
    worker, bank, name = training.worker, training.bank, f"tinker://{run}/{CURRENT}"
    active_run = worker.queue.active_run(run)
    if not active_run.next_seq:
        raise SelectionError(
            f"{name}, a run without requests", "one that trains", "name one of its checkpoints"
        )
    if name in bank and worker.published.get(run) == active_run.next_seq:
        worker.queue.drop(active_run)
        return name
    was_resident = active_run in worker.memory
    worker.memory.ensure_loaded(active_run)
    folder = training.folder_of(name)
    provenance = {"run": run, "request": active_run.next_seq}
    worker.trainer.export(active_run.adapter_name, folder, training.base, provenance)
    bank.put(name, folder, active_run.adapter_name)
    worker.published[run] = active_run.next_seq
    if not was_resident:
        worker.memory.evict(active_run)
    return name


# ----------------------------------------------------------------------------------------------
# metrics


class TrainingMetrics:
    """A collector of Prometheus, which is called when /metrics is requested."""

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
