"""Each experiment runs as a toy, and its page can be written from such runs; the recorded pages are
those of `make docs`, which `make check` holds. The rule is tested in test_study.py, an experiment's
arithmetic in a file of its name."""

from __future__ import annotations

import json
from functools import cache
from xml.etree import ElementTree

import pytest
import yaml
from experiments.page import paragraphs, write_page
from experiments.study import FAILED, HELD, OPEN, ROOT, Fixed, Tuned, cell_id, complete_runs

from experiments import NAMES, RUN_ORDER, load_experiment
from veneer.train.config import make_config

#: numbers that a toy may lack: a run of two steps reaches no target
NUMBERS = {"forgetting": {"rise": 0.1}}


def scale_numbers(numbers, factor):
    """The same numbers, a little larger, so that seeds differ."""
    if isinstance(numbers, dict):
        return {key: scale_numbers(number, factor) for key, number in numbers.items()}
    if isinstance(numbers, list):
        return [scale_numbers(number, factor) for number in numbers]
    return numbers * factor if isinstance(numbers, float) else numbers


def toy_runner(name, experiment):
    """A function that makes the run of a cell: each setting runs once as a toy, and other seeds and
    rates have about its numbers. The middle rate of a grid is the best."""

    @cache
    def run_setting(text):
        cell = json.loads(text)
        return json.loads(json.dumps(experiment.run(cell))) | NUMBERS.get(name, {})

    def run(cell):
        first = {**cell, **({"rate": start_rates(cell)[1], "seed": 0} if "arm" in cell else {})}
        if isinstance(experiment.plan, Fixed) and "seed" in cell:
            first["seed"] = experiment.plan.cells[0]["seed"]
        toy = {**first, **experiment.toy, "toy": True}
        numbers = scale_numbers(run_setting(json.dumps(toy)), 1 + 0.001 * cell.get("seed", 0))
        if "arm" in cell:
            numbers["aside"] = abs(cell["rate"] - start_rates(cell)[1])
        shown = {**cell, **experiment.toy}
        shown |= {key: cell[key] for key in ("arm", "seed") if key in cell}
        shown |= {"rate": cell["rate"]} if "arm" in cell else {}
        return {**shown, **numbers, "cpu": 1.0, "cell": cell_id(cell)}

    def start_rates(cell):
        return sorted(experiment.plan.rates[cell["arm"]])

    return run


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_and_its_page_is_written(name):
    experiment, runs = load_experiment(name), []
    complete_runs(experiment, runs, toy_runner(name, experiment), lambda: None)
    content = {"runs": runs, "machine": "a machine", "versions": {"torch": "2.0"}}
    text, drawings, claims = write_page(name, experiment, content)
    assert claims
    for claim in claims:
        assert claim.verdict in (HELD, FAILED, OPEN)
        assert claim.text in text
        assert claim.evidence in text
    for file, drawing in drawings.items():
        assert f"]({file})" in text
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert "## Measured" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_gives_all_arms_the_same_and_three_seeds(name):
    plan = load_experiment(name).plan
    if isinstance(plan, Tuned):
        assert plan.arms.keys() == plan.rates.keys()
        assert {len(rates) for rates in plan.rates.values()} == {3}
        assert len({*plan.seeds}) >= 3
        assert not {*plan.seeds} & {*plan.choosing_seeds}
    else:
        ids = [cell_id(cell) for cell in plan.cells]
        assert len({*ids}) == len(ids)
        assert plan.exact or len({cell["seed"] for cell in plan.cells}) >= 3


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments" / "full").glob("*.yaml")), ids=lambda file: file.name
)
def test_configurations_of_full_size_are_those_of_the_commands(file):
    settings = yaml.safe_load(file.read_text())
    settings.pop("sweep", None)
    assert make_config(settings).base


def test_every_configuration_of_full_size_is_named_by_a_page():
    named = {file for name in NAMES for file in load_experiment(name).full}
    assert named == {file.name for file in (ROOT / "experiments" / "full").glob("*.yaml")}


def test_every_record_belongs_to_an_experiment():
    records = {file.stem for file in (ROOT / "experiments" / "results").glob("*.json")}
    assert records <= {*NAMES}
    assert {*RUN_ORDER} | {"latency"} == {*NAMES}


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(SystemExit, match=r"the experiment .nothing."):
        load_experiment("nothing")


def test_prose_is_wrapped_and_code_is_not():
    code = f"```console\n{'x' * 120}\n```"
    prose, block = paragraphs(f"\n{'word ' * 40}\n\n{code}\n")
    assert max(map(len, prose.splitlines())) <= 100
    assert block == code
