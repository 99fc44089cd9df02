"""The Grafana board in examples/: its queries name series that /metrics has, and all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families
from scripts import grafana_board

from veneer.serve.metrics import Metrics

FILE = Path(__file__).resolve().parents[2] / "examples" / "grafana.json"


def families():
    """The metrics of a server that has answered something, by name, with the names of their
    samples."""
    metrics = Metrics()
    entry = SimpleNamespace(name="french", resident=True, bytes=1)
    bank = SimpleNamespace(status=lambda: [entry])
    metrics.watch(SimpleNamespace(running=0, waiting=0), bank)
    metrics.tokens({"french": 1.0}, 1, 1)
    metrics.finished({"french": 1.0}, "stop", 0.1)
    for kind in metrics.events:
        metrics.event(kind, "french", 0.1)
    metrics.responses.labels("200").inc()
    page = metrics.page().decode()
    return {
        family.name: {sample.name for sample in family.samples}
        for family in text_string_to_metric_families(page)
    }


def test_the_file_is_what_the_table_makes():
    assert FILE.read_text() == grafana_board.board()


def test_the_board_has_the_series_of_the_server_and_no_others():
    queries = [
        target["expr"]
        for panel in json.loads(FILE.read_text())["panels"]
        for target in panel["targets"]
    ]
    asked = {name for query in queries for name in re.findall(r"\bveneer_\w+", query)}
    exported = families()
    assert asked <= set().union(*exported.values())
    unused = [name for name, samples in exported.items() if not samples & asked]
    assert unused == []


def test_labels_that_the_board_groups_by_are_there():
    page = "\n".join(query for _, _, queries in grafana_board.PANELS for query in queries.values())
    grouped = set(re.findall(r"by \((\w+)\)", page))
    assert grouped == {"le", "adapter", "outcome", "status"}


def test_panels_stand_in_their_places():
    panels = json.loads(FILE.read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
