"""Make the Grafana board of `veneer serve`, examples/grafana.json, from the table below.

Each panel has a title, a unit of Grafana, and queries by their legend. Every series of /metrics is
on the board; tests/serve/test_grafana.py compares the names.
"""

from __future__ import annotations

import json
from typing import Any

RATE = "[$__rate_interval]"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def rate(series: str, label: str = "") -> str:
    """A query: the sum of a counter's rate, for each value of ``label`` if it is not empty."""
    return f"sum{f' by ({label})' if label else ''} (rate({series}{RATE}))"


def quantiles(series: str) -> dict[str, str]:
    """Queries of the quantiles of a histogram, by legend."""
    buckets = rate(f"{series}_bucket", "le")
    return {name: f"histogram_quantile({share}, {buckets})" for name, share in QUANTILES.items()}


def largest(query: str) -> str:
    """A query: the ten largest series of ``query``."""
    return f"topk(10, {query})"


#: (title, unit, queries by legend) of each panel
PANELS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Tokens a second",
        "short",
        {
            "prompts": rate("veneer_prompt_tokens_total"),
            "answers": rate("veneer_generated_tokens_total"),
        },
    ),
    (
        "Answers that are written, requests that wait",
        "short",
        {"running": "sum(veneer_running)", "waiting": "sum(veneer_waiting)"},
    ),
    ("Time to first token", "s", quantiles("veneer_time_to_first_token_seconds")),
    ("Time between tokens", "s", quantiles("veneer_inter_token_latency_seconds")),
    ("Time in the queue", "s", quantiles("veneer_request_queue_time_seconds")),
    ("Time of a request", "s", quantiles("veneer_e2e_request_latency_seconds")),
    (
        "Answers a second, by outcome",
        "reqps",
        {"{{outcome}}": rate("veneer_requests_total", "outcome")},
    ),
    (
        "HTTP answers a second, by status",
        "reqps",
        {"{{status}}": rate("veneer_http_responses_total", "status")},
    ),
    (
        "Tokens of answers a second, by adapter",
        "short",
        {"{{adapter}}": largest(rate("veneer_generated_tokens_total", "adapter"))},
    ),
    (
        "Memory, by adapter",
        "bytes",
        {"{{adapter}}": largest("sum by (adapter) (veneer_adapter_resident_bytes)")},
    ),
    (
        "Memory of all adapters",
        "bytes",
        {"all": "sum(veneer_resident_bytes)"},
    ),
    (
        "Adapters",
        "short",
        {
            "registered": "max(veneer_registered_adapters)",
            "in memory": "sum(veneer_resident_adapters)",
        },
    ),
    (
        "Loads a second",
        "short",
        {
            "loaded": rate("veneer_adapter_loads_total"),
            "put out of memory": rate("veneer_adapter_evictions_total"),
            "failed": rate("veneer_adapter_load_failures_total"),
        },
    ),
    ("Time to load an adapter", "s", quantiles("veneer_adapter_load_seconds")),
    (
        "Tokens of prompts a second, looked up and found in the cache",
        "short",
        {
            "looked up": rate("veneer_prefix_cache_queries_total"),
            "found": rate("veneer_prefix_cache_hits_total"),
        },
    ),
    ("Memory for keys and values", "bytes", {"all": "sum(veneer_kv_cache_bytes)"}),
    (
        "Keys and values, share of --cache-memory",
        "percentunit",
        {"largest": "max(veneer_kv_cache_usage_perc)"},
    ),
    (
        "Answers a second that gave their memory to others",
        "short",
        {"preempted": rate("veneer_num_preemptions_total")},
    ),
    ("Servers that take requests", "short", {"ready": "sum(veneer_ready)"}),
]

#: size of a panel in units of Grafana's grid, which has 24 columns
WIDTH, HEIGHT = 12, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel(number: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    row, column = divmod(number, 2)
    targets = [
        {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
        for i, (legend, query) in enumerate(queries.items())
    ]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": row * HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def board() -> str:
    """The board as JSON for Grafana's import."""
    data_source = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    content = {
        "title": "Veneer",
        "uid": "veneer-serve",
        "tags": ["veneer"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{**data_source, "query": "prometheus"}]},
        "panels": [panel(number, *row) for number, row in enumerate(PANELS)],
    }
    return json.dumps(content, indent=2) + "\n"
