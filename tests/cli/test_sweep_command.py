"""`veneer sweep` and `veneer advise` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.commands import refused

from veneer.train.config import load_config

Case = Callable[..., Any]


@pytest.fixture
def file(base: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`file(section, rank=2)`: a YAML file of a small sweep."""

    def write(section: Any, **changes: Any) -> Path:
        fields = {
            "base": str(base), "data": str(data), "output": str(tmp_path / "out"), "precision": "fp32",
            "eval_fraction": 0.1, "batch_size": 4, "max_steps": 4, **changes,
        }  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({**fields, **({} if section is None else {"sweep": section})})
        )
        return path

    return write


def test_a_sweep_and_its_winner_trained_again(veneer: Case, file: Any, tmp_path: Path) -> None:
    axes = {"learning_rate": [1e-3, 2e-2], "rank": [2, 4]}
    found = veneer("sweep", file({"axes": axes, "rungs": [1]}))
    assert found.code == 0, found.err
    assert "Sweep    4 candidates (grid), 4 at once; the weaker end after steps 1" in found.err
    assert "Memory   about " in found.err
    assert "activations" in found.err
    assert "step     1/4  2 of 4 go on; best c" in found.err
    again = tmp_path / "out" / "best" / "train.yaml"
    assert f"veneer train {again}" in found.err
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert veneer("train", again).code == 0
    metrics = json.loads((tmp_path / "out" / "again" / "metrics.json").read_text())
    best = next(one for one in told["candidates"] if one["name"] == told["best"])
    assert metrics["eval_loss"] == pytest.approx(best["loss"], rel=1e-4)
    assert (
        veneer("verify", tmp_path / "out" / "best" / "adapter", load_config(again).base).code == 0
    )
    found = veneer("sweep", file({"axes": axes, "rungs": [1]}), "--overwrite", "--json")
    assert {**json.loads(found.out), "seconds": 0, "cpu_seconds": 0} == {
        **told,
        "seconds": 0,
        "cpu_seconds": 0,
    }


def test_bad_sweeps_are_refused_with_words(veneer: Case, file: Any, tmp_path: Path) -> None:
    refused(veneer("sweep", file(None)), "without a section `sweep:`", "what to try")
    refused(veneer("sweep", file([1])), "a list as `sweep:`")
    refused(veneer("sweep", file({"axes": {"rnak": [1]}})), "axis 'rnak'", "nearest: 'rank'")
    refused(veneer("sweep", tmp_path / "none.yaml"), "does not exist")
    refused(veneer("train", file({"axes": {"rank": [1]}})), "sweep is a section for `veneer sweep`")
    axes = {"targets": ["attention", "nothing"]}
    refused(veneer("sweep", file({"axes": axes})), "candidate c2 .targets nothing")
    assert not (tmp_path / "out").exists()
    found = veneer("sweep", file({"axes": axes}), "--keep-going")
    assert found.code == 0, found.err
    assert "c2: " in (tmp_path / "out" / "report.html").read_text()


def test_advice_is_a_configuration(veneer: Case, base: Path, data: Path, tmp_path: Path) -> None:
    found = veneer("advise", data, base)
    assert found.code == 0, found.err
    fields = yaml.safe_load(found.out)
    assert fields["rank"] == 4
    assert fields["targets"] == "all-linear"
    assert fields["learning_rate"] == pytest.approx(1.5 * 5e-4 * (2000 / 32) ** 0.781, rel=0.05)
    assert "LoRA Without Regret" in found.out
    run = tmp_path / "run.yaml"
    found = veneer("advise", data, base, "--output", run, "--json")
    assert {one["setting"]: one["value"] for one in json.loads(found.out)["advice"]}["rank"] == 4
    assert json.loads(found.out)["config"]["rank"] == load_config(run).rank == 4
    refused(veneer("advise", data, base, "--output", run), "run.yaml, which exists", "--overwrite")
    assert veneer("train", run, "--max-steps", 1).code == 0


def test_advice_that_was_tried(veneer: Case, base: Path, data: Path, tmp_path: Path) -> None:
    run, trial = tmp_path / "run.yaml", tmp_path / "trial"
    found = veneer("advise", data, base, "--output", run, "--try", trial, "--eval-fraction", 0.1)
    assert found.code == 0, found.err
    told = json.loads((trial / "sweep.json").read_text())
    best = next(one for one in told["candidates"] if one["name"] == told["best"])["changes"]
    assert len(told["candidates"]) == 6
    config = load_config(run)
    assert (config.rank, config.learning_rate) == (best["rank"], best["learning_rate"])
    assert "best of 6 after" in run.read_text()
