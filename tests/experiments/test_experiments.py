"""Each experiment runs at its smoke size, and its page can be made of it; the recorded pages are
those of `make docs`, which `make check` holds. What an experiment's own arithmetic needs is tested
beside this file."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import yaml
from experiments.experiment import table
from experiments.page import page
from experiments.run import ROOT, alone, machine

from experiments import NAMES, find
from veneer.train.config import make_config


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_small(name):
    experiment = find(name)
    runs = [json.loads(json.dumps(alone(name, cell))) for cell in experiment.cells(True)]
    claims, plots = experiment.claims(runs), experiment.plots(runs)
    text = page(
        name,
        experiment,
        {"runs": runs, **machine()},
        claims,
        [f"{name}-{plot}.svg" for plot in plots],
    )
    assert claims
    assert all(claim.what in text and claim.found in text for claim in claims)
    for drawing in plots.values():
        assert ElementTree.fromstring(drawing).tag.endswith("svg")


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_settings_of_one_run_each(name):
    for smoke in (False, True):
        texts = [json.dumps(cell) for cell in find(name).cells(smoke)]
        assert texts
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments" / "full").glob("*.yaml")), ids=lambda file: file.name
)
def test_configurations_of_full_size_are_those_of_the_commands(file):
    settings = yaml.safe_load(file.read_text())
    settings.pop("sweep", None)
    assert make_config(settings).base


def test_every_configuration_of_full_size_is_named_by_a_page():
    named = {file for name in NAMES for file in find(name).full}
    assert named == {file.name for file in (ROOT / "experiments" / "full").glob("*.yaml")}


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(SystemExit, match=r"the experiment .nothing."):
        find("nothing")


def test_a_table_is_markdown():
    assert table(("a", "b"), [("x", 1)]) == "| a | b |\n|---|---:|\n| x | 1 |"
