"""The runs on the page at /, their use as models in chats, and their metrics.

GET  live                                  a key's runs: losses, tokens a second, the last batch,
                                           checkpoints
model tinker://RUN/KIND/NAME               a checkpoint, in /v1/completions and /v1/chat/completions
      tinker://RUN/now                     the run's current weights
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from veneer.errors import SelectionError
from veneer.serve.access import Key
from veneer.serve.metrics import Metrics
from veneer.serve.refusal import no_such_model
from veneer.serve.service import Asker, Route
from veneer.serve.training.accept import check_quota, run_of
from veneer.serve.training.checkpoint_source import NOW, current_run
from veneer.serve.training.routes import On, checkpoint_of
from veneer.serve.training.store import KINDS, Checkpoint
from veneer.serve.training.training_service import Training
from veneer.serve.training.worker import PUBLISHED

router = APIRouter(prefix="/api/v1", route_class=Route)

#: the most runs in an answer, checkpoints of a run, entries of its metadata, and characters of each
#: entry
MOST_RUNS, MOST_CHECKPOINTS, MOST_METADATA, MOST_WORDS = 100, 16, 8, 80


@router.get("/live")
def live(
    training: On, key: Asker, limit: Annotated[int, Query(ge=1, le=MOST_RUNS)] = 20
) -> JSONResponse:
    """The most recently used runs. The size of the answer does not grow with their steps."""
    rows = training.store.runs(key.owner)
    resident = set(training.worker.trainer.runs)
    content = {
        "base": training.base,
        "most_in_memory": training.resident,
        "total_count": len(rows),
        "batch": _batch(training, key),
        "runs": [_run(training, row, resident) for row in rows[:limit]],
    }
    return JSONResponse(content)  # encode here, in a worker thread, not in the event loop


def _batch(training: Training, key: Key) -> dict[str, Any] | None:
    """The last batch: the key's runs by name, and the number of other runs."""
    batch = training.worker.batch
    if batch is None:
        return None
    owner_rows = [
        row
        for row in map(training.store.run, batch.runs)
        if row is not None and row["owner"] == key.owner
    ]
    runs = [{"id": row["id"], "name": _name(training, row)} for row in owner_rows[:MOST_RUNS]]
    return {
        "runs": runs,
        "others": len(batch.runs) - len(owner_rows),
        "seconds_ago": round(time.monotonic() - batch.ended, 1),
    }


def _run(training: Training, row: Any, resident: set[str]) -> dict[str, Any]:
    line = training.worker.lines.get(row["id"])
    curve = None if line is None else line.curve
    if curve is None:
        curve = training.curves(row["id"], row["state"], training.store.next_seq(row["id"]))
    losses, config = curve.all_points(), json.loads(row["config"])
    rows, targets = training.store.checkpoints(None, row["id"]), config["targets"]
    return {
        "id": row["id"],
        "name": _name(training, row),
        "metadata": _metadata(row["metadata"]),
        "rank": config["rank"],
        "targets": [targets] if isinstance(targets, str) else targets,
        "created": row["created"],
        "used": row["used"],
        "steps": curve.steps,
        "tokens": curve.tokens,
        "losses": [(step, float(f"{loss:.5g}")) for step, loss in losses],
        "tokens_per_second": 0.0 if line is None else round(line.rate.at(time.monotonic()), 1),
        "in_memory": f"run{row['number']}" in resident,
        "waiting": 0 if line is None else len(line.waiting),
        "unloaded": bool(row["unloaded"]),
        "failed": training.store.failure_of(row["id"]),
        "checkpoints_count": len(rows),
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in rows[:MOST_CHECKPOINTS]],
    }


def _checkpoint(row: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(row["run"], row["kind"], row["name"])
    return {
        "path": checkpoint.path,
        "kind": KINDS[checkpoint.kind],
        "name": checkpoint.name,
        "bytes": row["bytes"],
        "created": row["created"],
        "expires": row["expires"],
    }


def _name(training: Training, row: Any) -> str:
    """The client's name for the run; without one, the session's title or the beginning of its id,
    and the run's number."""
    name = (json.loads(row["metadata"] or "{}") or {}).get("name")
    if name:
        return str(name)[:MOST_WORDS]
    session = training.store.session(row["session"])
    title = session["title"] if session is not None and session["title"] else row["session"][:8]
    return f"{title[:MOST_WORDS]} · {row['id'].rpartition(':')[2]}"


def _metadata(text: str | None) -> dict[str, str]:
    entries = list((json.loads(text or "{}") or {}).items())[:MOST_METADATA]
    return {name[:MOST_WORDS]: str(value)[:MOST_WORDS] for name, value in entries if name != "name"}


# ----------------------------------------------------------------------------------------------
# samples


async def requested_run(training: Training, key: Key, model: str) -> dict[str, float]:
    """The adapter of a model's name tinker://…, as {name in the bank: weight}. ``Refusal``: the key
    may read no such adapter, or has no tokens left today."""
    if not key.train:
        raise no_such_model(model)
    run = current_run(model)
    if run is not None:
        id = run_of(training, key, run)["id"]
        check_quota(training, key, "tokens")
        publication = training.worker.do(partial(publish, training, id), id)
        name = await asyncio.shield(asyncio.wrap_future(publication))
        await training.write(training.record_use, name)
    else:
        checkpoint_of(training, key, model)
        check_quota(training, key, "tokens")
        name = await training.write(training.register_checkpoint, model)
    return {name: 1.0}


def publish(training: Training, run: str) -> str:
    """Put the run's current weights into the bank; return their name there. Only the training
    thread may call it. A run that was not in memory leaves it again. ``SelectionError``: the run is
    a copy, or has not begun. ``TrainingError``: it has failed."""
    worker, bank, name = training.worker, training.bank, f"tinker://{run}/{NOW}"
    line = worker.queue.line(run)
    if not line.next:
        raise SelectionError(
            f"{name}, a run without requests", "one that trains", "name one of its checkpoints"
        )
    if name in bank and worker.published.get(run) == line.next:
        worker.queue.drop(line)
        return name
    was_resident = line in worker.memory
    worker.memory.ensure(line)
    folder = training.folder_of(name)
    worker.trainer.export(line.name, folder, training.base, {"run": run, "request": line.next})
    bank.put(name, folder, line.name)
    worker.published.pop(run, None)
    worker.published[run] = line.next
    if len(worker.published) > PUBLISHED:
        del worker.published[next(iter(worker.published))]
    if not was_resident:
        worker.memory.let_go(line)
    return name


# ----------------------------------------------------------------------------------------------
# numbers


class _Numbers:
    """The metrics of training, collected when /metrics is requested."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def collect(self) -> Iterator[Metric]:
        worker, store = self.training.worker, self.training.store
        for name, help_, value in (
            ("veneer_training_runs", "Runs that take requests.", store.count_runs(None)),
            ("veneer_training_resident_runs", "Runs in memory.", len(worker.trainer.runs)),
        ):
            yield GaugeMetricFamily(name, help_, value)
        for name, help_, value in (
            ("veneer_training_steps", "Steps of optimisers.", worker.steps),
            ("veneer_training_tokens", "Tokens that were trained on.", worker.tokens),
        ):
            yield CounterMetricFamily(name, help_, value)


def watch(metrics: Metrics, training: Training) -> None:
    metrics.registry.register(_Numbers(training))  # pyright: ignore[reportArgumentType]
