"""The metrics page that Prometheus reads at ``/metrics``. It has requests, tokens, loads and memory
for each adapter, and histograms of times for the server as a whole.

The label of a series is the name of a registered adapter, "base", "blend" (a request with several
adapters) or "unloaded" (an adapter that was removed meanwhile). So clients cannot create labels,
and the series of an adapter end when the adapter is removed. (An adapter that is itself called
"base" has the label "adapter:base".) At most ``MAX_LABELLED`` adapters, those with the most
requests, have a label of their own; all others are counted together as "other", which bounds the
size of the page.

A histogram consists of a dozen series, and a server has hundreds of adapters. So each adapter has
only counters, and a histogram covers all adapters. ``?adapters=0`` leaves out adapters' labels
and gives sums over adapters. Names and bounds of the histograms are vLLM's.
"""

from __future__ import annotations

import math
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

BASE, BLEND, UNLOADED, OVERFLOW = "base", "blend", "unloaded", "other"
#: the label under which the counts of removed series are kept. The page does not show it, but
#: includes the counts in sums over adapters.
REMOVED = ""
#: the most adapters that have a label of their own
MAX_LABELLED = 64
#: an adapter takes over the label of another once it has this many times as many requests
TAKEOVER_FACTOR = 2

#: upper bounds of histogram buckets, in seconds
LOAD_BUCKETS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
NEXT_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


class Metrics:
    """The metrics of a server, as an observer of the engine and the bank. Any thread may call the
    methods, which are cheap. ``is_registered(name)``: whether an adapter is registered.
    ``max_labelled``: the most adapters that have a label of their own."""

    def __init__(
        self,
        is_registered: Callable[[str], bool] = lambda name: True,
        max_labelled: int = MAX_LABELLED,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._is_registered, self._max_labelled = is_registered, max_labelled
        self._lock = threading.RLock()  # guards ``_labelled`` and each series with an adapter label
        self._labelled: set[str] = set()  # adapters with a label of their own
        self._request_counts: Counts[str] = Counts()  # by adapter, with or without a label

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, help_text, registry=registry, buckets=buckets)

        self.requests = counter(
            "veneer_requests", "Answers that ended, by outcome.", "adapter", "outcome"
        )
        self.prompt_tokens = counter(
            "veneer_prompt_tokens", "Tokens of prompts that were read.", "adapter"
        )
        self.generated_tokens = counter("veneer_generated_tokens", "Tokens of answers.", "adapter")
        self.queue_seconds = histogram(
            "veneer_request_queue_time_seconds", "From a request to its start.", REQUEST_BUCKETS
        )
        self.first_token_seconds = histogram(
            "veneer_time_to_first_token_seconds",
            "From a request to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self.next_token_seconds = histogram(
            "veneer_inter_token_latency_seconds", "From a token to the next.", NEXT_TOKEN_BUCKETS
        )
        self.request_seconds = histogram(
            "veneer_e2e_request_latency_seconds", "From a request to its end.", REQUEST_BUCKETS
        )
        self.load_seconds = histogram("veneer_adapter_load_seconds", "Time to load.", LOAD_BUCKETS)
        self.events = {
            "load": counter("veneer_adapter_loads", "Adapters loaded into memory.", "adapter"),
            "evict": counter("veneer_adapter_evictions", "Adapters put out of memory.", "adapter"),
            "fail": counter("veneer_adapter_load_failures", "Loads that failed.", "adapter"),
        }
        self.responses = counter("veneer_http_responses", "HTTP answers by status.", "status")
        self.prefix_queries = counter(
            "veneer_prefix_cache_queries", "Prompts' tokens that were looked up."
        )
        self.prefix_hits = counter(
            "veneer_prefix_cache_hits", "Prompts' tokens that were in the cache."
        )
        self.preemptions = counter(
            "veneer_num_preemptions", "Answers that gave their memory to others for a time."
        )
        self.ready = Gauge("veneer_ready", "1 if the server takes requests.", registry=registry)
        token_counters = (self.prompt_tokens, self.generated_tokens)
        self._adapter_counters = (self.requests, *token_counters, *self.events.values())

    def started(self, blend: Mapping[str, float], seconds: float) -> None:
        self.queue_seconds.observe(seconds)

    def looked_up(self, blend: Mapping[str, float], prompt_tokens: int, cached_tokens: int) -> None:
        self.prefix_queries.inc(prompt_tokens)
        self.prefix_hits.inc(cached_tokens)

    def preempted(self, blend: Mapping[str, float]) -> None:
        self.preemptions.inc()

    def first_token(self, blend: Mapping[str, float], seconds: float) -> None:
        self.first_token_seconds.observe(seconds)

    def next_token(self, blend: Mapping[str, float], seconds: float) -> None:
        """``seconds``: the time since the previous token of the same answer."""
        self.next_token_seconds.observe(seconds)

    def tokens(self, blend: Mapping[str, float], prompt_count: int, generated_count: int) -> None:
        if prompt_count:
            self._count(self.prompt_tokens, blend, prompt_count)
        if generated_count:
            self._count(self.generated_tokens, blend, generated_count)

    def finished(self, blend: Mapping[str, float], reason: str, seconds: float) -> None:
        self.request_seconds.observe(seconds)
        if len(blend) == 1:
            self._count_request(next(iter(blend)))
        self._count(self.requests, blend, 1, reason)

    def event(self, kind: str, name: str, seconds: float) -> None:
        """Count an event of the bank (``Bank.on_event``). ``kind``: "load", "evict", "fail" or
        "remove"; ``name``: the adapter's; ``seconds``: the duration of a load."""
        if kind in self.events:
            self._count(self.events[kind], {name: 1.0}, 1)
        if kind == "load":
            self.load_seconds.observe(seconds)
        if kind == "remove" and not self._is_registered(name):
            with self._lock:
                self._request_counts.pop(name, None)
                self._remove_series(name)

    def _count(
        self, counter: Counter, blend: Mapping[str, float], amount: float, *labels: str
    ) -> None:
        with self._lock:
            counter.labels(self.label(blend), *labels).inc(amount)

    def label(self, blend: Mapping[str, float]) -> str:
        """The label under which a request is counted; ``blend`` has its adapter weights by name. A
        registered adapter without a label of its own gets one here, unless ``max_labelled``
        adapters have one."""
        if len(blend) != 1:
            return BLEND if blend else BASE
        (name,) = blend
        with self._lock:
            if not self._is_registered(name):
                return UNLOADED
            if name not in self._labelled:
                if len(self._labelled) >= self._max_labelled:
                    return OVERFLOW
                self._labelled.add(name)
        return _label_of(name)

    def _count_request(self, name: str) -> None:
        """Count a request of an adapter. Once an adapter without a label has ``TAKEOVER_FACTOR``
        times the requests of the least requested labelled one, it takes over that label. The factor
        keeps labels from changing often."""
        with self._lock:
            if not self._is_registered(name):
                return
            self._request_counts[name] += 1
            if name in self._labelled or len(self._labelled) < self._max_labelled:
                return
            request_counts = self._request_counts
            least_requested = min(self._labelled, key=request_counts.__getitem__)
            if request_counts[name] >= TAKEOVER_FACTOR * max(1, request_counts[least_requested]):
                self._remove_series(least_requested)
                self._labelled.add(name)

    def _remove_series(self, name: str) -> None:
        """Remove an adapter's series. Their counts go to the label ``REMOVED``, so that no sum over
        adapters decreases."""
        self._labelled.discard(name)
        label = _label_of(name)
        for counter in self._adapter_counters:
            for sample in next(iter(counter.collect())).samples:
                if sample.labels.get("adapter") == label and sample.name.endswith("_total"):
                    counter.labels(**{**sample.labels, "adapter": REMOVED}).inc(sample.value)
            counter.remove_by_labels({"adapter": label})

    def watch(self, engine: Any, bank: Any) -> None:
        """Add gauges to the page. They read ``engine`` (or an embedder) and ``bank`` whenever the
        page is requested."""

        def cache_bytes() -> int:  # an encoder has no cache
            return getattr(engine, "cache_bytes", 0)

        def cache_share() -> float:
            return cache_bytes() / getattr(engine, "cache_memory", math.inf)

        def resident_sizes() -> list[int]:
            return [entry.bytes for entry in bank.status() if entry.resident]

        for name, help_text, read_value in (
            ("veneer_running", "Answers that are being written.", lambda: engine.running),
            ("veneer_waiting", "Requests that wait.", lambda: engine.waiting),
            (
                "veneer_registered_adapters",
                "Adapters that can be used.",
                lambda: len(bank.status()),
            ),
            ("veneer_resident_adapters", "Adapters in memory.", lambda: len(resident_sizes())),
            (
                "veneer_resident_bytes",
                "Bytes of the adapters in memory.",
                lambda: sum(resident_sizes()),
            ),
            ("veneer_kv_cache_bytes", "Bytes of keys and values, with prefixes.", cache_bytes),
            ("veneer_kv_cache_usage_perc", "Their share of --cache-memory, 0 to 1.", cache_share),
        ):
            Gauge(name, help_text, registry=self.registry).set_function(read_value)
        self.registry.register(_ResidentBytes(self, bank))

    def page(self, *, adapters: bool = True) -> bytes:
        """The page in Prometheus' text format. ``adapters=False`` gives sums over all adapters."""
        registry: Any = SimpleNamespace(collect=partial(_shown_metrics, self.registry, adapters))
        return generate_latest(registry)


