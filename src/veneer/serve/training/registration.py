"""Add the training service to the server, for `veneer serve --train`: routes, names of models,
permissions, metrics and shutdown (``serve/extension.py``).

Requests for completions, chats, responses and messages can then name these models:

    tinker://RUN/KIND/NAME    a checkpoint
    tinker://RUN/now          the run's current weights
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from veneer import models
from veneer.errors import ConfigError
from veneer.serve.access import Key
from veneer.serve.extension import Extension
from veneer.serve.refusal import no_such_model
from veneer.serve.training import live, rest, routes
from veneer.serve.training.lookups import find_checkpoint, find_run
from veneer.serve.training.operations import parse_current_run
from veneer.serve.training.quotas import check_quota
from veneer.serve.training.run_trainer import FairLock
from veneer.serve.training.store import Store
from veneer.serve.training.training_service import Training

#: the largest size of a request body with training data, in bytes. Clients are configured to send
#: less than a third of it (``routes.CLIENT_SETTINGS``).
MAX_BODY_BYTES = 16 * 2**20


class TrainingExtension(Extension):
    """Connects the training service to the core of the server."""

    routers = (routes.router, routes.numbered_router, rest.router, live.router)
    path_prefix = "/api/v1"
    secret_path = "/api/v1/files/"  # the next segment of a file's URL is a secret token
    public_paths = ("/api/v1/healthz", secret_path)
    key_prefix = "tml-"  # the tinker SDK only accepts API keys with this prefix
    max_body = MAX_BODY_BYTES
    model_prefix = "tinker://"

    def __init__(self, training: Training) -> None:
        self.training = training

    @property
    def ready(self) -> bool:
        return self.training.worker.ready

    async def resolve_model(self, key: Key, model: str) -> dict[str, float]:
        """The adapter that a model name tinker://… stands for, as {its name in the bank: 1.0}. The
        bank holds the adapters with which the engine generates. For tinker://RUN/now, the run's
        current weights are first copied into the bank. ``Refusal``: the key may not read the
        adapter, or has no tokens left today."""
        training = self.training
        self.check_model(key, model)
        check_quota(training.store, key, "tokens")
        run_id = parse_current_run(model)
        if run_id is not None:
            publish_future = training.worker.submit(partial(live.publish, training, run_id), run_id)
            bank_name = await asyncio.shield(asyncio.wrap_future(publish_future))
            await training.write(training.record_use, bank_name)
        else:
            bank_name = await training.write(training.register_checkpoint, model)
        return {bank_name: 1.0}

    def check_model(self, key: Key, model: str) -> None:
        """Check that a key may read the adapter of a model name tinker://… ``Refusal``: it may not,
        or there is no such adapter."""
        if not key.train:
            raise no_such_model(model)
        run_id = parse_current_run(model)
        if run_id is None:
            find_checkpoint(self.training, key, model)
        else:
            find_run(self.training, key, run_id)

    async def reserve_tokens(self, key: Key, count: int) -> Callable[[int], None]:
        return await self.training.reserve_tokens(key, count)

    def drain(self) -> None:
        self.training.worker.close()  # waiting requests stay on the disk for the next server

    def close(self) -> None:
        self.training.close()


class TrainingPlugin:
    """Creates the ``TrainingExtension`` of a server. Runs are stored in ``folder``; at most
    ``max_resident`` of them are in memory at one time. The engine and the trainer hold
    ``model_lock`` while they use the model."""

    def __init__(self, folder: str | Path, max_resident: int = 50) -> None:
        self.folder, self.max_resident, self.model_lock = folder, max_resident, FairLock()

    def extend(self, service: Any, model: Any) -> TrainingExtension:
        """Create and start the training service. ``service``: the running server; ``model``: its
        base model. ``ConfigError``: the model is an encoder, or the folder cannot be used."""
        if service.engine is None:
            raise ConfigError(
                "an encoder to train",
                "a causal language model",
                "serve another base, or leave out --train",
            )
        base_source = service.source
        tokenizer_source = (
            str(models.folder_of(base_source))
            if base_source.startswith("package:")
            else base_source
        )
        store = Store(self.folder)
        try:
            training = Training(
                service,
                model,
                self.model_lock,
                store,
                tokenizer_source=tokenizer_source,
                max_resident=self.max_resident,
            )
        except BaseException:
            store.close()
            raise
        training.start()
        service.metrics.registry.register(live.TrainingMetrics(training))
        return TrainingExtension(training)
