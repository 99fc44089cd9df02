"""A sweep: its candidates are the runs that `veneer train` makes of them alone; killed, it ends as
one that was not; the better candidates go on."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tests.support.forked import Program
from tests.support.launched import start, wait_for_all
from tests.support.tiny import write_rows
from tests.train.conftest import config_of

from veneer.adapter_files.folder import read
from veneer.errors import ConfigError, OutputExistsError, TargetError, TrainingError, VeneerError
from veneer.train import checkpoint
from veneer.train.config import load_config
from veneer.train.evaluate import evaluate
from veneer.train.run import fit
from veneer.train.sweep import cohort, held_out, sweep_run
from veneer.train.sweep.cohort import Cohort
from veneer.train.sweep.conclusions import find_edges
from veneer.train.sweep.held_out import evaluate_runs
from veneer.train.sweep.search import Search
from veneer.train.sweep.sweep_record import FINISHED, Candidate, State
from veneer.train.sweep.sweep_run import sweep
from veneer.train.sweep.sweep_settings import make_sweep
from veneer.train.sweep.table import Progress

Make = Callable[..., Any]
GRID = {"rank": [2, 4], "learning_rate": [1e-3, 5e-3]}


def ran(make: Make, output: str, axes: Any, section: Any = None, **changes: Any) -> Any:
    fields = {"eval_every": 4, "epochs": 1, "check": False, **changes}
    keywords = {
        name: fields.pop(name)
        for name in ("keep_going", "on_step", "stop_order", "console")
        if name in fields
    }
    return sweep(
        make(output, **fields),
        make_sweep({"axes": axes, **(section or {})}),
        quiet=True,
        **keywords,
    )


#: what candidates differ in, and settings of their run
ALONE = {
    "rates": ({"learning_rate": [1e-3, 5e-3]}, {}),
    "seeds": ({"seed": [3, 4]}, {"dropout": 0.0, "epochs": 2}),
    "orders": ({"data_seed": [3, 4]}, {"grad_accum": 2, "batch_size": 3, "weight_decay": 0.1}),
    "variants": ({"variant": ["pissa", "dora", "eva"]}, {"schedule": "linear"}),
    "targets": (
        {"targets": ["attention", ["q_proj", "down_proj"]]},
        {"train_also": ["norm"], "max_grad_norm": 0.1},
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_candidate_is_its_run_alone(make: Make, tmp_path: Path, case: str) -> None:
    axes, changes = ALONE[case]
    found = ran(make, "sweep", axes, {"rungs": []}, **changes)
    best = {one["name"]: one for one in found.facts["candidates"]}[found.facts["best"]]
    config = load_config(found.best / "train.yaml")
    assert found.facts["command"] == ["veneer", "train", str(found.best / "train.yaml")]
    assert len({tuple(one["losses"]) for one in found.facts["candidates"]}) == len(
        found.facts["candidates"]
    )
    alone = fit(config, quiet=True)
    assert best["losses"] == pytest.approx(alone.losses, rel=2e-4)
    assert [step for step, _ in best["evaluations"]] == [step for step, _ in alone.eval_losses]
    assert [told["loss"] for _, told in best["evaluations"]] == pytest.approx(
        [loss for _, loss in alone.eval_losses], rel=2e-4
    )


def same(one: Path, other: Path) -> None:
    """Two finished sweeps, to the last bit."""
    facts = [json.loads((output / "sweep.json").read_text()) for output in (one, other)]
    assert facts[0]["candidates"] == facts[1]["candidates"]
    assert facts[0]["best"] == facts[1]["best"]
    folders = [
        load_file(output / "best" / "adapter" / "adapter_model.safetensors")
        for output in (one, other)
    ]
    assert folders[0].keys() == folders[1].keys()
    assert all(torch.equal(folders[0][key], folders[1][key]) for key in folders[0])


def crash_at(*moments: tuple[int, int]) -> Callable[[Any, int], None]:
    """Raise after these steps of these cohorts, as a kill would end it there."""

    def shown(state: Any, steps: int) -> None:
        if (state.cohort, state.step) in moments:
            raise ZeroDivisionError("a crash, as the test asked for")

    return shown


SECTION = {"rungs": [2, 5], "keep": 0.5, "at_once": 3}


@pytest.mark.parametrize(
    ("changes", "moments"),
    [
        ({}, ((0, 3), (1, 1))),
        pytest.param({}, ((0, 1), (0, 3), (0, 9), (1, 1), (1, 6)), marks=pytest.mark.slow),
        pytest.param(
            {"sampler": "TPESampler", "candidates": 5},
            ((0, 3), (0, 9), (1, 6)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["grid", "grid, five times", "optuna"],
)
def test_a_sweep_that_ends_early_goes_on_to_the_same_numbers(
    make: Make, changes: dict[str, Any], moments: tuple[tuple[int, int], ...]
) -> None:
    if changes:
        pytest.importorskip("optuna")
    section = {**SECTION, **changes}
    whole = ran(make, "whole", GRID, section, save_every=2)
    for moment in moments:
        with pytest.raises(ZeroDivisionError):
            ran(make, "broken", GRID, section, save_every=2, on_step=crash_at(moment))
    stopped = ran(make, "broken", GRID, section, save_every=2, stop_order=lambda: True)
    assert stopped.interrupted
    assert stopped.best is not None, "the first cohort's"
    again = ran(make, "broken", GRID, section, save_every=2)
    same(again.output, whole.output)
    left = {path.name for path in again.output.iterdir()}
    assert left == {"run.json", "best", "sweep.json", "report.html"}


def candidates(found: Any) -> dict[str, Any]:
    return {one["name"]: one for one in found.facts["candidates"]}


def test_the_weaker_end_at_rungs_and_free_their_share(make: Make) -> None:
    seen = []

    def shown(state: Any, steps: int) -> None:
        seen.append([one.name for one in state.candidates if one.status == "running"])

    axes = {"learning_rate": [1e-5, 1e-2, 1e-4, 5e-3], "rank": [2, 4]}
    found = ran(
        make,
        "sweep",
        axes,
        {"rungs": [2, 0.5], "keep": 0.5, "at_once": 8},
        max_steps=8,
        on_step=shown,
    )
    assert found.facts["rungs"] == [2, 4]
    assert [len(names) for names in seen] == [8, 4, 4, 2, 2, 2, 2, 2]
    for number in (0, 1, 2):
        at = {name: dict(one["evaluations"])[(2, 4, 8)[number]]["loss"] for name, one in candidates(found).items()
              if len(one["losses"]) >= (2, 4, 8)[number]}  # fmt: skip
        better = sorted(at, key=at.__getitem__)
        assert {*seen[(1, 3, 7)[number]]} == {*better[: (4, 2, 2)[number]]}
    assert found.facts["best"] == min(seen[-1], key=lambda name: candidates(found)[name]["loss"])
    assert {one["status"] for one in found.facts["candidates"]} == {"finished", "ended"}
    assert all(
        one["changes"]["learning_rate"] > 1e-4
        for one in found.facts["candidates"]
        if one["status"] == "finished"
    )


def test_the_best_folder_is_one_of_train(make: Make) -> None:
    found = ran(
        make, "sweep", {"learning_rate": [1e-3, 5e-3], "seed": [0, 1]}, {"rungs": []}, max_steps=4
    )
    alone = fit(make("alone", max_steps=4), quiet=True)
    summary, other = (
        json.loads((folder / "run.json").read_text()) for folder in (found.best, alone.output)
    )
    assert summary.keys() == other.keys()
    assert summary["status"] == "finished"
    metrics, others = (
        json.loads((folder / "metrics.json").read_text()) for folder in (found.best, alone.output)
    )
    assert others.keys() - metrics.keys() == {"seconds", "tokens", "peak_memory_bytes"}
    record, known = (
        read(folder / "adapter").metadata["provenance"] for folder in (found.best, alone.output)
    )
    assert record.keys() == known.keys()
    assert [line["step"] for line in checkpoint.read_log(found.best) if "loss" in line] == [
        1,
        2,
        3,
        4,
    ]
    best = candidates(found)[found.facts["best"]]
    assert metrics["eval_loss"] == best["loss"]
    (one, other) = sorted(found.facts["spread"], key=lambda one: one["changes"]["learning_rate"])
    losses = [
        one["loss"] for one in found.facts["candidates"] if one["changes"]["learning_rate"] == 5e-3
    ]
    assert sorted(losses) == sorted(other["losses"])
    assert one["changes"] == {"learning_rate": 1e-3}
    assert other["mean"] == pytest.approx(sum(losses) / 2)


def test_who_diverges_ends_and_the_others_do_not_notice(make: Make) -> None:
    rates = [1e-3, 1e30]
    found = ran(
        make, "sweep", {"learning_rate": rates}, {"rungs": []}, max_steps=4, max_grad_norm=0.0
    )
    fine = ran(
        make, "fine", {"learning_rate": rates[:1]}, {"rungs": []}, max_steps=4, max_grad_norm=0.0
    )
    one, bad = found.facts["candidates"]
    assert bad["status"] == "failed"
    assert "at step" in bad["note"]
    assert one["losses"] == pytest.approx(fine.facts["candidates"][0]["losses"], rel=1e-5)
    with pytest.raises(TrainingError, match="no candidate that ran to its end"):
        ran(make, "none", {"learning_rate": [1e30]}, {"rungs": []}, max_steps=4, max_grad_norm=0.0)


def test_a_candidate_without_its_targets_is_named_before_any_step(make: Make) -> None:
    axes = {"targets": ["all-linear", "nothing_like_it"], "rank": [2, 10_000]}
    with pytest.raises(
        TargetError, match=r"3 problems(.|\n)*candidate c2 (.|\n)*c3 \(targets nothing_like_it"
    ):
        ran(make, "sweep", axes, {"at_once": 1})
    assert not make("sweep").output.exists()
    found = ran(make, "sweep", axes, {"at_once": 1}, keep_going=True, max_steps=2)
    assert [one["status"] for one in found.facts["candidates"]] == [
        "finished",
        "failed",
        "failed",
        "failed",
    ]
    assert "nothing_like_it" in candidates(found)["c3"]["note"]
    with pytest.raises(TargetError, match="c1"):
        ran(make, "none", {"targets": ["nothing_like_it"]}, keep_going=True)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({}, {"eval_fraction": 0.0}, "nothing to evaluate on"),
        ({}, {"packing": True}, "packing in a sweep"),
        ({}, {"early_stopping": 2, "save_every": 4}, "early_stopping in a sweep"),
        ({}, {"task": "grpo", "reward": ["r.py:f"]}, "task grpo, .* one of classify, reward, seq2seq, sft"),
        ({"sampler": "NoSampler", "candidates": 2}, {}, "sampler 'NoSampler'.*TPESampler"),
        ({"pruner": "NoPruner"}, {}, "pruner 'NoPruner'.*MedianPruner"),
        ({"pruner": {"name": "MedianPruner", "nothing": 1}}, {}, "pruner 'MedianPruner', and .*nothing"),
        ({}, {"optimiser": "galore_adamw"}, "candidate c1: .*galore"),
        ({"rungs": [2, 90]}, {"max_steps": 8}, "rung 90 in a run of 8 steps"),
    ],
)  # fmt: skip
def test_what_a_sweep_has_no_place_for(
    make: Make, section: Any, changes: Any, message: str
) -> None:
    if "sampler" in section or "pruner" in section:
        pytest.importorskip("optuna")
    with pytest.raises(VeneerError, match=message):
        ran(make, "sweep", GRID, section, **changes)
    assert not make("sweep").output.exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"axes": {}}, "axes: dictionary should have at least 1 item"),
        ({"axes": {"rnak": [1]}}, "axis 'rnak' .nearest: 'rank'"),
        ({"axes": {"rank": []}}, "axis 'rank' without values"),
        ({"axes": {"rank": {"low": 4, "high": 2}}, "candidates": 3}, "low 4 and high 2"),
        ({"axes": {"rank": {"low": 0, "high": 2, "log": True}}, "candidates": 3}, "logarithmic"),
        ({"axes": {"rank": {"low": 1, "high": 2}}}, "no `candidates:`"),
        ({"axes": {"rank": {"low": 1, "high": 2}}, "sampler": "grid"}, "sampler grid and axis 'rank', a range"),
        ({"axes": {"rank": [1]}, "sampler": "grid", "candidates": 3}, "sampler grid and candidates: 3"),
        ({"axes": {"rank": [1, 2]}, "candidates": 3}, "candidates: 3, and 2 combinations"),
        ({"axes": {"rank": [1]}, "pruner": "MedianPruner", "rungs": [2]}, "pruner and rungs"),
        ({"axes": {"rank": [1]}, "rungs": [-2]}, "rungs"),
        ({"axes": {"dropout": [0.0, 0.1]}, "judged_by": "training"}, "judged_by training and axis 'dropout'"),
        ({"axes": {"rank": [1]}, "judged_by": "training", "pruner": "MedianPruner"}, "judged_by training and no rungs"),
        ({"axes": {"rank": [1]}, "judged_by": "training", "rungs": []}, "judged_by training and no rungs"),
        ({"axes": {"rank": [1]}, "rung": [2]}, "unknown field 'rung' .nearest: 'rungs'"),
    ],
)  # fmt: skip
def test_a_section_that_is_wrong_says_so(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sweep(section)


def test_another_sweep_is_not_resumed_and_none_is_replaced_unasked(make: Make) -> None:
    section = {"rungs": []}
    with pytest.raises(ZeroDivisionError):
        ran(make, "sweep", GRID, section, max_steps=4, save_every=1, on_step=crash_at((0, 2)))
    with pytest.raises(ConfigError, match="unfinished sweep with another conf"):
        ran(make, "sweep", GRID, {"rungs": [1]}, max_steps=4, save_every=1)
    with pytest.raises(ConfigError, match="rank: was 4, is 3"):
        ran(make, "sweep", GRID, section, max_steps=4, save_every=1, rank=3)
    first = ran(make, "sweep", GRID, section, max_steps=4, save_every=2)
    with pytest.raises(OutputExistsError, match="finished sweep"):
        ran(make, "sweep", GRID, section, max_steps=4)
    with pytest.raises(OutputExistsError, match="no Veneer sweep"):
        ran(make, "sweep/best", GRID, section, max_steps=4)
    with pytest.raises(OutputExistsError, match="no Veneer run"):
        fit(make("sweep", max_steps=4, overwrite=True), quiet=True)
    again = ran(make, "sweep", GRID, section, max_steps=4, overwrite=True)
    assert again.facts["candidates"] == first.facts["candidates"]


def test_a_kill_while_a_sweep_is_removed_leaves_none(make: Make, monkeypatch: Any) -> None:
    first = ran(make, "sweep", GRID, {"rungs": []}, max_steps=4, save_every=2)

    def dies(*paths: Path) -> None:
        shutil.rmtree(paths[0])
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint, "remove", dies)
        ran(make, "sweep", GRID, {"rungs": []}, max_steps=4, overwrite=True)
    assert not (first.output / "best").exists()
    again = ran(make, "sweep", GRID, {"rungs": []}, max_steps=4)
    assert again.facts["candidates"] == first.facts["candidates"]
    assert again.best is not None
    assert again.best.is_dir()


def test_drawn_candidates_are_within_their_ranges_and_the_same_each_time() -> None:
    axes = {
        "rank": {"low": 2, "high": 9},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "seed": [1, 2],
    }
    settings = make_sweep({"axes": axes, "candidates": 40})
    asked = Search(settings, 10).ask(40)
    assert next(iter(asked)) == "c01"
    assert asked == Search(settings, 10).ask(40)
    assert {one["rank"] for one in asked.values()} == {*range(2, 10)}
    rates = [one["learning_rate"] for one in asked.values()]
    assert 1e-4 <= min(rates) < 3e-4
    assert 3e-3 < max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) > 12, "as many of each order of magnitude"


def test_optunas_pruner_ends_candidates(make: Make) -> None:
    pytest.importorskip("optuna")
    axes = {"learning_rate": [1e-2, 1e-5, 8e-3, 2e-5, 9e-3, 3e-5, 1e-5, 1e-5]}
    section = {
        "pruner": {"name": "MedianPruner", "n_startup_trials": 4},
        "at_once": 4,
    }  # of those that finished
    found = ran(make, "sweep", axes, section, max_steps=4, eval_every=1)
    assert [one["status"] for one in found.facts["candidates"]] == [
        *["finished"] * 5,
        *["ended"] * 3,
    ]
    assert found.facts["rungs"] == []
    assert candidates(found)[found.facts["best"]]["changes"]["learning_rate"] > 1e-3


@pytest.mark.parametrize("name", ["classify", "reward"])
def test_a_task_of_one_pass_is_its_run_alone(make: Make, name: str, tmp_path: Path) -> None:
    config, axes = make("sweep", max_steps=4, **rows_of(name, tmp_path)), {"rank": [2, 3]}
    found = sweep(config, make_sweep({"axes": axes, "rungs": []}), quiet=True)
    alone = fit(load_config(Path(found.facts["folder"]) / "train.yaml"), quiet=True)
    best = candidates(found)[found.facts["best"]]
    assert best["losses"] == pytest.approx(alone.losses, rel=1e-4)
    assert best["loss"] == pytest.approx(alone.eval_losses[-1][1], rel=1e-4)
    with pytest.raises(ConfigError, match="axis 'seed', and a head"):
        sweep(
            make("other", max_steps=4, **rows_of(name, tmp_path)),
            make_sweep({"axes": {"seed": [1, 2]}}),
            quiet=True,
        )


def rows_of(task: str, folder: Path) -> dict[str, Any]:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(20) for word in ("yes", "no")]
    if task == "reward":
        rows = [{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(20)]
    return {"task": task, "data": str(write_rows(folder / f"{task}.jsonl", rows))}


def test_a_candidate_that_cannot_begin_later_ends_none_of_the_others(make: Make) -> None:
    """Each alone: the second one's optimiser is refused when the first has been trained."""
    axes = {"optimiser": ["adamw_torch", "galore_adamw", "sgd"]}
    found = ran(make, "sweep", axes, {"at_once": 1}, keep_going=True, max_steps=2)
    assert [one["status"] for one in found.facts["candidates"]] == [
        "finished",
        "failed",
        "finished",
    ]
    assert "galore" in candidates(found)["c2"]["note"]
    with pytest.raises(TargetError, match=r"The sweep cannot begin(.|\n)*galore"):
        ran(make, "none", {"optimiser": ["galore_adamw"]}, keep_going=True)
    assert not make("none").output.exists()


