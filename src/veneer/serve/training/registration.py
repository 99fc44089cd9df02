"""Add the training service to the server, for `veneer serve --train`: routes, names of models,
permissions, metrics and shutdown (``serve/extension.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer import models
from veneer.serve.access import Key
from veneer.serve.extension import Extension
from veneer.serve.training import live, rest, routes
from veneer.serve.training.run_trainer import FairLock
from veneer.serve.training.training_service import Training, open_training

#: the largest size of a request body with training data, in bytes. Clients are configured to send
#: less than a third of it (``routes.CLIENT_SETTINGS``).
MAX_BODY = 16 * 2**20


class TrainingExtension(Extension):
    """Connects the training service to the core of the server."""

    routers = (routes.router, routes.numbered_router, rest.router, live.router)
    path_prefix = "/api/v1"
    secret_path = "/api/v1/files/"  # the path of a file contains a secret token
    public_paths = ("/api/v1/healthz", secret_path)
    key_prefix = "tml-"  # the tinker SDK accepts no other API keys
    max_body = MAX_BODY
    model_prefix = "tinker://"

    def __init__(self, training: Training) -> None:
        self.training = training

    @property
    def ready(self) -> bool:
        return self.training.worker.ready

    async def resolve_model(self, key: Key, model: str) -> dict[str, float]:
        return await live.blend_of_model(self.training, key, model)

    def check_model(self, key: Key, model: str) -> None:
        live.check_model(self.training, key, model)

    async def reserve_tokens(self, key: Key, count: int) -> Callable[[int], None]:
        return await self.training.reserve_tokens(key, count)

    def drain(self) -> None:
        self.training.worker.close()  # waiting requests stay on the disk for the next server

    def close(self) -> None:
        self.training.close()


class TrainingPlugin:
    """Creates the ``TrainingExtension`` of a server. Runs are stored in ``folder``; at most
    ``max_resident`` runs are in memory."""

    def __init__(self, folder: str | Path, max_resident: int = 50) -> None:
        self.folder, self.max_resident, self.turn = folder, max_resident, FairLock()

    def extend(self, service: Any, model: Any) -> TrainingExtension:
        base = service.source
        tokenizer = str(models.folder_of(base)) if base.startswith("package:") else base
        training = open_training(
            self.folder,
            service,
            model,
            self.turn,
            tokenizer=tokenizer,
            max_resident=self.max_resident,
        )
        live.register_metrics(service.metrics, training)
        return TrainingExtension(training)
