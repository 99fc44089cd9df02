"""The rule of the experiments: grids grow until a best rate lies inside, what breaks the rule is
refused, and a claim has three ends."""

from __future__ import annotations

import json
import math

import pytest
from experiments.page import write_page
from experiments.study import (
    FAILED,
    HELD,
    OPEN,
    Claim,
    Experiment,
    Fixed,
    RuleError,
    Tuned,
    all_of,
    cell_id,
    exceeds,
    stays_within,
)

from experiments import study

#: the rate at which each arm is best, far from where its grid starts
OPTIMA = {"a": 1e-3, "b": 64e-3}
PLAN = Tuned(
    arms={"a": {"size": 1}, "b": {"size": 2}},
    rates={"a": [1e-3, 2e-3, 4e-3], "b": [1e-3, 2e-3, 4e-3]},
    shared={"steps": 5},
)


def run_toy(cell, optima=OPTIMA):
    distance = abs(math.log2(cell["rate"] / optima[cell["arm"]]))
    result = distance + 0.01 * cell["seed"]
    return {**cell, "aside": distance, "result": result, "cpu": 0.0, "cell": cell_id(cell)}


def complete(plan, run=run_toy):
    runs: list = []
    experiment = Experiment("t", "about", plan, lambda cell: {}, lambda _: "", lambda _: [])
    study.complete_runs(experiment, runs, run, lambda: None)
    return runs


def test_a_grid_grows_until_its_best_lies_inside():
    runs = complete(PLAN)
    for arm, optimum in OPTIMA.items():
        rates = sorted(PLAN.scores(arm, runs))
        assert PLAN.best_rate(arm, runs) == pytest.approx(optimum)
        assert rates[0] < optimum < rates[-1]
    PLAN.check(runs)


def test_all_arms_get_as_many_grid_points():
    runs = complete(PLAN)
    lengths = {len(PLAN.scores(arm, runs)) for arm in PLAN.arms}
    assert lengths == {8}  # 1e-3 to 128e-3 for b; a needs four
    assert PLAN.best_rate("a", runs) == pytest.approx(1e-3)


def test_each_choosing_seed_has_its_best_inside():
    plan = Tuned({"a": {"steps": 1}}, {"a": [1.0, 2.0, 4.0]}, choosing_seeds=(100, 101))

    def run(cell):  # seed 101 alone prefers a high rate, and by little
        best = 8.0 if cell["seed"] == 101 else 2.0
        weight = 0.1 if cell["seed"] == 101 else 1.0
        return {**run_toy(cell, {"a": best}), "aside": weight * abs(math.log2(cell["rate"] / best))}

    runs = complete(plan, run)
    assert sorted(plan.scores("a", runs)) == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert plan.best_rate("a", runs) == 2.0
    assert plan.best_rates("a", runs) == [2.0, 8.0]


def test_results_are_of_other_seeds_at_the_best_rate():
    runs = complete(PLAN)
    results = PLAN.results("b", runs)
    assert [run["seed"] for run in results] == [0, 1, 2]
    assert {run["rate"] for run in results} == {PLAN.best_rate("b", runs)}
    assert sum(run["seed"] != 100 for run in runs) == 3 * len(PLAN.arms)


def test_a_run_that_diverged_is_the_worst():
    def run(cell):
        diverged = cell["rate"] > 0.1 if cell["arm"] == "b" else cell["rate"] > 3e-3
        return {**run_toy(cell), **({"aside": None} if diverged else {})}

    runs = complete(PLAN, run)
    PLAN.check(runs)
    assert PLAN.best_rate("a", runs) == pytest.approx(1e-3)


def test_a_best_that_never_lies_inside_is_an_error():
    with pytest.raises(RuleError, match="no best rate of 'a' inside"):
        complete(
            Tuned({"a": {"steps": 1}}, {"a": [1.0, 2.0]}), lambda cell: run_toy(cell, {"a": 1e9})
        )


def test_a_second_call_goes_on():
    runs = complete(PLAN)
    rest = runs[:4]
    made = []

    def run(cell):
        made.append(cell)
        return run_toy(cell)

    experiment = Experiment("t", "about", PLAN, lambda cell: {}, lambda _: "", lambda _: [])
    study.complete_runs(experiment, rest, run, lambda: None)
    assert len(made) == len(runs) - 4
    assert {run["cell"] for run in rest} == {run["cell"] for run in runs}