def test_a_first_cohort_without_a_candidate_ends_none_of_the_others(make: Make) -> None:
    """Each alone: the first one has no targets, so its cohort has no memory to print."""
    shown = io.StringIO()
    axes = {"targets": ["nothing_like_it", "all-linear"]}
    options: Any = {"keep_going": True, "max_steps": 2, "console": Console(file=shown, width=200)}
    found = ran(make, "sweep", axes, {"at_once": 1}, **options)
    assert [one["status"] for one in found.facts["candidates"]] == ["failed", "finished"]
    assert "0 numbers train at once" in shown.getvalue()
    assert "Memory" not in shown.getvalue()


def test_a_sweep_may_be_told_later_to_keep_going(make: Make) -> None:
    with pytest.raises(ZeroDivisionError):
        ran(make, "sweep", GRID, {"rungs": []}, max_steps=4, save_every=1, on_step=crash_at((0, 2)))
    seen = []
    options: Any = {
        "max_steps": 4,
        "save_every": 1,
        "on_step": lambda state, steps: seen.append(state.step),
    }
    ran(make, "sweep", GRID, {"rungs": []}, keep_going=True, **options)
    assert seen == [2, 3, 4]


def test_what_it_took_is_of_the_whole_sweep(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaching too: a sweep of many short cohorts does little else."""

    class Slow(Cohort):
        def __init__(self, *args: Any) -> None:
            time.sleep(1)
            super().__init__(*args)

    monkeypatch.setattr(sweep_run, "Cohort", Slow)
    began = time.perf_counter()
    found = ran(make, "sweep", {"rank": [1, 2]}, {"at_once": 1, "rungs": []}, max_steps=1)
    assert 2 < found.facts["seconds"] <= time.perf_counter() - began


def test_the_report_says_where_the_winner_lies_and_how_far_it_goes_alone(
    make: Make, tmp_path: Path
) -> None:
    found = ran(make, "sweep", {"learning_rate": [1e-5, 5e-3]}, {"rungs": []}, max_steps=4).facts
    (edge,) = found["edges"]
    assert (edge["axis"], edge["value"], edge["side"]) == ("learning_rate", 5e-3, "highest")
    alone = found["alone"]
    assert alone["steps"] == 4
    assert 0 <= alone["largest"] < 1e-4
    losses = next(one["losses"] for one in found["candidates"] if one["name"] == found["best"])
    again = fit(
        load_config(tmp_path / "sweep" / "best" / "train.yaml", output=tmp_path / "again"),
        quiet=True,
    )
    apart = [abs(one - other) for one, other in zip(again.losses, losses, strict=True)]
    assert alone["largest"] == max(apart)
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "learning_rate 0.005 lies at the highest end of what was tried" in page
    assert "the same losses but for rounding" not in page


@pytest.mark.parametrize(
    ("axes", "changes", "lying"),
    [
        ({"rank": [2, 4, 8]}, {"rank": 4}, []),
        ({"rank": [2, 4, 8]}, {"rank": 8}, [("rank", "highest")]),
        ({"rank": [1, 4]}, {"rank": 1}, []),  # there is no lower one
        ({"dropout": [0.0, 0.1]}, {"dropout": 0.0}, []),
        ({"seed": [0, 1], "targets": ["mlp", "attention"]}, {"seed": 1, "targets": "mlp"}, []),
        ({"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}, {"learning_rate": 1e-3}, []),
        ({"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}, {"learning_rate": 2e-5},
         [("learning_rate", "lowest")]),
        ({"alpha": {"low": 1.0, "high": 11.0}}, {"alpha": 10.5}, [("alpha", "highest")]),
    ],
)  # fmt: skip
def test_an_edge_is_an_end_beyond_which_there_is_more(axes: Any, changes: Any, lying: Any) -> None:
    settings = make_sweep({"axes": axes, "candidates": None if "low" not in str(axes) else 4})
    assert [(edge["axis"], edge["side"]) for edge in find_edges(settings.axes, changes)] == lying


def test_what_cannot_be_replaced_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of before that stays would be taken for one of this sweep."""
    ran(make, "sweep", {"rank": [1, 2]}, {"rungs": []}, max_steps=1)
    checkpoint.path_of(make("sweep").output, 900).mkdir()

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(path)

    monkeypatch.setattr(shutil, "rmtree", refused)
    seen = []
    options: Any = {"max_steps": 1, "on_step": lambda state, steps: seen.append(state.step)}
    with pytest.raises(PermissionError):
        ran(make, "sweep", {"rank": [1, 2]}, {"rungs": []}, overwrite=True, **options)
    assert not seen


def test_rungs_and_the_end_are_evaluations_enough(make: Make) -> None:
    """And what a run alone draws at its own evaluations is drawn: its dropout is the same."""
    found = ran(
        make,
        "sweep",
        {"learning_rate": [1e-3, 5e-3, 1e-5]},
        {"rungs": [3, 5]},
        max_steps=10,
        eval_every=None,
    )
    evaluated = [[step for step, _ in one["evaluations"]] for one in found.facts["candidates"]]
    assert sorted(evaluated) == [[3], [3], [3, 5, 10]]
    alone = fit(load_config(found.best / "train.yaml"), quiet=True)
    assert [step for step, _ in alone.eval_losses] == [2, 4, 6, 8, 10]
    assert candidates(found)[found.facts["best"]]["losses"] == pytest.approx(alone.losses, rel=2e-4)


def test_a_rung_judges_by_training_if_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mean loss of the latter half of the steps up to it, and nobody is evaluated for it."""
    evaluated: list[int] = []
    evaluate = Cohort.evaluate

    def counted(self: Cohort) -> Any:
        evaluated.append(len(self.members))
        return evaluate(self)

    monkeypatch.setattr(Cohort, "evaluate", counted)
    section = {"rungs": [2, 6], "keep": 0.6, "judged_by": "training"}
    axes = {"learning_rate": [1e-2, 3e-2, 5e-3, 1e-5]}
    shown = Progress(Console(file=io.StringIO(), width=200))
    found = ran(make, "sweep", axes, section, max_steps=8, eval_every=None, on_step=shown)
    assert evaluated == [2]
    lines = shown.console.file.getvalue().splitlines()
    kinds = ["mean loss in training", "mean loss in training", "evaluation"]
    assert [(line.split()[1], kind in line) for line, kind in zip(lines, kinds, strict=True)] == [
        (f"{step}/8", True) for step in (2, 6, 8)
    ]
    told = candidates(found)
    for step, first, left in ((2, 1, 3), (6, 3, 2)):
        losses = {name: sum(one["losses"][first:step]) / (step - first) for name, one in told.items()
                  if len(one["losses"]) >= step}  # fmt: skip
        assert {
            name: dict(one["judged"])[step] for name, one in told.items() if name in losses
        } == pytest.approx(losses)
        better = sorted(losses, key=losses.__getitem__)[:left]
        assert {*better} == {name for name, one in told.items() if len(one["losses"]) > step}
    assert [step for step, _ in told[found.facts["best"]]["evaluations"]] == [8]
    ended_candidate = next(one for one in told.values() if one["status"] == "ended")
    assert ended_candidate["loss"] == ended_candidate["judged"][-1][1]
    with pytest.raises(
        ConfigError, match=r"a rung at step 40 and an epoch of \d+, after which rows come again"
    ):
        ran(make, "later", axes, {"rungs": [40], "judged_by": "training"}, epochs=9)
    assert not (found.output.parent / "later").exists()


def test_candidates_that_are_attached_alike_are_checked_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(cohort, "check", lambda model, example, name: checked.append(name))
    axes = {"rank": [2, 4], "learning_rate": [1e-3, 5e-3], "data_seed": [0, 1]}
    ran(make, "sweep", axes, {"rungs": []}, max_steps=1, check=True)
    assert checked == ["c1", "c5"]


def test_candidates_share_the_passes_of_an_evaluation(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the budget of tokens, and each with the loss that it has alone."""
    passes: list[tuple[int, ...]] = []

    def evaluated(runs: Any, tasks: Any, rows: Any) -> Any:
        def seen(module: Any, args: Any, kwargs: Any) -> None:
            passes.append(tuple(kwargs["input_ids"].shape))

        hook = runs.model.model.register_forward_pre_hook(seen, with_kwargs=True)
        found = evaluate_runs(runs, tasks, rows)
        hook.remove()
        for name in tasks:
            with runs[name].use():
                told = evaluate(runs.model, rows, batch_size=3)
            assert found[name]["loss"] == pytest.approx(told.loss, rel=1e-5)
            assert found[name]["accuracy"] == pytest.approx(told.accuracy)
        assert runs.model.training
        return found

    monkeypatch.setattr(cohort, "evaluate_runs", evaluated)
    axes = {"rank": [2, 4, 6], "variant": ["lora", "dora"]}
    for tokens in (10_000, 300, 20):
        monkeypatch.setattr(held_out, "MAX_PASS_TOKENS", tokens)
        passes.clear()
        ran(make, f"sweep-{tokens}", axes, {"rungs": []}, max_steps=1, eval_fraction=0.3)
        assert max(rows * width for rows, width in passes) <= tokens
        assert sum(rows for rows, _ in passes) >= 6 * 12, "each row of each candidate"
        assert (len(passes) <= 2) == (tokens == 10_000), "one, and the trial of the rows"


def test_who_goes_on_is_the_share_of_those_that_were_there() -> None:
    search = Search(make_sweep({"axes": {"rank": [1, 2]}, "rungs": [1], "keep": 0.55}), 10)
    for count, left in ((100, 55), (99, 55), (3, 2)):
        assert (
            len(search.choose_ended(1, {f"c{number}": float(number) for number in range(count)}))
            == count - left
        )


def test_drawn_from_lists_none_is_drawn_twice() -> None:
    axes = {"rank": [2, 4, 8], "learning_rate": [1e-3, 5e-3], "targets": ["attention", ["q_proj"]]}
    asked = Search(make_sweep({"axes": axes, "candidates": 11, "seed": 3}), 10).ask(11)
    assert len({json.dumps(one) for one in asked.values()}) == 11
    assert {*asked["c01"]} == {*axes}


def test_the_spread_is_that_of_seeds() -> None:
    """Not of one candidate that a sampler drew again."""
    state = State()
    for number, seed in enumerate((0, 0, 1)):
        one = Candidate(f"c{number}", 0, {"rank": 2, "seed": seed}, FINISHED)
        one.evaluations = [(1, {"loss": 1.0 + seed})]
        state.candidates.append(one)
    assert [one["candidates"] for one in state.spread()] == [["c0", "c2"]]
    state.candidates.pop()
    assert state.spread() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_it_ends_the_same(
    base: Path, rows: Path, tmp_path: Path, seed: int
) -> None:
    """A process, by `kill -9` at any moment: within a step, an evaluation, a checkpoint."""
    section = {"axes": {**GRID, "dropout": [0.0, 0.2]}, "rungs": [8, 20], "keep": 0.5, "at_once": 5}

    def begun(name: str) -> tuple[Path, Program]:
        changes = {"max_steps": 40, "save_every": 3, "eval_every": 8}
        config = config_of(base, rows, tmp_path / name, **changes)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**config.content(), "sweep": section}))
        (program,) = start(["sweep", str(file)], 1)
        return config.output, program

    whole, program = begun("whole")
    wait_for_all([program])
    moments, killed = random.Random(seed), 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        output, program = begun("killed")
        Program.until(lambda: (newest(output) >= share * 2 * 40 * 0.9) or not program.alive, 300)  # noqa: B023
        time.sleep(moments.random() * 0.2)
        killed += program.alive
        program.kill()
        program.wait()
    assert killed == 5
    output, program = begun("killed")
    assert "Resuming from" in wait_for_all([program])
    same(output, whole)


def newest(output: Path) -> int:
    found = checkpoint.newest(output) if output.is_dir() else None
    return found[1] if found else 0
