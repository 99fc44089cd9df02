"""The page that Prometheus reads at ``/metrics``: per adapter requests, tokens, loads and memory;
of the server, times.

A label is the name of a registered adapter, "base", or "blend"; so clients cannot make new ones,
and when an adapter goes its series go with it. (An adapter that is itself called "base" or "blend"
has the label "adapter:base".) At most ``MOST`` adapters have series of their own, those that are
asked for most; the others are counted together as "other", so the page has a bound.

A histogram is a dozen series, and a server has hundreds of adapters; so an adapter has counters
alone, and histograms are of all together. ``?adapters=0`` leaves the adapters' names out and gives
sums, whose size does not grow with them. Names and bounds of the histograms are vLLM's.
"""

from __future__ import annotations

import math
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

BASE, BLEND, UNLOADED, OTHER = "base", "blend", "unloaded", "other"
#: the label of counts of adapters whose series were removed: part of the sums, but not shown
GONE = ""
#: adapters that have series of their own
MOST = 64
#: an adapter takes the place of another when it has this many times as many requests
LEAD = 2

LOADS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
NEXT_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


class Metrics:
    """An observer of the engine and of the bank. Its methods are cheap and may be called from any
    thread. ``known(name)`` tells whether an adapter is registered; ``most`` is the number of
    adapters with series of their own."""

    def __init__(self, known: Callable[[str], bool] = lambda name: True, most: int = MOST) -> None:
        self.registry = registry = CollectorRegistry()
        self._known, self._most = known, most
        self._lock = threading.Lock()  # guards ``_places`` and every series with an adapter label
        self._places: set[str] = set()  # adapters with series of their own
        self._uses: Counts[str] = Counts()  # requests by adapter, with or without a place

        def count(name: str, help_: str, *labels: str) -> Counter:
            return Counter(name, help_, labels, registry=registry)

        def seconds(name: str, help_: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, help_, registry=registry, buckets=buckets)

        self.requests = count(
            "veneer_requests", "Answers that ended, by outcome.", "adapter", "outcome"
        )
        self.prompt_tokens = count(
            "veneer_prompt_tokens", "Tokens of prompts that were read.", "adapter"
        )
        self.generated_tokens = count("veneer_generated_tokens", "Tokens of answers.", "adapter")
        self.queue = seconds(
            "veneer_request_queue_time_seconds", "From a request to its start.", REQUEST
        )
        self.first = seconds(
            "veneer_time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN
        )
        self.between = seconds(
            "veneer_inter_token_latency_seconds", "From a token to the next.", NEXT_TOKEN
        )
        self.end_to_end = seconds(
            "veneer_e2e_request_latency_seconds", "From a request to its end.", REQUEST
        )
        self.load_seconds = seconds("veneer_adapter_load_seconds", "Time to load.", LOADS)
        self.events = {
            "load": count("veneer_adapter_loads", "Adapters loaded into memory.", "adapter"),
            "evict": count("veneer_adapter_evictions", "Adapters put out of memory.", "adapter"),
            "fail": count("veneer_adapter_load_failures", "Loads that failed.", "adapter"),
        }
        self.responses = count("veneer_http_responses", "HTTP answers by status.", "status")
        self.prefix_queries = count(
            "veneer_prefix_cache_queries", "Prompts' tokens that were looked up."
        )
        self.prefix_hits = count(
            "veneer_prefix_cache_hits", "Prompts' tokens that were in the cache."
        )
        self.preemptions = count(
            "veneer_num_preemptions", "Answers that gave their memory to others for a time."
        )
        self.ready = Gauge("veneer_ready", "1 if the server takes requests.", registry=registry)
        tokens = (self.prompt_tokens, self.generated_tokens)
        self._labelled = (self.requests, *tokens, *self.events.values())

    def queued(self, blend: Mapping[str, float]) -> None:
        """Do nothing: requests are counted when they end, and gauges show the queue."""

    def started(self, blend: Mapping[str, float], waited: float) -> None:
        self.queue.observe(waited)

    def looked_up(self, blend: Mapping[str, float], tokens: int, cached: int) -> None:
        self.prefix_queries.inc(tokens)
        self.prefix_hits.inc(cached)

    def preempted(self, blend: Mapping[str, float]) -> None:
        self.preemptions.inc()

    def first_token(self, blend: Mapping[str, float], seconds: float) -> None:
        self.first.observe(seconds)

    def next_token(self, blend: Mapping[str, float], seconds: float) -> None:
        """``seconds``: since the previous token of the same answer."""
        self.between.observe(seconds)

    def tokens(self, blend: Mapping[str, float], prompt: int, generated: int) -> None:
        if prompt:
            self._count(self.prompt_tokens, blend, prompt)
        if generated:
            self._count(self.generated_tokens, blend, generated)

    def finished(self, blend: Mapping[str, float], reason: str, seconds: float) -> None:
        self.end_to_end.observe(seconds)
        if len(blend) == 1:
            self._count_use(next(iter(blend)))
        self._count(self.requests, blend, 1, reason)

    def event(self, kind: str, name: str, seconds: float) -> None:
        """``Bank.on_event``."""
        if kind in self.events:
            self._count(self.events[kind], {name: 1.0}, 1)
        if kind == "load":
            self.load_seconds.observe(seconds)
        if kind == "remove" and not self._known(name):
            with self._lock:
                self._uses.pop(name, None)
                self._give_up_place(name)

    def _count(
        self, counter: Counter, blend: Mapping[str, float], amount: float, *labels: str
    ) -> None:
        with self._lock:
            counter.labels(self._label(blend), *labels).inc(amount)

    def label(self, blend: Mapping[str, float]) -> str:
        """The label of the adapter that a blend is charged to."""
        with self._lock:
            return self._label(blend)

    def _label(self, blend: Mapping[str, float]) -> str:
        if not blend:
            return BASE
        if len(blend) > 1:
            return BLEND
        (name,) = blend
        if not self._known(name):
            return UNLOADED
        if name not in self._places:
            if len(self._places) >= self._most:
                return OTHER
            self._places.add(name)
        return _label_of(name)

    def _count_use(self, name: str) -> None:
        """Count a request of an adapter. An adapter without a place replaces the least requested
        one with a place, once it has ``LEAD`` times its requests, so that places change rarely."""
        with self._lock:
            if not self._known(name):
                return
            self._uses[name] += 1
            if name in self._places or len(self._places) < self._most:
                return
            least = min(self._places, key=self._uses.__getitem__)
            if self._uses[name] >= LEAD * max(1, self._uses[least]):
                self._give_up_place(least)
                self._places.add(name)

    def _give_up_place(self, name: str) -> None:
        """Remove an adapter's series. Their counts stay in the sums, so that no sum decreases."""
        self._places.discard(name)
        label = _label_of(name)
        for counter in self._labelled:
            for sample in next(iter(counter.collect())).samples:
                if sample.labels.get("adapter") == label and sample.name.endswith("_total"):
                    counter.labels(**{**sample.labels, "adapter": GONE}).inc(sample.value)
            counter.remove_by_labels({"adapter": label})

    def watch(self, engine: Any, bank: Any) -> None:
        """Add the gauges that read the engine and the bank when the page is requested."""

        def cache_bytes() -> int:  # an encoder has no cache
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
        self.registry.register(_Residency(self, bank))

    def page(self, *, adapters: bool = True) -> bytes:
        """The page in Prometheus' text format; without ``adapters``, sums over all adapters."""
        return generate_latest(_Shown(self.registry, adapters))  # pyright: ignore[reportArgumentType]


class _Residency(Collector):
    """The bytes of each adapter in memory; adapters without series of their own are added up."""

    def __init__(self, metrics: Metrics, bank: Any) -> None:
        self._metrics, self._bank = metrics, bank

    def collect(self) -> Iterator[Metric]:
        sizes: Counts[str] = Counts()
        for entry in self._bank.status():
            if entry.resident:
                sizes[self._metrics.label({entry.name: 1.0})] += entry.bytes
        help_ = "Bytes of an adapter in memory."
        family = GaugeMetricFamily("veneer_adapter_resident_bytes", help_, labels=["adapter"])
        for label, size in sizes.items():
            family.add_metric([label], size)
        yield family


@dataclass
class _Shown:
    """The metrics of a registry without the creation times of series, which are a third of the
    page."""

    registry: CollectorRegistry
    adapters: bool

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in metric.samples:
                hidden = self.adapters and sample.labels.get("adapter") == GONE
                if not hidden and not sample.name.endswith("_created"):
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
    return f"adapter:{name}" if name in (BASE, BLEND, UNLOADED, OTHER) else name


def merged(pages: Mapping[str, bytes]) -> bytes:
    """Merge the pages of several servers, and label each sample with its server (``replica``)."""
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
