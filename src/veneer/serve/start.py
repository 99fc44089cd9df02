"""Start a service from a base and adapters on disk, for `veneer serve` and each replica of a
cluster."""

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
from veneer.serve.catalogue import Catalogue, served_folders
from veneer.serve.embed import Embedder
from veneer.serve.engine import Engine
from veneer.serve.extension import Plugin
from veneer.serve.metrics import Metrics
from veneer.serve.service import Service
from veneer.serve.settings import Settings, must_have_keys_for_any_origin, used_flags
from veneer.serve.tools.choose import check_parser
from veneer.serve.tracing import open_tracer
from veneer.store.remote import is_remote

log = logging.getLogger("veneer.serve")


def prepare_process() -> None:
    """Set up this process before a model runs in it."""
    # oneDNN keeps a kernel for each shape of a 16-bit product, 1,024 of them by default: hundreds
    # of MiB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # threads that load adapters or answer HTTP release the GIL to the engine after so many seconds,
    # not after 5 ms
    sys.setswitchinterval(1e-4)


@with_trust_of_config
def start(settings: Settings, keys: Keyring, plugin: Plugin | None = None) -> Service:
    """Load the base and start the engine, extended by ``plugin``. ``Service.close`` ends it."""
    must_have_keys_for_any_origin(settings, keys.is_open)
    check_parser(settings.tool_call_parser)
    _must_be_there(settings)
    tracer = open_tracer(settings.otlp_endpoint, settings.name)
    causal = models.is_causal(settings.base)
    loaded: Any = (_causal if causal else _encoder)(settings)
    model, tokenizer = loaded.model, loaded.tokenizer
    sampling = sampling_defaults(model)
    if ignored := sampling.describe([*(sampling.further_fields), "repetition_penalty"]):
        log.warning("Not applied here, of the base's %s: %s", FILE, ignored)
    base_length = models.context_length(settings.base) if causal else loaded.length
    length = min(settings.length, base_length or settings.length)
    bank = Bank(model, settings.memory)
    catalogue = Catalogue(settings.adapters, bank, settings.name, settings.pin)
    metrics = Metrics(catalogue.known)
    bank.on_event = metrics.event
    for adapter in dict.fromkeys(settings.pin):
        bank.pin(adapter)
    catalogue.follow_pins()
    engine = embedder = None
    rows = settings.rows
    if causal:
        engine = Engine(
            model,
            tokenizer,
            bank,
            rows=rows,
            length=length,
            queue=settings.queue,
            observer=metrics,
            turn=None if plugin is None else plugin.turn,
            cache_memory=settings.cache_memory,
            prefix_cache=settings.prefix_cache,
            gap=settings.gap,
        )
        engine.start()
        length = engine.length
    else:
        embedder = _embedder(loaded, bank, rows, metrics)
    metrics.watch(engine or embedder, bank)
    catalogue.watch()
    service = Service(
        base=settings.name, source=settings.base, tokenizer=tokenizer, bank=bank,
        catalogue=catalogue, keys=keys, metrics=metrics, length=length,
        vocabulary=int(model.config.get_text_config().vocab_size), engine=engine, embedder=embedder,
        sampling=sampling, timeout=settings.timeout, dtype=str(model.dtype).removeprefix("torch."),
        cors=settings.cors, docs=settings.docs, tracer=tracer,
        tool_call_parser=settings.tool_call_parser,
    )  # fmt: skip
    if plugin is not None:
        try:
            service.extensions.append(plugin.extend(service, model))
        except BaseException:
            service.close()
            raise
    return service


def _must_be_there(settings: Settings) -> None:
    """Check the adapters before the base is converted or loaded. Those of a remote place are
    downloaded for it."""
    if settings.adapters is not None and is_remote(settings.adapters):
        return
    adapters = {} if settings.adapters is None else served_folders(settings.adapters)
    if unknown := [name for name in settings.pin if name not in adapters]:
        problem = f"--pin, and no adapter named {unknown[0]!r}{nearest(unknown[0], adapters)}"
        raise ConfigError(
            problem,
            f"one of {listing(adapters, 8)}" if adapters else "an adapter",
            "check --pin and --adapters",
        )


def _causal(settings: Settings) -> Any:
    return models.load_base(
        settings.base, precision=settings.precision, quantize=settings.quantize,
        device=settings.device, device_map=settings.device_map, attention=settings.attention,
    )  # fmt: skip


def _embedder(encoder: Any, bank: Bank, rows: int, metrics: Metrics) -> Embedder:
    return Embedder(
        encoder.model,
        bank,
        pad=encoder.tokenizer.pad_token_id or 0,
        pooling=encoder.pooling,
        normal=encoder.normal,
        rows=rows,
        observer=metrics,
        labels=encoder.labels,
    )


def _encoder(settings: Settings) -> Any:
    names = ("quantize", "device_map", "attention", "cache_memory", "gap", "tool_call_parser")
    options = {name: getattr(settings, name) for name in names}
    options["no_prefix_cache"] = None if settings.prefix_cache else True
    if flags := used_flags(options):
        problem = f"{listing(flags)} for {settings.base}, an encoder"
        raise ConfigError(problem, "a causal language model", "leave them out")
    return models.load_encoder(
        settings.base, precision=settings.precision, device=settings.device, with_head=True
    )
