"""The page that Prometheus reads at ``/metrics``: per adapter requests, tokens and loads; of the
whole, times and memory.

A label is the name of a registered adapter, "base", or "blend"; so clients cannot make new ones,
and when an adapter goes its series go with it. (An adapter that is itself called "base" or "blend"
has the label "adapter:base".)

A histogram is a dozen series, and a server has hundreds of adapters; so an adapter has counters
alone, and histograms are of all together. ``?adapters=0`` leaves the adapters' names out and gives
sums, whose size does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

BASE, BLEND, OTHER = "base", "blend", "unloaded"
WAITS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)


class Metrics:
    """An observer of the engine and of the bank. Its methods are cheap and may be called in any
    thread."""

    def __init__(self, known: Callable[[str], bool] = lambda name: True) -> None:
        self.registry = CollectorRegistry()
        self._known = known
        adapter: Any = ["adapter"]
        own: Any = {"registry": self.registry}
        self.requests = Counter(
            "veneer_requests", "Answers that ended, by outcome.", ["adapter", "outcome"], **own
        )
        self.prompt_tokens = Counter(
            "veneer_prompt_tokens", "Tokens of prompts that were read.", adapter, **own
        )
        self.generated_tokens = Counter(
            "veneer_generated_tokens", "Tokens of answers.", adapter, **own
        )
        self.queue = Histogram(
            "veneer_queue_seconds", "From request to start.", buckets=WAITS, **own
        )
        self.first = Histogram(
            "veneer_first_token_seconds", "To the first token.", buckets=WAITS, **own
        )
        self.load_seconds = Histogram(
            "veneer_adapter_load_seconds", "Time to load.", buckets=WAITS, **own
        )
        self.events = {
            "load": Counter("veneer_adapter_loads", "Adapters loaded into memory.", adapter, **own),
            "evict": Counter(
                "veneer_adapter_evictions", "Adapters put out of memory.", adapter, **own
            ),
            "fail": Counter("veneer_adapter_load_failures", "Loads that failed.", adapter, **own),
        }
        self.responses = Counter(
            "veneer_http_responses", "HTTP answers by status.", ["status"], **own
        )
        self.prefix_queries = Counter(
            "veneer_prefix_cache_queries", "Prompts' tokens that were looked up.", **own
        )
        self.prefix_hits = Counter(
            "veneer_prefix_cache_hits", "Prompts' tokens that were in the cache.", **own
        )
        self.preemptions = Counter(
            "veneer_num_preemptions", "Answers that gave their memory to others for a time.", **own
        )
        self.ready = Gauge("veneer_ready", "1 if the server takes requests.", **own)
        self._labelled = (
            self.requests,
            self.prompt_tokens,
            self.generated_tokens,
            *self.events.values(),
        )

    def queued(self, blend: Mapping[str, float]) -> None:
        """Nothing is counted before a request ends; gauges say what waits."""

    def started(self, blend: Mapping[str, float], waited: float) -> None:
        self.queue.observe(waited)

    def looked_up(self, blend: Mapping[str, float], tokens: int, cached: int) -> None:
        self.prefix_queries.inc(tokens)
        self.prefix_hits.inc(cached)

    def preempted(self, blend: Mapping[str, float]) -> None:
        self.preemptions.inc()

    def first_token(self, blend: Mapping[str, float], seconds: float) -> None:
        self.first.observe(seconds)

    def tokens(self, blend: Mapping[str, float], prompt: int, generated: int) -> None:
        label = self.label(blend)
        if prompt:
            self.prompt_tokens.labels(label).inc(prompt)
        if generated:
            self.generated_tokens.labels(label).inc(generated)

    def finished(self, blend: Mapping[str, float], reason: str, seconds: float) -> None:
        self.requests.labels(self.label(blend), reason).inc()

    def event(self, kind: str, name: str, seconds: float) -> None:
        """``Bank.on_event``."""
        if kind in self.events:
            self.events[kind].labels(self.label({name: 1.0})).inc()
        if kind == "load":
            self.load_seconds.observe(seconds)
        if kind == "remove" and not self._known(name):
            for metric in self._labelled:
                metric.remove_by_labels({"adapter": _label_of(name)})

    def label(self, blend: Mapping[str, float]) -> str:
        if not blend:
            return BASE
        if len(blend) > 1:
            return BLEND
        (name,) = blend
        return _label_of(name) if self._known(name) else OTHER

    def watch(self, engine: Any, bank: Any) -> None:
        """Add the gauges that are read off engine and bank when somebody asks."""

        def cache_bytes() -> int:  # an encoder has no keys and values to keep
            return getattr(engine, "cache_bytes", 0)

        def cache_share() -> float:
            return cache_bytes() / getattr(engine, "cache_memory", math.inf)

        def resident() -> list[int]:
            return [entry.bytes for entry in bank.status() if entry.resident]

        for name, help_, read in (
            ("veneer_running", "Answers that are being written.", lambda: engine.running),
            ("veneer_waiting", "Requests that wait.", lambda: engine.waiting),
            (
                "veneer_registered_adapters",
                "Adapters that can be used.",
                lambda: len(bank.status()),
            ),
            ("veneer_resident_adapters", "Adapters in memory.", lambda: len(resident())),
            ("veneer_resident_bytes", "Bytes of the adapters in memory.", lambda: sum(resident())),
            ("veneer_kv_cache_bytes", "Bytes of keys and values, with prefixes.", cache_bytes),
            ("veneer_kv_cache_usage_perc", "Their share of --cache-memory, 0 to 1.", cache_share),
        ):
            Gauge(name, help_, registry=self.registry).set_function(read)

    def page(self, *, adapters: bool = True) -> bytes:
        """In Prometheus' text format; without ``adapters``, sums over them."""
        return generate_latest(_Shown(self.registry, adapters))  # pyright: ignore[reportArgumentType]


@dataclass
class _Shown:
    """The metrics of a registry, without the times at which series were made, which are a third of
    all."""

    registry: CollectorRegistry
    adapters: bool

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    labels = tuple(
                        label
                        for label in sample.labels.items()
                        if self.adapters or label[0] != "adapter"
                    )
                    sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
            for (name, labels), value in sums.items():
                shown.add_sample(name, dict(labels), value)
            yield shown


def _label_of(name: str) -> str:
    return f"adapter:{name}" if name in (BASE, BLEND, OTHER) else name


def merged(pages: Mapping[str, bytes]) -> bytes:
    """The pages of several servers as one, each sample with the label ``replica``: the name of its
    server."""
    families: dict[str, Metric] = {}
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            merged_family = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type, family.unit)
            )
            for sample in family.samples:
                merged_family.add_sample(
                    sample.name, {**sample.labels, "replica": replica}, sample.value
                )
    registry: Any = SimpleNamespace(collect=families.values)
    return generate_latest(registry)
