"""A trained adapter and everything the commands need, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.tiny import sums, write_rows


class Run(NamedTuple):
    """What a command line printed, and its exit code."""

    code: int
    out: str
    err: str


Veneer = Callable[..., Run]


@pytest.fixture
def veneer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Veneer:
    """`veneer("train", path, "--rank", 4)` runs the command line in this process."""
    from veneer.cli import console, run

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        for name in (
            "out",
            "err",
        ):  # rich looks the streams up anew each time; only the width is kept
            getattr(console, name)._width = 200
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(24))


@pytest.fixture(scope="session")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder, trained for a few steps."""
    from veneer.train.config import make_config
    from veneer.train.run import fit

    output = tmp_path_factory.mktemp("run") / "run"
    fields = {
        "base": str(base),
        "data": str(data),
        "output": str(output),
        "rank": 4,
        "learning_rate": 2e-2,
        "precision": "fp32",
    }
    return fit(make_config({**fields, "epochs": 4, "batch_size": 4}), quiet=True).adapter