class _ResidentBytes(Collector):
    """Collects the bytes of each adapter in memory. Adapters without a label of their own are
    counted together, as "other"."""

    def __init__(self, metrics: Metrics, bank: Any) -> None:
        self._metrics, self._bank = metrics, bank

    def collect(self) -> Iterator[Metric]:
        bytes_by_label: Counts[str] = Counts()
        for entry in self._bank.status():
            if entry.resident:
                bytes_by_label[self._metrics.label({entry.name: 1.0})] += entry.bytes
        family = GaugeMetricFamily(
            "veneer_adapter_resident_bytes", "Bytes of an adapter in memory.", labels=["adapter"]
        )
        for label, byte_count in bytes_by_label.items():
            family.add_metric([label], byte_count)
        yield family


def _shown_metrics(registry: CollectorRegistry, by_adapter: bool) -> Iterator[Metric]:
    """The metrics of a registry as the page shows them; sums over all adapters unless
    ``by_adapter``. The creation times of series are left out: they would be a third of the page."""
    for metric in registry.collect():
        shown_metric = Metric(metric.name, metric.documentation, metric.type, metric.unit)
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample in metric.samples:
            is_hidden = by_adapter and sample.labels.get("adapter") == REMOVED
            if not is_hidden and not sample.name.endswith("_created"):
                labels = tuple(
                    label for label in sample.labels.items() if by_adapter or label[0] != "adapter"
                )
                sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
        for (name, labels), value in sums.items():
            shown_metric.add_sample(name, dict(labels), value)
        yield shown_metric


def _label_of(name: str) -> str:
    """The label of an adapter: its name, or "adapter:NAME" if the name is one of the labels with
    another meaning."""
    return f"adapter:{name}" if name in (BASE, BLEND, UNLOADED, OVERFLOW) else name


def merge_pages(pages: Mapping[str, bytes]) -> bytes:
    """Merge the metrics pages of several servers. ``pages``: by server name, which each sample gets
    as its label ``replica``."""
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
