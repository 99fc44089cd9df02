"""Load a base model and start the service for it and its adapters, for `veneer serve` and for each
replica of a cluster."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from veneer import models
from veneer.bank import Bank
from veneer.errors import ConfigError, listing
from veneer.kernels import batched, onednn
from veneer.models.load import padding_token
from veneer.models.remote_code import with_trust_of_config
from veneer.models.sampling_defaults import CONFIG_FILE, sampling_defaults
from veneer.serve.access import Keyring
from veneer.serve.catalogue import Catalogue, check_pinned_names, served_folders
from veneer.serve.embed import Embedder
from veneer.serve.engine import Engine
from veneer.serve.extension import Plugin
from veneer.serve.metrics import Metrics
from veneer.serve.service import Service
from veneer.serve.settings import (
    LENGTH,
    QUEUE,
    ROWS,
    TEXT_QUEUE,
    Settings,
    must_have_keys_for_any_origin,
    used_flags,
)
from veneer.serve.tools.choose import check_parser
from veneer.serve.tracing import open_tracer
from veneer.store.remote import is_remote

log = logging.getLogger("veneer.serve")


def prepare_process() -> None:
    """Set up the process in which a model will run. Call it before the model computes anything."""
    onednn.limit_kernel_caches(onednn.SERVING)
    # the interval after which a thread that loads adapters or answers HTTP must hand the GIL to the
    # engine's thread: 0.1 ms, because Python's default of 5 ms would slow down each step
    sys.setswitchinterval(1e-4)


@with_trust_of_config
def start(settings: Settings, keys: Keyring, plugin: Plugin | None = None) -> Service:
    """Load the base and start its engine, or its embedder if it is an encoder. ``Service.close``
    stops everything. ``plugin``: adds an extension to the service. ``ConfigError``: the settings
    contradict each other or do not fit the base."""
    must_have_keys_for_any_origin(settings, keys.is_open)
    check_parser(settings.tool_call_parser)
    _check_adapters_exist(settings)
    tracer = open_tracer(settings.otlp_endpoint, settings.name)
    is_causal = models.is_causal(settings.base)
    loaded_base: Any = (_load_causal if is_causal else _load_encoder)(settings)
    model, tokenizer = loaded_base.model, loaded_base.tokenizer
    sampling = sampling_defaults(model)
    if ignored_fields := sampling.describe([*(sampling.further_fields), "repetition_penalty"]):
        log.warning("Not applied here, of the base's %s: %s", CONFIG_FILE, ignored_fields)
    base_length = models.context_length(settings.base) if is_causal else loaded_base.length
    asked_length = settings.length or LENGTH
    length = min(asked_length, base_length or asked_length)
    batched.compile_row_loop(max(model.parameters(), key=torch.numel))
    bank = Bank(model, settings.memory)
    catalogue = Catalogue(settings.adapters, bank, settings.name, settings.pin)
    metrics = Metrics(catalogue.known)
    bank.on_event = metrics.event
    for adapter in dict.fromkeys(settings.pin):
        bank.pin(adapter)
    catalogue.follow_pins()
    engine = embedder = None
    rows = settings.rows or ROWS
    if is_causal:
        model_lock = None if plugin is None else plugin.model_lock
        engine = _start_engine(settings, loaded_base, bank, rows, length, metrics, model_lock)
        length = engine.length
    else:
        embedder = _make_embedder(loaded_base, bank, rows, settings.queue or TEXT_QUEUE, metrics)
    metrics.watch(engine or embedder, bank)
    catalogue.watch()
    service = Service(
        base=settings.name,
        source=settings.base,
        tokenizer=tokenizer,
        bank=bank,
        catalogue=catalogue,
        keys=keys,
        metrics=metrics,
        length=length,
        vocabulary=int(model.config.get_text_config().vocab_size),
        engine=engine,
        embedder=embedder,
        sampling=sampling,
        timeout=settings.timeout,
        dtype=str(model.dtype).removeprefix("torch."),
        cors=settings.cors,
        docs=settings.docs,
        tracer=tracer,
        tool_call_parser=settings.tool_call_parser,
    )
    if plugin is not None:
        try:
            service.extensions.append(plugin.extend(service, model))
        except BaseException:
            service.close()
            raise
    return service


def _check_adapters_exist(settings: Settings) -> None:
    """Check the adapter folder and the names in ``--pin`` early, because loading the base, which
    comes next, takes long. If ``--adapters`` is a remote address, nothing is checked, since that
    would download the adapters. ``ConfigError``: there is no adapter of a pinned name."""
    if settings.adapters is not None and is_remote(settings.adapters):
        return
    adapters = {} if settings.adapters is None else served_folders(settings.adapters)
    check_pinned_names(settings.pin, adapters)


def _load_causal(settings: Settings) -> Any:
    return models.load_base(
        settings.base,
        precision=settings.precision,
        quantize=settings.quantize,
        device=settings.device,
        device_map=settings.device_map,
        attention=settings.attention,
    )


def _start_engine(
    settings: Settings,
    loaded_base: Any,
    bank: Bank,
    rows: int,
    length: int,
    metrics: Metrics,
    model_lock: Any,
) -> Engine:
    """Create and start the engine. ``model_lock``: a context manager that the engine enters for
    each step, so that an extension does not change the model meanwhile; or None."""
    engine = Engine(
        loaded_base.model,
        loaded_base.tokenizer,
        bank,
        rows=rows,
        length=length,
        queue=settings.queue or QUEUE,
        observer=metrics,
        model_lock=model_lock,
        cache_memory=settings.cache_memory,
        prefix_cache=settings.prefix_cache,
        gap=settings.gap,
    )
    engine.start()
    return engine


def _make_embedder(encoder: Any, bank: Bank, rows: int, queue: int, metrics: Metrics) -> Embedder:
    # a classifier of a decoder finds the last token of a text by the padding token of its config
    pad_id = getattr(encoder.model.config, "pad_token_id", None)
    return Embedder(
        encoder.model,
        bank,
        metrics,
        pad_id=padding_token(encoder.tokenizer) if pad_id is None or pad_id < 0 else pad_id,
        pooling=encoder.pooling,
        normal=encoder.normal,
        rows=rows,
        queue=queue,
        label_count=encoder.labels,
    )


def _load_encoder(settings: Settings) -> Any:
    names = ("quantize", "device_map", "attention", "cache_memory", "gap", "tool_call_parser")
    options = {name: getattr(settings, name) for name in names}
    options["no_prefix_cache"] = None if settings.prefix_cache else True
    if flags := used_flags(options):
        raise ConfigError(
            f"{listing(flags)} for {settings.base}, an encoder",
            "a causal language model",
            "leave them out",
        )
    return models.load_encoder(
        settings.base, precision=settings.precision, device=settings.device, with_head=True
    )
