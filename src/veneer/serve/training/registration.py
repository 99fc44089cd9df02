"""`veneer serve --train` registers the training service with the server here: routes, names of
models, permissions, metrics and shutdown (``serve/extension.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer import models
from veneer.serve.access import Key
from veneer.serve.extension import Extension
from veneer.serve.training import live, rest, routes
from veneer.serve.training.run_trainer import Turn
from veneer.serve.training.training_service import Training, open_training

#: the most bytes of a body with training data; clients are configured to send less than a third
MAX_BODY = 16 * 2**20


class TrainingExtension(Extension):
    """The training service as the server's core sees it."""

    routers = (routes.router, routes.numbered, rest.router, live.router)
    path_prefix = "/api/v1"
    secret_path = "/api/v1/files/"  # the path of a file contains its token
    public_paths = ("/api/v1/healthz", secret_path)
    key_prefix = "tml-"  # the tinker SDK requires it
    max_body = MAX_BODY
    model_prefix = "tinker://"

    def __init__(self, training: Training) -> None:
        self.training = training

    @property
    def ready(self) -> bool:
        return self.training.worker.ready

    async def resolve_model(self, key: Key, model: str) -> dict[str, float]:
        return await live.requested_run(self.training, key, model)

    async def reserve_tokens(self, key: Key, count: int) -> Callable[[int], None]:
        return await self.training.reserve_tokens(key, count)

    def drain(self) -> None:
        self.training.worker.close()  # waiting requests stay on the disk for the next server

    def close(self) -> None:
        self.training.close()


class TrainingPlugin:
    """Lets clients of the tinker SDK train; their runs are stored in ``folder``, and at most
    ``resident`` of them are in memory."""

    def __init__(self, folder: str | Path, resident: int = 50) -> None:
        self.folder, self.resident, self.turn = folder, resident, Turn()

    def extend(self, service: Any, model: Any) -> TrainingExtension:
        base = service.source
        tokenizer = str(models.folder_of(base)) if base.startswith("package:") else base
        training = open_training(
            self.folder, service, model, self.turn, tokenizer=tokenizer, resident=self.resident
        )
        live.watch(service.metrics, training)
        return TrainingExtension(training)
