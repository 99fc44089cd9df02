"""A flag that is given twice: the values of a list add up, and any other is refused, in every
command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.support.commands import refused
from tests.support.tiny import sums, write_rows, write_tiny

from veneer.cli.command_table import COMMANDS
from veneer.cli.commands import app
from veneer.train.config import TrainConfig

Case = Callable[..., Any]
#: flags that take several values between commas, by the command
LISTS = {
    "train": {"targets", "exclude", "layers", "train_also", "add_tokens", "trainable_tokens", "trackers", "reward",
              "columns"},
    "extract": {"targets", "exclude", "keep"},
    "eval": {"columns", "reward"},
    "plan": {"targets"},
}  # fmt: skip


def options(name: str) -> list[Any]:
    group: Any = typer.main.get_command(app)
    command = group.resolve_command(typer.Context(group), [name])[1]
    return [
        option
        for option in command.params
        if option.param_type_name == "option" and not option.is_eager
    ]


def words(option: Any) -> list[str]:
    """The flag with a value: how often it is given is looked at first."""
    return [option.opts[0]] if option.is_flag else [option.opts[0], "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_value_of_a_flag_is_lost(veneer: Case, name: str) -> None:
    listed = {option.name for option in options(name) if option.multiple}
    assert LISTS.get(name, set()) <= listed
    for option in options(name):
        if not option.multiple:
            refused(veneer(name, *words(option), *words(option)), f"{option.opts[0]} twice")


def test_both_sides_of_a_switch_are_one_flag(veneer: Case) -> None:
    refused(
        veneer("train", "--check", "--no-check", "--rank", 1, "--rank", 2),
        "--check twice",
        "--rank twice",
    )


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--targets", "q_proj", "--targets", "v_proj"], "targets", ["q_proj", "v_proj"]),
        (
            ["--targets", "q_proj,k_proj", "--targets", "v_proj"],
            "targets",
            ["q_proj", "k_proj", "v_proj"],
        ),
        (["--targets", "re:a{1,2}", "--targets", "v_proj"], "targets", ["re:a{1,2}", "v_proj"]),
        (["--targets", "all-linear"], "targets", "all-linear"),
        (["--layers", "0", "--layers", "1"], "layers", [0, 1]),
        (
            ["--task", "grpo", "--reward", "a.py:f", "--reward", "b.py:g"],
            "reward",
            ["a.py:f", "b.py:g"],
        ),
        (
            ["--task", "dpo", "--columns", "a=b", "--columns", "c=d"],
            "columns",
            {"a": "b", "c": "d"},
        ),
    ],
)
def test_lists_add_up(
    veneer: Case, monkeypatch: pytest.MonkeyPatch, flags: list[str], name: str, value: object
) -> None:
    read: list[TrainConfig] = []
    monkeypatch.setattr("veneer.cli.train._run", read.append)
    found = veneer("train", "--base", "b", "--data", "d", "--output", "o", *flags)
    assert found.code == 0, found.err
    assert getattr(read[0], name) == value


def test_one_part_has_one_column(veneer: Case) -> None:
    run = ("train", "--base", "b", "--data", "d", "--output", "o", "--task", "dpo")
    refused(veneer(*run, "--columns", "prompt=b", "--columns", "prompt=c"), "'prompt' twice")


def test_a_rate_that_was_found_replaces_the_one_that_was_given(
    veneer: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, data = write_tiny(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", sums(24))
    run = [
        "train",
        "--base",
        base,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--batch-size",
        2,
        "--find-rate",
    ]
    for rate in (["--learning-rate", "1e-4"], ["--learning-rate=1e-4"]):
        arguments = [str(word) for word in (*run, *rate)]
        monkeypatch.setattr("sys.argv", ["veneer", *arguments])
        found = veneer(*arguments)
        assert found.code == 0, found.err
        assert found.err.split("Next:")[1].count("--learning-rate") == 1
