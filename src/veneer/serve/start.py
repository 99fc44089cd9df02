"""From a base and adapters on the disk to a service: what `veneer serve` does, and each replica of
a cluster."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from veneer import models
from veneer.bank import Bank
from veneer.errors import ConfigError, listing, nearest
from veneer.models.remote_code import with_trust_of_config
from veneer.models.sampling_defaults import FILE, sampling_defaults
from veneer.serve.access import Keyring
from veneer.serve.catalogue import Catalogue, folders
from veneer.serve.embed import Embedder
from veneer.serve.engine import Engine
from veneer.serve.metrics import Metrics
from veneer.serve.service import Service
from veneer.serve.settings import Settings, given
from veneer.store.remote import is_remote

log = logging.getLogger("veneer.serve")


def prepare_process() -> None:
    """What this process needs, before a model runs in it."""
    # oneDNN keeps a kernel for each shape of a 16-bit product, 1,024 of them by default: hundreds
    # of MiB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # whoever loads an adapter or answers HTTP gives Python back to the engine after so many
    # seconds, not after 5 ms
    sys.setswitchinterval(1e-4)


@with_trust_of_config
def start(settings: Settings, keys: Keyring) -> Service:
    """Load the base and start what answers. ``Service.close`` ends it."""
    _must_be_there(settings)
    causal = models.is_causal(settings.base)
    loaded: Any = (_causal if causal else _encoder)(settings)
    model, tokenizer = loaded.model, loaded.tokenizer
    sampling = sampling_defaults(model)
    if ignored := sampling.describe([*(sampling.others), "repetition_penalty"]):
        log.warning("Not applied here, of the base's %s: %s", FILE, ignored)
    own = models.context_length(settings.base) if causal else loaded.length
    length = min(settings.length, own or settings.length)
    bank = Bank(model, settings.memory)
    catalogue = Catalogue(settings.adapters, bank, settings.name, settings.pin)
    metrics = Metrics(catalogue.known)
    bank.on_event = metrics.event
    for adapter in dict.fromkeys(settings.pin):
        bank.pin(adapter)
    catalogue.follow_pins()
    engine = embedder = turn = None
    rows = settings.rows
    if causal:
        if settings.train is not None:
            from veneer.serve.training.trainer import (
                Turn,
            )  # torch's optimisers and TRL: not where nothing trains

            turn = Turn()
        engine = Engine(
            model,
            tokenizer,
            bank,
            rows=rows,
            length=length,
            queue=settings.queue,
            observer=metrics,
            turn=turn,
        )
        engine.start()
        length = engine.length
    else:
        pad = tokenizer.pad_token_id or 0
        embedder = Embedder(
            model,
            bank,
            pad=pad,
            how=loaded.pooling,
            normal=loaded.normal,
            rows=rows,
            observer=metrics,
        )
    metrics.watch(engine or embedder, bank)
    catalogue.watch()
    service = Service(
        base=settings.name, source=settings.base, tokenizer=tokenizer, bank=bank, catalogue=catalogue, keys=keys,
        metrics=metrics, length=length, vocabulary=int(model.config.get_text_config().vocab_size), engine=engine,
        embedder=embedder, sampling=sampling, timeout=settings.timeout, dtype=str(model.dtype).removeprefix("torch."),
    )  # fmt: skip
    if settings.train is not None:
        try:
            service.training = _training(settings, service, model, turn)
        except BaseException:
            service.close()
            raise
    return service


def _must_be_there(settings: Settings) -> None:
    """Judge the adapters before the base is converted or loaded; of a remote place, that takes a
    download."""
    if settings.adapters is not None and is_remote(settings.adapters):
        return
    known = {} if settings.adapters is None else folders(settings.adapters)
    if unknown := [name for name in settings.pin if name not in known]:
        found = f"--pin, and no adapter named {unknown[0]!r}{nearest(unknown[0], known)}"
        raise ConfigError(
            found,
            f"one of {listing(known, 8)}" if known else "an adapter",
            "check --pin and --adapters",
        )


def _training(settings: Settings, service: Service, model: Any, turn: Any) -> Any:
    try:
        from veneer.serve.training.live import watch
        from veneer.serve.training.training import open_training
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--train without {error.name}", "it", "pip install 'veneer[tinker]'"
        ) from error
    base = settings.base
    tokenizer = str(models.folder_of(base)) if base.startswith("package:") else base
    made = open_training(
        str(settings.train), service, model, turn, tokenizer=tokenizer, resident=settings.runs
    )
    watch(service.metrics, made)
    return made


def _causal(settings: Settings) -> Any:
    return models.load_base(
        settings.base, precision=settings.precision, quantize=settings.quantize, device=settings.device,
        device_map=settings.device_map, attention=settings.attention,
    )  # fmt: skip


def _encoder(settings: Settings) -> Any:
    others = {name: getattr(settings, name) for name in ("quantize", "device_map", "attention")}
    if flags := given(others):
        found = f"{listing(flags)} for {settings.base}, an encoder"
        raise ConfigError(found, "a causal language model", "leave them out")
    return models.load_encoder(settings.base, precision=settings.precision, device=settings.device)