def test_a_record_is_kept_after_each_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    cells = [{"seed": seed} for seed in range(3)]
    attempts = []

    def run(cell):
        attempts.append(cell)
        if len(attempts) == 2:
            raise RuntimeError("killed")
        return {"loss": math.inf}

    experiment = Experiment("t", "about", Fixed(cells), run, lambda _: "", lambda _: [])
    with pytest.raises(RuntimeError, match="killed"):
        study.record("toy", experiment)
    path = study.record("toy", experiment)
    assert [cell["seed"] for cell in attempts] == [0, 1, 1, 2]
    content = json.loads(path.read_text())
    assert [run["loss"] for run in content["runs"]] == [None] * 3
    assert {"machine", "versions"} <= content.keys()


# ---- refusals ------------------------------------------------------------------------------------


def refuse_page(plan, runs, problem):
    experiment = Experiment(
        "t",
        "about",
        plan,
        lambda cell: {},
        lambda _: "a table",
        lambda _: [Claim("c", "s", "e", HELD)],
    )
    with pytest.raises(RuleError, match=problem):
        write_page("toy", experiment, {"runs": runs, "machine": "m", "versions": {"torch": "2"}})


def test_a_page_is_refused_where_a_best_is_at_an_edge():
    runs = [run for run in complete(PLAN) if run["rate"] <= 64e-3]
    refuse_page(PLAN, runs, "b: the best rate is at an edge")


def test_a_page_is_refused_with_fewer_than_three_seeds():
    runs = [run for run in complete(PLAN) if run["seed"] != 2]
    refuse_page(PLAN, runs, "a: 2 seeds of results; b: 2 seeds of results")
    cells = [{"seed": seed} for seed in range(2)]
    runs = [{**cell, "cell": cell_id(cell)} for cell in cells]
    refuse_page(Fixed(cells), runs, "2 seeds")


def test_a_page_is_refused_where_seeds_chose_what_they_report():
    plan = Tuned(PLAN.arms, PLAN.rates, PLAN.shared, seeds=(100, 1, 2))
    refuse_page(plan, complete(plan), "a rate is reported on the seeds that chose it")


def test_a_page_is_refused_where_budgets_differ():
    shorter = [run for run in complete(PLAN) if run["arm"] == "b" or run["rate"] < 8e-3]
    refuse_page(PLAN, shorter, "grids of different lengths")
    plan = Tuned({"a": {"steps": 5}, "b": {"steps": 6}}, PLAN.rates)
    refuse_page(plan, complete(plan), "the arms differ in steps")


def test_counts_need_no_seeds():
    Fixed([{"model": "x"}], exact=True).check([{"model": "x", "cell": cell_id({"model": "x"})}])


# ---- the three ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "limit", "verdict"),
    [
        ([1.0, 1.1, 0.9], 0.0, HELD),
        ([-1.0, -1.1, -0.9], 0.0, FAILED),
        ([0.1, 1.0, -0.5], 0.0, OPEN),
        ([1.0, 1.0, 1.0], 0.5, HELD),
        ([1.0, 1.1], 0.0, OPEN),  # two seeds tell nothing
        ([], 0.0, OPEN),
    ],
)
def test_a_claim_that_a_number_is_above_a_limit(values, limit, verdict):
    assert exceeds(values, limit) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.001, -0.001, 0.0], HELD),
        ([0.5, 0.51, 0.49], FAILED),
        ([0.01, 0.03, -0.01], OPEN),
        ([0.0, 0.0], OPEN),
    ],
)
def test_a_claim_that_a_number_is_near_zero(values, verdict):
    assert stays_within(values, 0.02) == verdict


def test_the_interval_is_students():
    middle, half = study.interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
    assert study.interval([1.0] * 20)[1] == 0.0
    assert study.show([1.0, 2.0, 3.0], 2, "+") == "+2.00 ± 2.48"


def test_a_claim_with_several_parts():
    assert all_of([HELD, HELD]) == HELD
    assert all_of([HELD, OPEN]) == OPEN
    assert all_of([OPEN, FAILED]) == FAILED
    assert all_of([]) == OPEN


def test_differences_are_between_runs_of_one_seed():
    runs = [{"seed": seed, "f1": seed + 1.0} for seed in (0, 1, 2)]
    baseline = [{"seed": seed, "f1": float(seed)} for seed in (2, 1)]
    assert study.differences(runs, baseline, "f1") == [1.0, 1.0]


def test_a_table_is_markdown():
    assert study.table(("a", "b"), [("x", 1)]) == "| a | b |\n|---|---:|\n| x | 1 |"


def test_the_table_of_rates_marks_the_best():
    text = study.rates_table(PLAN, complete(PLAN))
    assert "**0.001: 0.000**" in text
    assert "**0.064: 0.000**" in text
    assert "seed 100" in text
